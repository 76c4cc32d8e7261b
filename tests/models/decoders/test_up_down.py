import pytest
import torch

from tests.models.decoders.case import MEMORY, VOCABULARY, DecoderCase, memory, sentences
from visattn.models.decoders import UpDownDecoder

SMALL = {"hidden": 6, "embedding": 5}


def count(v: int, d: int, h: int = 1000, e: int = 1000, gates: int = 4) -> int:
    """By hand: words and what begins, attention of 512 units, both cells with the mean region, output."""
    cells = gates * h * (e + 1 + d + h + h) + gates * h * (h + 1 + d + h)
    return (v + 1) * e + 512 * (h + d + 2) + cells + v * (h + 1)


CASES = [
    DecoderCase(UpDownDecoder, SMALL, lambda v, d: count(v, d, 6, 5), 411565),
    DecoderCase(UpDownDecoder, {}, count, 44890168),
    DecoderCase(
        UpDownDecoder,
        SMALL | {"cell": "gru", "initial": "mean"},
        lambda v, d: count(v, d, 6, 5, 3) + 2 * 18 + 6 * (d + 1),
        408349,
    ),
]


def test_is_the_paper_s_equations_word_by_word():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words)
    logits = decoder.write(said.features)
    where, what = decoder.cells
    for b in range(2):
        mean = held[b].mean(0)
        for r in range(3):
            h1, c1, h2, c2 = (torch.zeros(6, dtype=torch.double) for _ in range(4))
            for t in range(5):
                y = decoder.words.weight[words[b, r, t - 1]] if t else decoder.words.first
                gates = where.known.weight @ y + where.known.bias + decoder.image.weight @ mean
                i, f, g, o = (gates + where.found.weight @ h2 + where.hidden.weight @ h1).split(6)
                c1 = f.sigmoid() * c1 + i.sigmoid() * g.tanh()
                h1 = o.sigmoid() * c1.tanh()
                weight, bias = decoder.attention.key.weight, decoder.attention.key.bias
                scores = [
                    decoder.attention.score.weight[0] @ (weight @ v + bias + decoder.attention.query.weight @ h1).tanh()
                    for v in held[b]
                ]
                a = torch.stack(scores).softmax(0)
                z = sum(a[k] * held[b, k] for k in range(len(a)))
                gates = what.known.weight @ h1 + what.known.bias + what.found.weight @ z + what.hidden.weight @ h2
                i, f, g, o = gates.split(6)
                c2 = f.sigmoid() * c2 + i.sigmoid() * g.tanh()
                h2 = o.sigmoid() * c2.tanh()
                torch.testing.assert_close(said.maps[b, r, t], a, rtol=0, atol=1e-11)
                expected = decoder.out.weight @ h2 + decoder.out.bias
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)


def test_the_mean_region_is_seen_by_the_first_cell():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    told = decoder.prepare(held)
    other = decoder(told._replace(mean=told.mean + 1), words).features
    assert not torch.allclose(other, decoder(told, words).features)


def test_refuses_a_cell_it_does_not_have(unchecked):
    with pytest.raises(ValueError, match="cell must be lstm or gru, got 'rnn'"):
        UpDownDecoder(VOCABULARY, MEMORY, cell="rnn")
