import pytest
import torch

from tests.models.decoders.case import MEMORY, SIZE, VOCABULARY, DecoderCase, memory, sentences
from visattn.attention import CoverageAttention, MultiplicativeAttention
from visattn.models.decoders import FeedForwardDecoder

SMALL = {"context": 3, "embedding": 2, "hidden": 5}


def count(v: int, d: int, c: int = 5, e: int = 200, h: int = 400) -> int:
    """By hand: words twice and what begins; hidden layer; attention; output."""
    return 2 * (v + 1) * e + c * e * h + c * e * d + v * (h + d)


CASES = [
    DecoderCase(FeedForwardDecoder, SMALL, lambda v, d: count(v, d, 3, 2, 5), 5213106),
    DecoderCase(FeedForwardDecoder, {}, count, 14032400),
    DecoderCase(
        FeedForwardDecoder,
        SMALL | {"context": 1, "first": "zeros", "attention": MultiplicativeAttention},
        lambda v, d: count(v, d, 1, 2, 5) - 2 * 2,
        5211034,
    ),
]


def around(held: torch.Tensor) -> list[torch.Tensor]:
    """The mean of the regions up to two rows and columns away."""
    places = [divmod(i, SIZE[1]) for i in range(len(held))]
    near = [[j for j, (y, x) in enumerate(places) if max(abs(y - v), abs(x - w)) <= 2] for v, w in places]
    return [sum(held[j] for j in each) / len(each) for each in near]


def test_is_the_paper_s_equations_word_by_word():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said = decoder(decoder.prepare(held, None, SIZE), words)
    logits = decoder.write(said.features)
    for b in range(2):
        means = around(held[b])
        for r in range(3):
            vectors = [*[decoder.words.first] * 3, *decoder.words.weight[words[b, r]]]
            for t in range(5):
                last = vectors[t : t + 3]
                h = (decoder.hidden.weight @ torch.cat([each[:2] for each in last])).tanh()
                asked = torch.cat([each[2:] for each in last])
                scores = torch.stack([asked @ (decoder.attention.key.weight @ v) for v in held[b]])
                a = scores.exp() / scores.exp().sum()
                z = sum(weight * v for weight, v in zip(a, means, strict=True))
                expected = decoder.out.weight[:, :5] @ h + decoder.out.weight[:, 5:] @ z
                torch.testing.assert_close(said.maps[b, r, t], a, rtol=0, atol=1e-11)
                torch.testing.assert_close(logits[b, r, t], expected, rtol=0, atol=1e-11)


def test_only_the_last_words_are_known():
    decoder, words = CASES[0].lively(), sentences(length=7)
    prepared = decoder.prepare(memory(), None, SIZE)
    before = decoder(prepared, words).features
    words[:, :, 1] = (words[:, :, 1] + 1) % VOCABULARY
    changed = (decoder(prepared, words).features - before).abs().amax((0, 1, 3)) > 1e-12
    assert changed.tolist() == [False, False, True, True, True, False, False, False]


def test_turning_the_map_upside_down_changes_nothing_and_another_size_does():
    decoder, held, words = CASES[0].lively(), memory(), sentences()
    said, turned = (decoder(decoder.prepare(each, None, SIZE), words).features for each in (held, held.flip(1)))
    torch.testing.assert_close(turned, said, rtol=0, atol=1e-11)
    assert not torch.allclose(decoder(decoder.prepare(held, None, SIZE[::-1]), words).features, said)


def test_refuses_attention_that_depends_on_earlier_looks():
    message = "FeedForwardDecoder looks for all steps at once, CoverageAttention looks by what it saw before"
    with pytest.raises(ValueError, match=message):
        FeedForwardDecoder(VOCABULARY, MEMORY, attention=CoverageAttention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"first": "end"}, "first must be begin or zeros, got 'end'"),
    ],
)
def test_refuses_options_it_does_not_have(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        FeedForwardDecoder(VOCABULARY, MEMORY, **options)
