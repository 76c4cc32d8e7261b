import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.models.decoders.case import MEMORY, REGIONS, SIZE, VOCABULARY, DecoderCase, memory, sentences
from visattn.attention import AdditiveAttention, LocationSensitiveAttention, MultiHeadAttention
from visattn.models.decoders import TransformerDecoder

SMALL = {
    "width": 6,
    "heads": 2,
    "depth": 2,
    "expansion": 3,
    "attention": partial(MultiHeadAttention, heads=2),
}


def count(v: int, d: int, w: int = 512, depth: int = 6, times: int = 4) -> int:
    """By hand: words and what begins; self-attention, attention, perceptron and three norms; last norm; biases."""
    layer = 4 * w * w + 2 * w * w + 2 * w * d + 2 * times * w * w + (times + 1) * w + 3 * 2 * w
    return (v + 1) * w + depth * layer + 2 * w + v


CASES = [
    DecoderCase(TransformerDecoder, SMALL, lambda v, d: count(v, d, 6, 2, 3), 83290),
    DecoderCase(TransformerDecoder, {}, count, 30331152),
    DecoderCase(
        TransformerDecoder,
        SMALL | {"norm": "post", "tied": False, "scaled": True, "first": "zeros"},
        lambda v, d: count(v, d, 6, 2, 3) - 6 - 2 * 6 + 6 * v,
        143272,
    ),
    DecoderCase(
        TransformerDecoder,
        SMALL | {"attention": partial(AdditiveAttention, width=4), "maps": "all", "placed": False},
        lambda v, d: count(v, d, 6, 2, 3) + 2 * (-2 * 6 * 6 - 2 * 6 * d + 4 * (6 + d + 2) + 6 * (d + 1)),
        81174,
    ),
]


def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return layer.weight * centred / ((centred * centred).mean() + layer.eps).sqrt() + layer.bias


def sines(place: int, features: int) -> Tensor:
    angles = [place / 10000 ** (2 * (i // 2) / features) for i in range(features)]
    return torch.tensor([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)], dtype=torch.double)


def looked(attention: MultiHeadAttention, query: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """What one query reads with all heads, and where."""
    read, maps = [], []
    size = len(query) // attention.heads
    for n in range(attention.heads):
        part = slice(n * size, (n + 1) * size)
        q = attention.query.weight[part] @ query
        scores = torch.stack([q @ (attention.key.weight[part] @ v) / size**0.5 for v in regions])
        maps.append(scores.exp() / scores.exp().sum())
        read.append(sum(a * (attention.value.weight[part] @ v) for a, v in zip(maps[-1], regions, strict=True)))
    return attention.out.weight @ torch.cat(read), torch.stack(maps)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["pre", "post"])
def test_is_the_paper_s_equations_word_by_word(case):
    decoder, held, words = case.lively(), memory(), sentences()
    pre = case.options.get("norm") != "post"
    said = decoder(decoder.prepare(held, None, SIZE), words)
    logits = decoder.write(said.features)
    width = 6
    place = [torch.cat((sines(i // SIZE[1], MEMORY // 2), sines(i % SIZE[1], MEMORY // 2))) for i in range(REGIONS)]
    for b in range(2):
        regions = held[b] + torch.stack(place)
        for r in range(3):
            first = torch.zeros(width, dtype=torch.double) if decoder.words.first is None else decoder.words.first
            vectors = [first, *decoder.words.weight[words[b, r]]]
            factor = (1.0, width**-0.5) if pre else (width**0.5, 1.0)
            x = [factor[0] * vector + factor[1] * sines(t, width) for t, vector in enumerate(vectors)]
            for layer in decoder.layers:
                norms = layer.norms
                if pre:
                    given = torch.stack([norm(each, norms[0]) for each in x])
                    x = [x[t] + looked(layer.own, given[t], given[: t + 1])[0] for t in range(5)]
                    found = [looked(layer.attention, norm(each, norms[1]), regions) for each in x]
                    x = [each + read for each, (read, _) in zip(x, found, strict=True)]
                    x = [each + layer.perceptron(norm(each, norms[2])) for each in x]
                else:
                    given = torch.stack(x)
                    x = [norm(x[t] + looked(layer.own, given[t], given[: t + 1])[0], norms[0]) for t in range(5)]
                    found = [looked(layer.attention, each, regions) for each in x]
                    x = [norm(each + read, norms[1]) for each, (read, _) in zip(x, found, strict=True)]
                    x = [norm(each + layer.perceptron(each), norms[2]) for each in x]
            for t in range(5):
                last = norm(x[t], decoder.norm) if pre else x[t]
                expected = decoder.out.weight @ last + decoder.out.bias
                torch.testing.assert_close(said.maps[b, r, t], found[t][1], rtol=0, atol=1e-11)
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)


def test_the_order_of_the_regions_matters_iff_they_are_told_their_places():
    held, words = memory(), sentences()
    for case, placed in ((CASES[0], True), (CASES[3], False)):
        decoder = case.lively()
        said, other = (decoder(decoder.prepare(each, None, SIZE), words).features for each in (held, held.flip(1)))
        assert torch.allclose(said, other, rtol=0, atol=1e-11) != placed


def test_rows_and_columns_are_told_apart():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    features = [decoder(decoder.prepare(held, None, size), words).features for size in (SIZE, SIZE[::-1], None)]
    assert not torch.allclose(features[0], features[1])
    assert not torch.allclose(features[0], features[2])


def test_the_order_of_earlier_words_matters():
    decoder, words = CASES[0].lively(), sentences()
    prepared = decoder.prepare(memory(), None, SIZE)
    other = words[:, :, [1, 0, 2, 3]]
    assert not torch.allclose(decoder(prepared, words).features[:, :, 4], decoder(prepared, other).features[:, :, 4])


def test_all_layers_say_where_they_looked_if_asked_to():
    every, words = CASES[3].lively(), sentences()
    prepared = every.prepare(memory())
    maps = every(prepared, words).maps
    assert maps.shape == (2, 3, 5, 2, REGIONS)
    every.maps, every.watched = "last", range(1, 2)
    assert torch.equal(every(prepared, words).maps, maps[:, :, :, 1])


def test_what_was_made_of_earlier_words_is_kept():
    decoder, words = CASES[0].lively(), sentences()
    prepared = decoder.prepare(memory(), None, SIZE)
    state = decoder.begin(prepared, 3)
    seen = []
    decoder.layers[0].own.key.register_forward_hook(lambda module, given, _: seen.append(given[0].shape[1]))
    for t in range(4):
        _, _, state = decoder.step(words[:, :, t - 1] if t else None, prepared, state)
    assert seen == [1, 1, 1, 1]
    assert state[0][0].shape == (2, 3, 4, 6)


@pytest.mark.parametrize("scaled", [False, True])
def test_words_that_are_said_by_their_vectors_expect_themselves_at_first_iff_scaled(scaled):
    decoder = TransformerDecoder(2000, MEMORY, width=256, depth=2, scaled=scaled).eval()
    assert decoder.out.weight is decoder.words.weight
    words = torch.randint(2000, (4, 5, 10))
    logits = decoder.write(decoder(decoder.prepare(memory(4, torch.float), None, SIZE), words[..., :-1]).features)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), words.flatten())
    guess = math.log(2000)
    assert (loss > guess + 2) == scaled
    assert (loss < guess + 0.6) != scaled


def test_refuses_attention_that_depends_on_earlier_looks():
    message = "TransformerDecoder looks for all steps at once, LocationSensitiveAttention looks by what it saw before"
    with pytest.raises(ValueError, match=message):
        TransformerDecoder(VOCABULARY, MEMORY, attention=LocationSensitiveAttention)


def test_refuses_a_map_of_another_size():
    with pytest.raises(ValueError, match=r"size must have as many positions as the memory, 15, got \(3, 4\)"):
        CASES[0].make().prepare(memory(dtype=torch.float), None, (3, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"expansion": 0}, "expansion must be at least 1, got 0"),
        ({"width": 7, "heads": 7}, "width must be even, got 7"),
        ({"heads": 3, "width": 8}, "heads must divide width=8, got 3"),
        ({"norm": "none"}, "norm must be pre or post, got 'none'"),
        ({"maps": "first"}, "maps must be last or all, got 'first'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        TransformerDecoder(VOCABULARY, MEMORY, **options)


def test_refuses_places_of_regions_whose_features_cannot_hold_them():
    with pytest.raises(ValueError, match="memory must be divisible by 4 to be told its places, got 6"):
        TransformerDecoder(VOCABULARY, 6)
