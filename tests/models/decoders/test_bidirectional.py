import pytest
import torch
from torch import Tensor

from tests.models.decoders.case import MEMORY, REGIONS, VOCABULARY, DecoderCase, memory, sentences
from visattn.attention import CoverageAttention
from visattn.models.decoders import BidirectionalDecoder
from visattn.models.decoders.recurrent import Cell

SMALL = {"hidden": 6, "embedding": 5, "maxout": 4}


def count(v: int, d: int, h: int = 1000, e: int = 620, m: int = 500, *, cell: str = "gru", start: int = 1) -> int:
    """By hand: words and what begins; two readers; attention of 512 units; first state; cell; output."""
    gates, biases, states = (3, 2, 1) if cell == "gru" else (4, 1, 2)
    cells = 2 * gates * h * (d + h + biases) + gates * h * (e + 2 * h + h + biases)
    output = 2 * m * (h + 1 + e + 2 * h) + v * (m + 1)
    return (v + 1) * e + 512 * (h + 2 * h + 2) + states * h * (start * h + 1) + cells + output


CASES = [
    DecoderCase(BidirectionalDecoder, SMALL, lambda v, d: count(v, d, 6, 5, 4), 129649),
    DecoderCase(BidirectionalDecoder, {}, count, 37319644),
    DecoderCase(
        BidirectionalDecoder,
        SMALL | {"cell": "lstm"},
        lambda v, d: count(v, d, 6, 5, 4, cell="lstm"),
        136009,
    ),
    DecoderCase(
        BidirectionalDecoder,
        SMALL | {"initial": "last", "first": "zeros", "attention": CoverageAttention},
        lambda v, d: count(v, d, 6, 5, 4, start=2) - 5 + 512,
        130192,
    ),
]


def gru(cell: Cell, known: Tensor, found: Tensor | None, h: Tensor) -> Tensor:
    inputs = cell.known.weight @ known + cell.known.bias
    if found is not None:
        inputs = inputs + cell.found.weight @ found
    hidden = cell.hidden.weight @ h + cell.hidden.bias
    (r, u, n), (old_r, old_u, old_n) = inputs.split(6), hidden.split(6)
    reset, update = 1 / (1 + (-r - old_r).exp()), 1 / (1 + (-u - old_u).exp())
    return (1 - update) * (n + reset * old_n).tanh() + update * h


def both_ways(decoder: BidirectionalDecoder, regions: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What was read at each region, and the backward state at the first."""
    ways = []
    for reader, order in zip(decoder.readers, (regions, regions[::-1]), strict=True):
        states = [torch.zeros(6, dtype=torch.double)]
        for region in order:
            states.append(gru(reader.cells[0], region, None, states[-1]))
        ways.append(states[1:])
    return [torch.cat(each) for each in zip(ways[0], ways[1][::-1], strict=True)], ways[1][-1]


@pytest.mark.parametrize("masked", [False, True])
def test_is_the_paper_s_equations_word_by_word(masked):
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    if masked:
        mask[0, [0, 3, 4]] = mask[1, 9:] = False
    said = decoder(decoder.prepare(held, mask if masked else None), words)
    logits = decoder.write(said.features)
    attention = decoder.attention
    for b in range(2):
        read, back = both_ways(decoder, list(held[b][mask[b]]))
        for r in range(3):
            s = (decoder.back.weight @ back + decoder.back.bias).tanh()
            for t in range(5):
                y = decoder.words.weight[words[b, r, t - 1]] if t else decoder.words.first
                inner = [attention.query.weight @ s + attention.key.weight @ u + attention.key.bias for u in read]
                scores = torch.stack([attention.score.weight[0] @ each.tanh() for each in inner])
                a = scores.exp() / scores.exp().sum()
                z = sum(weight * u for weight, u in zip(a, read, strict=True))
                deep = decoder.from_state.weight @ s + decoder.from_state.bias
                deep = deep + decoder.from_word.weight @ y + decoder.from_region.weight @ z
                features = torch.stack([torch.maximum(deep[2 * i], deep[2 * i + 1]) for i in range(4)])
                expected = decoder.out.weight @ features + decoder.out.bias
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)
                torch.testing.assert_close(said.maps[b, r, t, mask[b]], a, rtol=0, atol=1e-11)
                s = gru(decoder.cells[0], y, z, s)


def test_reading_from_the_other_end_is_the_same_iff_the_readers_change_places():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    decoder.readers[1].load_state_dict(decoder.readers[0].state_dict())
    decoder.attention.key.weight.data[:, 6:] = decoder.attention.key.weight.data[:, :6]
    for layer in (decoder.cells[0].found, decoder.from_region):
        layer.weight.data[:, 6:] = layer.weight.data[:, :6]
    torch.nn.init.zeros_(decoder.back.weight)  # where it starts is the first region alone
    said, turned = (decoder(decoder.prepare(each), words) for each in (held, held.flip(1)))
    torch.testing.assert_close(turned.features, said.features, rtol=0, atol=1e-11)
    torch.testing.assert_close(turned.maps.flip(3), said.maps, rtol=0, atol=1e-11)
    decoder.readers[1].cells[0].known.weight.data.neg_()
    said, turned = (decoder(decoder.prepare(each), words) for each in (held, held.flip(1)))
    assert not torch.allclose(turned.features, said.features)


def test_a_memory_of_nothing_is_read_as_zeros():
    decoder, held = CASES[0].lively(), memory()
    told = decoder.prepare(held, torch.zeros(2, REGIONS, dtype=torch.bool))
    expected = decoder.back.bias.tanh().expand(2, -1)
    torch.testing.assert_close(told.begin[0], expected, rtol=0, atol=1e-12)
    assert decoder(told, sentences()).maps.count_nonzero() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"maxout": 0}, "maxout must be at least 1, got 0"),
        ({"cell": "rnn"}, "cell must be lstm or gru, got 'rnn'"),
        ({"initial": "first"}, "initial must be backward or mean or last or zeros, got 'first'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        BidirectionalDecoder(VOCABULARY, MEMORY, **options)


def test_refuses_a_memory_without_features():
    with pytest.raises(ValueError, match="memory must be at least 1, got 0"):
        BidirectionalDecoder(VOCABULARY, 0)
