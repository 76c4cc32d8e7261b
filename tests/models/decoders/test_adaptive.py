from functools import partial

import pytest
import torch

from tests.models.decoders.case import MEMORY, VOCABULARY, DecoderCase, memory, sentences
from visattn.attention import AdditiveAttention, CoverageAttention, HardAttention, SentinelAttention
from visattn.models.decoders import AdaptiveDecoder, Decoder, LuongDecoder, ShowAttendAndTell, UpDownDecoder

SMALL = {"hidden": 6, "embedding": 5}


def count(v: int, d: int, h: int = 512, e: int = 512) -> int:
    """By hand: words and what begins, attention of 512 units, image, cell, sentinel, two layers of the output."""
    attention = h * (d + 1) + 3 * 512 * h + 2 * 512
    cell = 4 * h * (2 * e + 1 + h)
    return (v + 1) * e + attention + e * (d + 1) + cell + h * (2 * e + 1 + h) + h * (h + 1) + v * (h + 1)


CASES = [
    DecoderCase(AdaptiveDecoder, SMALL, lambda v, d: count(v, d, 6, 5), 136_440),
    DecoderCase(AdaptiveDecoder, {}, count, 15_760_656),
    DecoderCase(
        AdaptiveDecoder,
        SMALL | {"initial": "mean", "first": "zeros"},
        lambda v, d: count(v, d, 6, 5) - 5 + 12 * (d + 1),
        142_591,
    ),
]


def test_is_the_paper_s_equations_word_by_word():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held), words)
    logits = decoder.write(said.features)
    attention, (cell,), (from_x, from_h) = decoder.attention, decoder.cells, decoder.sentinel
    for b in range(2):
        image = (decoder.image.weight @ held[b].mean(0) + decoder.image.bias).clamp(min=0)
        regions = [(attention.value.weight @ m + attention.value.bias).clamp(min=0) for m in held[b]]
        for r in range(3):
            h, c = torch.zeros(2, 6, dtype=torch.double)
            for t in range(5):
                y = decoder.words.weight[words[b, r, t - 1]] if t else decoder.words.first
                x = torch.cat((y, image))
                gates = cell.known.weight @ x + cell.known.bias + cell.hidden.weight @ h
                gate = (from_x.weight @ x + from_x.bias + from_h.weight @ h).sigmoid()
                i, f, g, o = gates.split(6)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                s = gate * c.tanh()
                inner = [attention.key.weight @ v for v in regions] + [attention.sentinel.weight @ s]
                inner = [(each + attention.key.bias + attention.query.weight @ h).tanh() for each in inner]
                a = torch.stack([attention.score.weight[0] @ each for each in inner]).softmax(0)
                z = sum(weight * each for weight, each in zip(a, [*regions, s], strict=True))
                torch.testing.assert_close(said.maps[b, r, t], a, rtol=0, atol=1e-11)
                tanh = (decoder.join.weight @ (z + h) + decoder.join.bias).tanh()
                right = decoder.out.weight @ tanh + decoder.out.bias
                torch.testing.assert_close(logits[b, r, t], right, rtol=0, atol=1e-11)


def test_says_how_much_each_word_is_read_from_the_image():
    decoder = CASES[0].lively()
    maps = decoder(decoder.prepare(memory()), sentences()).maps
    torch.testing.assert_close(decoder.attention.grounding(maps), 1 - maps[..., -1], rtol=0, atol=1e-12)


def test_the_order_of_the_regions_does_not_matter_and_the_image_beside_a_word_does():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    told = decoder.prepare(held)
    said = decoder(told, words).features
    torch.testing.assert_close(decoder(decoder.prepare(held.flip(1)), words).features, said, rtol=0, atol=1e-12)
    assert not torch.allclose(decoder(told._replace(mean=told.mean + 1), words).features, said)


def test_draws_a_region_or_the_sentinel():
    torch.manual_seed(0)
    decoder = AdaptiveDecoder(
        VOCABULARY, MEMORY, **SMALL, attention=partial(HardAttention, attention=SentinelAttention, expected=0.0)
    )
    maps = decoder(decoder.prepare(memory(dtype=torch.float)), sentences()).maps
    assert torch.equal(maps.weights.sum(3), torch.ones(2, 3, 5))
    assert maps.log_probability().shape == (2, 3, 5)


@pytest.mark.parametrize("decoder", [LuongDecoder, ShowAttendAndTell, UpDownDecoder])
def test_decoders_without_a_sentinel_refuse_attention_that_asks_for_one(decoder):
    message = f"{decoder.__name__} asks with 6 features, SentinelAttention wants to be asked with 12"
    with pytest.raises(ValueError, match=message):
        decoder(VOCABULARY, MEMORY, **SMALL, attention=SentinelAttention)


def test_refuses_attention_without_a_sentinel_and_of_another_width():
    with pytest.raises(ValueError, match="AdaptiveDecoder asks with 12 features, AdditiveAttention wants to be asked"):
        AdaptiveDecoder(VOCABULARY, MEMORY, **SMALL, attention=AdditiveAttention)
    with pytest.raises(ValueError, match="AdaptiveDecoder wants to read 6 features, AdditiveAttention reads 8"):
        AdaptiveDecoder(
            VOCABULARY, MEMORY, **SMALL, attention=lambda query, memory: AdditiveAttention(2 * query, memory)
        )


def test_a_decoder_that_looks_for_all_steps_at_once_refuses_attention_with_a_state():
    class Parallel(Decoder):
        parallel = True

    decoder = Parallel(VOCABULARY, MEMORY)
    plain = AdditiveAttention(6, MEMORY)
    assert decoder.carried(plain, 6) is plain
    with pytest.raises(
        ValueError, match="Parallel looks for all steps at once, CoverageAttention looks by what it saw before"
    ):
        decoder.carried(CoverageAttention(6, MEMORY), 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"initial": "first"}, "initial must be mean or last or zeros, got 'first'"),
        ({"first": "end"}, "first must be begin or zeros, got 'end'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        AdaptiveDecoder(VOCABULARY, MEMORY, **options)
