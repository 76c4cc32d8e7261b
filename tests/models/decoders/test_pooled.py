import pytest
import torch

from tests.models.decoders.case import MEMORY, REGIONS, VOCABULARY, DecoderCase, memory, sentences
from visattn.models.decoders import PooledDecoder
from visattn.models.decoders.recurrent import Layers

SMALL = {"hidden": 6, "embedding": 5}


def count(v: int, d: int, h: int = 512, e: int = 512) -> int:
    """By hand: words and what begins; first state; what is told; a layer; output."""
    return (v + 1) * e + 2 * h * (d + 1) + e * (d + 1) + 4 * h * (2 * e + 1 + h) + v * (h + 1)


CASES = [
    DecoderCase(PooledDecoder, SMALL, lambda v, d: count(v, d, 6, 5), 129134),
    DecoderCase(PooledDecoder, {}, count, 14186256),
    DecoderCase(
        PooledDecoder,
        SMALL | {"depth": 3, "fed": "none", "initial": "last"},
        lambda v, d: count(v, d, 6, 5) - 5 * (d + 1) - 24 * 5 + 2 * 24 * (6 + 1 + 6),
        127073,
    ),
    DecoderCase(
        PooledDecoder,
        SMALL | {"depth": 2, "cell": "gru", "initial": "zeros", "fed": "last", "first": "zeros"},
        lambda v, d: v * 5 + 5 * (d + 1) + 18 * (10 + 6 + 2) + 18 * (6 + 6 + 2) + v * (6 + 1),
        123141,
    ),
]


def test_is_the_paper_s_equations_word_by_word():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    logits = decoder.write(decoder(decoder.prepare(held), words).features)
    (cell,) = decoder.layers.cells
    for b in range(2):
        mean = sum(held[b]) / REGIONS
        image = decoder.image.weight @ mean + decoder.image.bias
        for r in range(3):
            h, c = (decoder.start.weight @ mean + decoder.start.bias).tanh().split(6)
            for t in range(5):
                y = decoder.words.weight[words[b, r, t - 1]] if t else decoder.words.first
                gates = cell.known.weight @ torch.cat((y, image)) + cell.known.bias + cell.hidden.weight @ h
                i, f, g, o = gates.split(6)
                c = c / (1 + (-f).exp()) + g.tanh() / (1 + (-i).exp())
                h = c.tanh() / (1 + (-o).exp())
                torch.testing.assert_close(
                    logits[b, r, t], decoder.out.weight @ h + decoder.out.bias, rtol=0, atol=1e-11
                )


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("training", [False, True])
def test_layers_are_the_same_at_once_and_one_by_one(kind, training):
    layers = Layers(4, 6, depth=3, kind=kind).double().train(training)
    x, state = torch.randn(2, 5, 4, dtype=torch.double), tuple(torch.randn(layers.states, 3, 2, 6, dtype=torch.double))
    y, after = layers(x, state)
    expected, last = layers._one_by_one(x, state)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, last, rtol=0, atol=1e-12)


def test_between_layers_numbers_are_dropped_in_training_alone():
    layers, x = Layers(4, 60, depth=2, dropout=0.9), torch.randn(1, 3, 4)
    nothing = (torch.zeros(2, 1, 60),) * 2
    for way in (layers.forward, layers._one_by_one):
        layers.train()
        assert not torch.equal(way(x, nothing)[0], way(x, nothing)[0])
        layers.eval()
        assert torch.equal(way(x, nothing)[0], way(x, nothing)[0])


def test_only_what_is_pooled_counts():
    held, words = memory(), sentences()
    other = torch.cat((held[:, torch.randperm(REGIONS - 1)], held[:, -1:]), 1)
    turned = held.flip(1)
    for case, same in ((CASES[0], True), (CASES[2], False), (CASES[3], False)):
        decoder = case.lively()
        said = [decoder(decoder.prepare(each), words).features for each in (held, other, turned)]
        torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-11)
        assert torch.allclose(said[2], said[0], rtol=0, atol=1e-11) == same


def test_has_no_maps():
    decoder, words = CASES[0].lively(), sentences()
    prepared = decoder.prepare(memory())
    assert decoder(prepared, words).maps is None
    assert decoder.step(None, prepared, decoder.begin(prepared, 2))[1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"cell": "rnn"}, "cell must be lstm or gru, got 'rnn'"),
        ({"initial": "first"}, "initial must be mean or last or zeros, got 'first'"),
        ({"fed": "first"}, "fed must be mean or last or none, got 'first'"),
        (
            {"initial": "zeros", "fed": "none"},
            "initial or fed must tell of the image, got initial='zeros'",
        ),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        PooledDecoder(VOCABULARY, MEMORY, **options)
