import math

import pytest
import torch
from torch import Tensor

from tests.models.decoders.case import MEMORY, VOCABULARY, DecoderCase, memory, sentences
from visattn.models.decoders import ShowAttendAndTell

SMALL = {"hidden": 6, "embedding": 5}


def count(v: int, d: int, h: int = 512, e: int = 512, *, cell: str = "lstm", gate: int = 1, start: int = 2) -> int:
    """By hand: words, attention of 512 units, cell, gate, first state, deep output."""
    gates, twice = (4, 0) if cell == "lstm" else (3, 3 * h)
    recurrent = gates * h * (e + d + h + 1) + twice
    return v * e + 512 * (h + d + 2) + recurrent + gate * (h + 1) + start * h * (d + 1) + e * (h + 1 + d) + v * (e + 1)


CASES = [
    DecoderCase(ShowAttendAndTell, SMALL, lambda v, d: count(v, d, 6, 5), 397574),
    DecoderCase(ShowAttendAndTell, {}, count, 14973713),
    DecoderCase(
        ShowAttendAndTell,
        SMALL | {"cell": "gru", "gate": "vector", "first": "begin"},
        lambda v, d: count(v, d, 6, 5, cell="gru", gate=d, start=1) + 5,
        394952,
    ),
    DecoderCase(
        ShowAttendAndTell,
        SMALL | {"gate": "none", "initial": "last", "tied": True},
        lambda v, d: count(v, d, 6, 5, gate=0) - 5 * v,
        347567,
    ),
    DecoderCase(
        ShowAttendAndTell,
        SMALL | {"initial": "zeros", "output": "state"},
        lambda v, d: count(v, d, 6, 5, start=0) - 5 * (6 + 1 + d) + v * (6 - 5),
        398823,
    ),
]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def test_is_the_paper_s_equations_word_by_word():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words)
    logits = decoder.write(said.features)
    attention, cell, start = decoder.attention, decoder.cells[0], decoder.start
    for b in range(2):
        for r in range(3):
            mean = sum(held[b]) / len(held[b])
            h, c = (start.weight @ mean + start.bias).tanh().split(6)
            for t in range(5):
                y = decoder.words.weight[words[b, r, t - 1]] if t else torch.zeros(5, dtype=torch.double)
                scores = [
                    attention.score.weight[0]
                    @ (attention.query.weight @ h + attention.key.weight @ v + attention.key.bias).tanh()
                    for v in held[b]
                ]
                exponentials = [math.exp(score.item()) for score in scores]
                a = [each / sum(exponentials) for each in exponentials]
                beta = sigmoid(decoder.gate.weight[0] @ h + decoder.gate.bias)
                z = beta * sum(weight * v for weight, v in zip(a, held[b], strict=True))
                gates = cell.known.weight @ y + cell.known.bias + cell.found.weight @ z + cell.hidden.weight @ h
                i, f, g, o = gates.split(6)
                c = sigmoid(f) * c + sigmoid(i) * g.tanh()
                h = sigmoid(o) * c.tanh()
                deep = decoder.from_state.weight @ h + decoder.from_state.bias + y + decoder.from_region.weight @ z
                expected = decoder.out.weight @ deep.tanh() + decoder.out.bias
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)
                torch.testing.assert_close(said.maps[b, r, t], torch.tensor(a, dtype=torch.double), rtol=0, atol=1e-11)


def test_the_gated_recurrent_unit_is_torch_s():
    decoder = CASES[2].lively()
    cell, torchs = decoder.cells[0], torch.nn.GRUCell(5 + MEMORY, 6).double()
    torchs.weight_ih.data = torch.cat((cell.known.weight, cell.found.weight), 1).data
    torchs.bias_ih.data, torchs.weight_hh.data, torchs.bias_hh.data = (
        cell.known.bias.data,
        cell.hidden.weight.data,
        cell.hidden.bias.data,
    )
    x, z, h = (torch.randn(3, n, dtype=torch.double) for n in (5, MEMORY, 6))
    (ours,) = cell(cell.known(x), z, (h,))
    torch.testing.assert_close(ours, torchs(torch.cat((x, z), 1), h), rtol=0, atol=1e-12)


def test_the_long_short_term_memory_is_torch_s():
    cell, torchs = CASES[0].lively().cells[0], torch.nn.LSTMCell(5 + MEMORY, 6).double()
    torchs.weight_ih.data = torch.cat((cell.known.weight, cell.found.weight), 1).data
    torchs.bias_ih.data, torchs.weight_hh.data = cell.known.bias.data, cell.hidden.weight.data
    torch.nn.init.zeros_(torchs.bias_hh)
    x, z, h, c = (torch.randn(3, n, dtype=torch.double) for n in (5, MEMORY, 6, 6))
    for ours, theirs in zip(cell(cell.known(x), z, (h, c)), torchs(torch.cat((x, z), 1), (h, c)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_order_of_the_regions_does_not_matter_and_that_of_the_words_does():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words).features
    torch.testing.assert_close(decoder(decoder.prepare(held.flip(1)), words).features, said, rtol=0, atol=1e-12)
    assert not torch.allclose(decoder(decoder.prepare(held), words.flip(2)).features[:, :, -1], said[:, :, -1])


def test_the_last_region_is_the_last_that_is_there():
    decoder, held = CASES[3].lively(), memory()
    mask = torch.zeros(held.shape[:2], dtype=torch.bool)
    mask[0, :4] = mask[1, 2:7] = True
    h, _ = decoder.prepare(held, mask).begin
    last = torch.stack((held[0, 3], held[1, 6]))
    torch.testing.assert_close(h, decoder.start(last).tanh()[:, :6], rtol=0, atol=1e-12)


def test_words_are_said_by_the_vectors_they_are_read_by():
    decoder = CASES[3].make()
    assert decoder.out.weight is decoder.words.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"cell": "rnn"}, "cell must be lstm or gru, got 'rnn'"),
        ({"gate": "both"}, "gate must be scalar or vector or none, got 'both'"),
        ({"initial": "first"}, "initial must be mean or last or zeros, got 'first'"),
        ({"output": "wide"}, "output must be deep or state, got 'wide'"),
        ({"first": "end"}, "first must be begin or zeros, got 'end'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        ShowAttendAndTell(VOCABULARY, MEMORY, **options)
