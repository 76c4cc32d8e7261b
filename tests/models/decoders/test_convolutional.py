from functools import partial

import pytest
import torch
from torch import Tensor

from tests.models.decoders.case import MEMORY, REGIONS, SIZE, VOCABULARY, DecoderCase, memory, sentences
from tests.models.decoders.test_transformer import sines
from visattn.attention import CoverageAttention, MultiHeadAttention
from visattn.models.decoders import ConvolutionalDecoder
from visattn.models.decoders.convolutional import NormedLinear

SMALL = {"width": 5, "embedding": 6, "depth": 2, "kernel_size": 3}


def linear(inputs: int, outputs: int) -> int:
    """Directions, lengths and bias."""
    return outputs * (inputs + 2)


def count(v: int, d: int, w: int = 512, e: int = 512, depth: int = 3, k: int = 5, mean: bool = True) -> int:
    """By hand: words and what begins; first layer; convolution, attention, what asks and what is read; last layers."""
    layer = linear(k * w, 2 * w) + d * e + linear(w, e) + linear(d, w)
    return (v + 1) * e + linear(e + d * mean, w) + depth * layer + linear(w, e) + v * (e + 1)


CASES = [
    DecoderCase(ConvolutionalDecoder, SMALL, lambda v, d: count(v, d, 5, 6, 2, 3), 144356),
    DecoderCase(ConvolutionalDecoder, {}, count, 21274896),
    DecoderCase(
        ConvolutionalDecoder,
        SMALL | {"mean": False, "placed": True, "maps": "all"},
        lambda v, d: count(v, d, 5, 6, 2, 3, mean=False),
        141796,
    ),
    DecoderCase(
        ConvolutionalDecoder,
        SMALL
        | {"attention": partial(MultiHeadAttention, heads=2), "scaled": False, "first": "zeros", "kernel_size": 1},
        lambda v, d: count(v, d, 5, 6, 2, 1) - 6 + 2 * (2 * 36 + d * 6 + 30 - 5 * d),
        145378,
    ),
]


def normed(layer: NormedLinear, x: Tensor) -> Tensor:
    rows = zip(layer.direction, layer.length, layer.bias, strict=True)
    return torch.stack([g * (w @ x) / (w @ w).sqrt() + b for w, g, b in rows])


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["convcap", "placed"])
def test_is_the_paper_s_equations_word_by_word(case):
    decoder, held, words = case.lively(), memory(), sentences()
    placed = case.options.get("placed", False)
    said = decoder(decoder.prepare(held, None, SIZE), words)
    logits = decoder.write(said.features)
    nothing = torch.zeros(5, dtype=torch.double)
    place = [torch.cat((sines(i // SIZE[1], MEMORY // 2), sines(i % SIZE[1], MEMORY // 2))) for i in range(REGIONS)]
    for b in range(2):
        values = [0.5**0.5 * (v + p) for v, p in zip(held[b], place, strict=True)] if placed else list(held[b])
        for r in range(3):
            vectors = [decoder.words.first, *decoder.words.weight[words[b, r]]]
            if placed:
                vectors = [vector + sines(t, 6) for t, vector in enumerate(vectors)]
                x = [normed(decoder.enter, vector) for vector in vectors]
            else:
                x = [normed(decoder.enter, torch.cat((vector, held[b].mean(0)))) for vector in vectors]
            maps = []
            for n in range(2):
                after, looks = [], []
                for t in range(5):
                    seen = torch.cat([x[j] if j >= 0 else nothing for j in range(t - 2, t + 1)])
                    a, gate = normed(decoder.filters[n], seen).split(5)
                    u = a / (1 + (-gate).exp())
                    q = 0.5**0.5 * (vectors[t] + normed(decoder.asks[n], u))
                    scores = torch.stack([q @ (decoder.attentions[n].key.weight @ v) for v in held[b]])
                    looks.append(scores.exp() / scores.exp().sum())
                    z = REGIONS**0.5 * sum(a * v for a, v in zip(looks[-1], values, strict=True))
                    after.append(0.5**0.5 * (x[t] + 0.5**0.5 * (u + normed(decoder.reads[n], z))))
                x = after
                maps.append(torch.stack(looks))
            expected = torch.stack(maps, 1) if decoder.maps == "all" else maps[-1]
            torch.testing.assert_close(said.maps[b, r], expected, rtol=0, atol=1e-11)
            for t in range(5):
                expected = decoder.out.weight @ normed(decoder.leave, x[t]) + decoder.out.bias
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)


def test_a_word_is_forgotten_when_no_convolution_sees_it():
    decoder, words = CASES[0].lively(), sentences(length=8)
    prepared = decoder.prepare(memory())
    before = decoder(prepared, words).features
    words[:, :, 1] = (words[:, :, 1] + 1) % VOCABULARY  # said before step 2: seen by 1 + 2 layers of 2 more steps
    after = decoder(prepared, words).features
    changed = (after - before).abs().amax((0, 1, 3)) > 1e-12
    assert changed.tolist() == [False, False, True, True, True, True, True, False, False]


def test_the_order_of_the_regions_matters_iff_they_are_told_their_places():
    held, words = memory(), sentences()
    for case, placed in ((CASES[0], False), (CASES[2], True)):
        decoder = case.lively()
        said, other = (decoder(decoder.prepare(each, None, SIZE), words).features for each in (held, held.flip(1)))
        assert torch.allclose(said, other, rtol=0, atol=1e-11) != placed


def test_what_is_read_grows_with_the_regions_that_are_there():
    decoder, mask = CASES[0].make(), torch.zeros(2, REGIONS, dtype=torch.bool)
    mask[0, :4] = True
    assert decoder.prepare(memory(dtype=torch.float), mask).scale.flatten().tolist() == [2, 0]
    assert CASES[3].make().prepare(memory(dtype=torch.float), mask).scale.flatten().tolist() == [1, 1]


def test_weights_start_as_their_directions():
    layer = NormedLinear(400, 300, gain=2.0)
    x = torch.randn(50, 400)
    torch.testing.assert_close(layer(x), x @ layer.direction.mT, rtol=1e-4, atol=1e-4)
    assert 1.9 < layer(x).square().mean() < 2.1
    layer.direction.data *= 3
    torch.testing.assert_close(layer(x), x @ layer.direction.mT / 3, rtol=1e-4, atol=1e-4)


def test_refuses_attention_that_depends_on_earlier_looks():
    message = "ConvolutionalDecoder looks for all steps at once, CoverageAttention looks by what it saw before"
    with pytest.raises(ValueError, match=message):
        ConvolutionalDecoder(VOCABULARY, MEMORY, attention=CoverageAttention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"embedding": 5, "placed": True}, "embedding must be even for words to be told their places, got 5"),
        ({"maps": "first"}, "maps must be last or all, got 'first'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        ConvolutionalDecoder(VOCABULARY, MEMORY, **options)
