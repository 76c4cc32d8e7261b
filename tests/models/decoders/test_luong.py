import pytest
import torch

from tests.models.decoders.case import MEMORY, VOCABULARY, DecoderCase, memory, sentences
from visattn.attention import AdditiveAttention
from visattn.models.decoders import LuongDecoder

SMALL = {"hidden": 6, "embedding": 5}


def count(v: int, d: int, h: int = 512, e: int = 512) -> int:
    """By hand: words and what begins, attention, cell with feeding, first state, layer of the attention, output."""
    return (v + 1) * e + h * d + 4 * h * (e + h + h + 1) + 2 * h * (d + 1) + h * (d + h) + v * (h + 1)


CASES = [
    DecoderCase(LuongDecoder, SMALL, lambda v, d: count(v, d, 6, 5), 132773),
    DecoderCase(LuongDecoder, {}, count, 14710032),
    DecoderCase(
        LuongDecoder,
        SMALL | {"depth": 2, "initial": "last", "attention": AdditiveAttention},
        lambda v, d: count(v, d, 6, 5) - 6 * d + 512 * (6 + d + 2) + 24 * (6 + 6 + 1),
        396253,
    ),
    DecoderCase(
        LuongDecoder,
        SMALL | {"feeding": False, "cell": "gru", "initial": "zeros", "first": "zeros"},
        lambda v, d: v * 5 + 6 * d + 18 * (5 + 6 + 2) + 6 * (d + 6) + v * (6 + 1),
        126414,
    ),
]


def test_is_the_paper_s_equations_word_by_word():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words)
    logits = decoder.write(said.features)
    (cell,) = decoder.cells
    for b in range(2):
        for r in range(3):
            h, c = (decoder.start.weight @ held[b].mean(0) + decoder.start.bias).tanh().split(6)
            fed = torch.zeros(6, dtype=torch.double)
            for t in range(5):
                y = decoder.words.weight[words[b, r, t - 1]] if t else decoder.words.first
                gates = cell.known.weight @ y + cell.known.bias + cell.found.weight @ fed + cell.hidden.weight @ h
                i, f, g, o = gates.split(6)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                a = torch.stack([h @ (decoder.attention.key.weight @ v) for v in held[b]]).softmax(0)
                fed = (decoder.join.weight @ torch.cat((sum(a[i] * held[b, i] for i in range(len(a))), h))).tanh()
                torch.testing.assert_close(said.maps[b, r, t], a, rtol=0, atol=1e-11)
                expected = decoder.out.weight @ fed + decoder.out.bias
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("case", "fed"), [(CASES[0], True), (CASES[3], False)], ids=["fed", "alone"])
def test_a_step_knows_where_was_looked_before_iff_it_is_told(case, fed):
    decoder, held, words = case.lively(), memory(), sentences()
    told = decoder.prepare(held)
    regions = told.regions._replace(values=torch.randn_like(held))  # read alone: states and keys are as they were
    one, other = decoder(told, words).maps, decoder(told._replace(regions=regions), words).maps
    torch.testing.assert_close(one[:, :, 0], other[:, :, 0], rtol=0, atol=1e-12)
    assert torch.allclose(one[:, :, 1:], other[:, :, 1:], rtol=0, atol=1e-12) != fed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"cell": "rnn"}, "cell must be lstm or gru, got 'rnn'"),
        ({"initial": "first"}, "initial must be mean or last or zeros, got 'first'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        LuongDecoder(VOCABULARY, MEMORY, **options)
