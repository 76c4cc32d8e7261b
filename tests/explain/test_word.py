from functools import partial

import pytest
import torch

from visattn import (
    AdditiveAttention,
    AreaMemoryAttention,
    CoverageAttention,
    HardAttention,
    MultiHeadAttention,
)
from visattn.explain import FUNCTION, Word, explain, looking
from visattn.models import Captioner
from visattn.models.decoders import (
    AdaptiveDecoder,
    ConvolutionalDecoder,
    LuongDecoder,
    PooledDecoder,
    ShowAttendAndTell,
    TransformerDecoder,
    UpDownDecoder,
)

SMALL = {"hidden": 8, "embedding": 8}
DECODERS = {
    "additive": partial(ShowAttendAndTell, attention=partial(AdditiveAttention, width=8), **SMALL),
    "hard": partial(ShowAttendAndTell, attention=HardAttention, **SMALL),
    "coverage": partial(ShowAttendAndTell, attention=CoverageAttention, **SMALL),
    "area": partial(ShowAttendAndTell, attention=AreaMemoryAttention, **SMALL),
    "heads": partial(ShowAttendAndTell, attention=partial(MultiHeadAttention, heads=2, slots=2), **SMALL),
    "input feeding": partial(LuongDecoder, **SMALL),
    "two cells": partial(UpDownDecoder, **SMALL),
    "sentinel": partial(AdaptiveDecoder, **SMALL),
    "layers": partial(TransformerDecoder, width=8, heads=2, depth=2, attention=partial(MultiHeadAttention, heads=2)),
    "convolutions": partial(ConvolutionalDecoder, embedding=8, depth=2),
}
WORDS = torch.tensor([3, 4, 2, 0])


def captioner(decoder) -> Captioner:
    torch.manual_seed(0)
    model = Captioner(6, backbone="resnet10t", decoder=decoder, width=8).eval()
    for parameter in model.decoder.parameters():  # so that what is read counts
        torch.nn.init.normal_(parameter, std=0.7)
    return model.requires_grad_(False)


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
def test_a_word_is_said_as_the_captioner_says_it_and_weights_are_read_at_it_alone(decoder, place):
    model, image = captioner(decoder), torch.randn(3, 64, 96)
    subject = Word(model, image, WORDS, place)
    expected = model(image[None], WORDS[:-1].view(1, 1, -1))[0, 0, place].softmax(0)
    torch.testing.assert_close(subject.output, expected)
    everything = torch.ones(1, *subject.size, dtype=torch.bool)
    torch.testing.assert_close(subject.without(everything, image)[0], expected)
    assert subject.probability == pytest.approx(expected[WORDS[place]].item(), abs=1e-6)
    assert subject.size == (2, 3)
    maps = model.told(image[None], WORDS[:-1].view(1, 1, -1)).maps
    maps = getattr(maps, "weights", maps)[0, 0, place]
    torch.testing.assert_close(subject.map.flatten(), maps.reshape(-1, maps.shape[-1])[:, :6].mean(0))
    said = subject.given(torch.stack((subject.weights, subject.weights.flip(1))))
    torch.testing.assert_close(said[0], expected, rtol=1e-4, atol=1e-6)
    assert (said[1] - said[0]).abs().max() > 1e-6
    assert (subject.gradient() > 0).any()


def test_a_region_without_which_nothing_changes_has_no_gradient():
    model, image = captioner(DECODERS["additive"]), torch.randn(3, 64, 96)
    subject = Word(model, image, WORDS, 1)
    alone = torch.zeros(1, 2, 3, dtype=torch.bool)
    alone[0, 1, 2] = True
    left = subject.without(alone, image)[0]
    memory = subject.memory[:, 5:]
    decoder = model.decoder
    said = decoder(decoder.prepare(memory), WORDS[:1].view(1, 1, 1))
    torch.testing.assert_close(left, decoder.write(said.features)[0, 0, 1].softmax(0))


def test_all_measures_are_there_and_a_memory_does_not_fade():
    subject = Word(captioner(DECODERS["additive"]), torch.randn(3, 64, 96), WORDS, 1)
    found = explain(subject, by="regions", steps=6, draws=2, shuffles=5)
    assert list(found.findings) == [
        "deletion",
        "insertion",
        "gradient",
        "leave-one-out",
        "permutation",
        "uniform",
        "adversary",
    ]
    assert set(found.curves["deletion"]) == {"map", "shuffled"}
    assert found.curves["deletion"]["map"].scores[0].item() == pytest.approx(subject.probability, abs=1e-6)
    assert "uniform" in explain(subject, ["insertion"], by="pixels", steps=2, draws=1).curves["insertion"]
    assert found.adversary.moved <= 0.01


def test_what_looks_at_words_or_within_another_is_not_asked():
    assert list(looking(captioner(DECODERS["layers"]).decoder)) == ["layers.0.attention", "layers.1.attention"]
    assert list(looking(captioner(DECODERS["hard"]).decoder)) == ["attention"]
    assert {"a", "of", "with"} <= FUNCTION
    assert not {"dog", "two", "red", "runs"} & FUNCTION


def test_each_layer_can_be_asked():
    model, image = captioner(DECODERS["layers"]), torch.randn(3, 64, 96)
    first, last = (Word(model, image, WORDS, 1, name=f"layers.{n}.attention") for n in (0, 1))
    assert torch.equal(Word(model, image, WORDS, 1).weights, last.weights)
    assert not torch.equal(first.weights, last.weights)


def test_bad_input_is_refused():
    model, image = captioner(DECODERS["additive"]), torch.randn(3, 64, 96)
    for place in (-1, 4):
        with pytest.raises(ValueError, match=f"place must be that of one of 4 words, got {place}"):
            Word(model, image, WORDS, place)
    with pytest.raises(ValueError, match=r"name must be that of an attention \(attention\), got 'layers'"):
        Word(model, image, WORDS, 0, name="layers")
    with pytest.raises(ValueError, match="captioner must look at regions, PooledDecoder looks nowhere"):
        Word(captioner(partial(PooledDecoder, **SMALL)), image, WORDS, 0)


def test_an_unknown_gradient_is_refused(unchecked):
    with pytest.raises(ValueError, match="kind must be norm or product, got 'sum'"):
        Word(captioner(DECODERS["additive"]), torch.randn(3, 64, 96), WORDS, 0).gradient("sum")
