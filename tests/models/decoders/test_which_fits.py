"""Every attention on a memory in every decoder: it works, or is refused when they are put together."""

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.models.decoders.case import REGIONS, SIZE, VOCABULARY, sentences, step_by_step
from visattn import attention as zoo
from visattn.attention import memory as family
from visattn.models import decoders
from visattn.models.decoders import Decoder

MEMORY = 16
SMALL = {"hidden": 16, "embedding": 16, "width": 16, "depth": 2, "maxout": 6, "heads": 4, "dilations": (1, 2)}
KINDS = [getattr(decoders, name) for name in decoders.__all__ if inspect.isclass(getattr(decoders, name))]
LOOKING = [
    kind
    for kind in KINDS
    if issubclass(kind, Decoder) and "attention" in inspect.signature(kind).parameters and kind is not Decoder
]


def made(decoder: type[Decoder], name: str) -> Decoder:
    cls = getattr(zoo, name)
    options = {"size": SIZE} if "size" in inspect.signature(cls).parameters else {}
    known = inspect.signature(decoder).parameters
    small = {option: value for option, value in SMALL.items() if option in known}
    return decoder(VOCABULARY, MEMORY, attention=partial(cls, **options), **small)


@pytest.mark.parametrize("name", family.__all__)
@pytest.mark.parametrize("decoder", LOOKING, ids=lambda decoder: decoder.__name__)
def test_works_or_is_refused(decoder, name):
    sentinel = name == "SentinelAttention"
    alone = getattr(zoo, name)(16, MEMORY, **{"size": SIZE} if name == "LocationAttention" else {})
    carries = sentinel == (decoder.__name__ == "AdaptiveDecoder") and not (decoder.parallel and alone.stateful)
    if not carries:
        with pytest.raises(ValueError, match=rf"{decoder.__name__} .*{name}"):
            made(decoder, name)
        return
    model = made(decoder, name).double().eval()
    prepared = model.prepare(torch.randn(2, REGIONS, MEMORY, dtype=torch.double), None, SIZE)
    words = sentences()
    said, expected = model(prepared, words), step_by_step(model, prepared, words)
    torch.testing.assert_close(said.features, expected.features, rtol=0, atol=1e-10)
    assert model.write(said.features).isfinite().all()
    maps = said.maps if isinstance(said.maps, Tensor) else said.maps.probabilities
    assert maps.shape[:3] == (2, 3, 5)
    assert maps.shape[-1] == REGIONS + sentinel


@pytest.mark.parametrize("decoder", LOOKING, ids=lambda decoder: decoder.__name__)
def test_no_region_is_hidden_from_a_word_for_its_place(decoder):
    if decoder is not decoders.AdaptiveDecoder:  # which asks otherwise
        with pytest.raises(
            ValueError, match=rf"{decoder.__name__} lets every word look .*, MultiHeadAttention is causal"
        ):
            decoder(VOCABULARY, MEMORY, attention=partial(zoo.MultiHeadAttention, causal=True))
