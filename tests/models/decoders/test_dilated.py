from functools import partial

import pytest
import torch

from tests.models.decoders.case import MEMORY, VOCABULARY, DecoderCase, memory, sentences
from visattn.attention import CoverageAttention, MultiHeadAttention
from visattn.models.decoders import DilatedDecoder

SMALL = {"width": 6, "kernel_size": 2, "dilations": [1, 2]}


def count(v: int, d: int, w: int = 512, depth: int = 5, k: int = 3) -> int:
    """By hand: words and what begins; convolution, attention, what is read, residual and skip; last layers."""
    layer = 2 * w * (k * w + 1) + w * d + 2 * w * d + 2 * w * (w + 1)
    return (v + 1) * w + depth * layer - w * (w + 1) + w * (w + 1) + v * (w + 1)


def bottleneck(v: int, d: int, w: int = 6, depth: int = 2, k: int = 2) -> int:
    """By hand: words and what begins; convolution of half the width, mean region, layers around; last layers."""
    h = w // 2
    layer = h * (k * h + 1) + h * d + 2 * w + h * (w + 1) + 2 * h + 2 * h + w * (h + 1)
    return (v + 1) * w + depth * layer + 2 * w + w * (w + 1) + v * (w + 1)


CASES = [
    DecoderCase(DilatedDecoder, SMALL, lambda v, d: count(v, d, 6, 2, 2), 148918),
    DecoderCase(DilatedDecoder, {}, count, 24678672),
    DecoderCase(
        DilatedDecoder,
        SMALL | {"mean": True, "maps": "all", "attention": partial(MultiHeadAttention, heads=2)},
        lambda v, d: count(v, d, 6, 2, 2) + 2 * (12 * d + 2 * 36 + d * 6 + 72 - 12 * d),
        155350,
    ),
    DecoderCase(
        DilatedDecoder,
        SMALL | {"mean": True, "attention": None, "first": "zeros"},
        lambda v, d: count(v, d, 6, 2, 2) - 2 * 6 * d - 6,
        142768,
    ),
    DecoderCase(DilatedDecoder, SMALL | {"unit": "bottleneck", "mean": True, "attention": None}, bottleneck, 133312),
    DecoderCase(
        DilatedDecoder,
        SMALL | {"unit": "bottleneck", "kernel_size": 1},
        lambda v, d: bottleneck(v, d, k=1) + 2 * 6 * d,
        139438,
    ),
]
BOTH = pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=["gate", "bottleneck"])


@BOTH
def test_is_the_paper_s_equations_word_by_word(case):
    decoder, held, words = case.lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words)
    logits = decoder.write(said.features)
    width = 6 if case is CASES[2] else 3
    nothing = torch.zeros(width, dtype=torch.double)
    for b in range(2):
        mean = sum(held[b]) / len(held[b])
        for r in range(3):
            x = [decoder.words.first, *decoder.words.weight[words[b, r]]]
            s = [torch.zeros(6, dtype=torch.double)] * 5
            for n, (layer, dilation) in enumerate(zip(decoder.layers, (1, 2), strict=True)):
                enters = x if case is CASES[2] else [layer.narrow(each) for each in x]
                after = []
                for t in range(5):
                    old = enters[t - dilation] if t >= dilation else nothing
                    f = layer.filters.weight[:, :width] @ old + layer.filters.weight[:, width:] @ enters[t]
                    f = f + layer.filters.bias + layer.mean.weight @ mean
                    if layer.attention is not None:
                        prepared = layer.attention.prepare(held[b : b + 1])
                        weights, _ = layer.attention.attend(x[t][None, None], prepared)
                        read = layer.attention.read(x[t][None, None], prepared, weights=weights)
                        f = f + layer.read.weight @ read[0, 0]
                        torch.testing.assert_close(said.maps[b, r, t, n], weights[0, 0], rtol=0, atol=1e-11)
                    if case is CASES[2]:
                        u = f[:6].tanh() / (1 + (-f[6:]).exp())
                        s[t] = s[t] + layer.skip.weight @ u + layer.skip.bias
                        y = x[t] if n else x[t] + layer.residual.weight @ u + layer.residual.bias
                    else:
                        y = s[t] = x[t] + layer.widen(f)
                    after.append(y)
                x = after
            for t in range(5):
                expected = decoder.out.weight @ decoder.join(s[t]) + decoder.out.bias
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)


@BOTH
def test_words_are_seen_as_far_back_as_the_field_and_no_farther(case):
    decoder, words = case.lively(), sentences(length=8)
    prepared = decoder.prepare(memory())
    before = decoder(prepared, words).features
    words[:, :, 0] = (words[:, :, 0] + 1) % VOCABULARY
    changed = (decoder(prepared, words).features - before).abs().amax((0, 1, 3)) > 1e-12
    assert decoder.field == 4
    assert changed.tolist() == [False, True, True, True, True, False, False, False, False]


def test_the_default_sees_all_words_of_a_caption():
    assert DilatedDecoder(VOCABULARY, MEMORY, width=8).field == 63


def test_the_order_of_the_regions_does_not_matter_and_that_of_the_words_does():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words).features
    torch.testing.assert_close(decoder(decoder.prepare(held.flip(1)), words).features, said, rtol=0, atol=1e-11)
    other = words[:, :, [0, 1, 3, 2]]
    assert not torch.allclose(decoder(decoder.prepare(held), other).features[:, :, 4], said[:, :, 4])


def test_without_attention_there_are_no_maps_and_only_the_mean_region_counts():
    decoder, held, words = CASES[3].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words)
    assert said.maps is None
    pooled = held.mean(1, keepdim=True).expand_as(held)
    torch.testing.assert_close(decoder(decoder.prepare(pooled), words).features, said.features, rtol=0, atol=1e-11)
    looks = CASES[2].lively()
    assert not torch.allclose(*(looks(looks.prepare(each), words).features for each in (held, pooled)))


def test_refuses_attention_that_depends_on_earlier_looks():
    message = "DilatedDecoder looks for all steps at once, CoverageAttention looks by what it saw before"
    with pytest.raises(ValueError, match=message):
        DilatedDecoder(VOCABULARY, MEMORY, attention=CoverageAttention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"dilations": []}, r"dilations must be some of at least 1 each, got \(\)"),
        ({"dilations": [2, 0]}, r"dilations must be some of at least 1 each, got \(2, 0\)"),
        ({"unit": "relu"}, "unit must be gate or bottleneck, got 'relu'"),
        ({"unit": "bottleneck", "width": 7}, "width must be even for a bottleneck of half of it, got 7"),
        ({"attention": None}, "attention or mean must tell of the image, got attention=None and mean=False"),
        ({"maps": "first"}, "maps must be last or all, got 'first'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        DilatedDecoder(VOCABULARY, MEMORY, **options)
