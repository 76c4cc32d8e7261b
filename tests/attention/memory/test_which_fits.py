"""Every attention on a memory within every other that takes one: it works, or is refused when they are put together."""

import inspect
from functools import partial

import pytest
import torch

from tests.attention.memory.case import MEMORY, REGIONS, SIZE, memory, steps
from visattn.attention import memory as family
from visattn.attention.memory.core import MemoryAttention

WIDTH = 16
KINDS = [getattr(family, name) for name in family.__all__]
AROUND = [kind for kind in KINDS if "attention" in inspect.signature(kind).parameters]
SCORING = {"AdditiveAttention", "CosineAttention", "MultiplicativeAttention", "SmoothedAttention", "VariableAttention"}


def fits(around: type[MemoryAttention], inner: type[MemoryAttention]) -> bool:
    if around.__name__ in ("AttentionOnAttention", "HardAttention"):
        return inner.__name__ != "HardAttention"
    return inner.__name__ in SCORING | ({"LocationAttention"} if around.__name__ == "LocalAttention" else set())


@pytest.mark.parametrize("inner", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("around", AROUND, ids=lambda kind: kind.__name__)
def test_works_or_is_refused(around, inner):
    options = {"size": SIZE} if inner.__name__ == "LocationAttention" else {}
    make = partial(around, attention=partial(inner, **options))
    if not fits(around, inner):
        with pytest.raises(ValueError, match=f"attention must .*, got {inner.__name__}"):
            make(WIDTH, MEMORY)
        return
    module = make(WIDTH, MEMORY).double().eval()
    asked = [torch.randn(2, 3, module.asks, dtype=torch.double) for _ in range(2)]
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, [0, 1, 5, 6, 9]] = False
    for there in (None, mask):
        _, found = steps(module, asked, module.prepare(memory(), there, SIZE))
        for each in found:
            assert each.shape == (2, 3, module.features)
            assert each.isfinite().all()
            assert each.any()


@pytest.mark.parametrize("inner", sorted(SCORING))
@pytest.mark.parametrize("around", ["ConvolutionalSummary", "LocalAttention"])
def test_works_on_words(around, inner):
    make = partial(getattr(family, around), attention=getattr(family, inner), axes=1)
    module = make(WIDTH, MEMORY).double().eval()
    asked = [torch.randn(2, 3, WIDTH, dtype=torch.double)]
    size = (1, REGIONS) if module.needs_size else None
    assert (size is None) == (inner != "VariableAttention")
    (read,) = steps(module, asked, module.prepare(memory(), None, size))[1]
    assert read.shape == (2, 3, module.features)


def test_what_is_said_of_the_attention_within_is_said_of_what_stands_around_it():
    causal = partial(family.MultiHeadAttention, causal=True)
    placed = partial(family.LocationAttention, size=SIZE)
    for around in (family.AttentionOnAttention, family.HardAttention):
        assert around(WIDTH, MEMORY, attention=causal).causal
        assert not around(WIDTH, MEMORY, attention=placed).causal
        assert around(WIDTH, MEMORY, attention=placed).size == SIZE
    assert family.LocalAttention(WIDTH, MEMORY, attention=placed).size == SIZE
