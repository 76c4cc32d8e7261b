import math

import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries
from visattn.attention import VariableAttention

CASES = [
    MemoryCase(VariableAttention, {"kinds": 4, "radius": 1}, lambda q, d: 4 * d + 5 * 9, 5165, ordered=True),
    MemoryCase(VariableAttention, {"kinds": 4, "radius": 2, "axes": 1}, lambda q, d: 4 * d + 5 * 5, 5145, ordered=True),
]


def paper(module: VariableAttention, held: Tensor, mask: Tensor) -> Tensor:
    """Equation 3 of the paper, with kinds and places found one by one."""
    weights = torch.zeros(REGIONS, dtype=torch.double)
    for i in range(REGIONS):
        kind = max(range(4), key=lambda c: float(module.kind.weight[c] @ held[i]))
        reach = module.radius
        if module.axes == 2:
            row, column = i // SIZE[1] - SIZE[0] // 2, i % SIZE[1] - SIZE[1] // 2
            row, column = (max(-reach, min(reach, each)) for each in (row, column))
            offset = (row + reach) * (2 * reach + 1) + column + reach
        else:
            offset = max(-reach, min(reach, i - int(mask.sum()) // 2)) + reach
        if mask[i]:
            weights[i] = math.exp(module.table[kind, offset] + module.shift[offset])
    return weights / weights.sum()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_weighs_by_kind_and_place(case, masked):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, REGIONS - 6 :] = not masked
    prepared = module.prepare(held, mask if masked else None, SIZE)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        right = paper(module, held[b], mask[b])
        torch.testing.assert_close(weights[b], right.expand(3, -1), rtol=0, atol=1e-12)
        torch.testing.assert_close(found[b], (right @ held[b]).expand(3, -1), rtol=0, atol=1e-12)


def test_who_asks_changes_nothing_and_where_the_regions_lie_does():
    module, held, (first, second) = CASES[0].lively(), memory(), queries()
    prepared = module.prepare(held, None, SIZE)
    assert torch.equal(module(first, prepared)[0], module(second, prepared)[0])
    turned = module.prepare(held.flip(1), None, SIZE)
    assert not torch.allclose(module(first, turned)[0], module(first, prepared)[0], rtol=0, atol=1e-2)


def test_what_is_more_of_a_kind_is_no_more_than_of_it():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    weights, _ = module.attend(asked, module.prepare(held, None, SIZE))
    more, _ = module.attend(asked, module.prepare(3 * held, None, SIZE))
    torch.testing.assert_close(more, weights, rtol=0, atol=1e-12)


def test_fresh_it_reads_the_mean():
    module, held, (asked, *_) = VariableAttention(QUERY, MEMORY).double(), memory(), queries()
    found, _ = module(asked, module.prepare(held, None, SIZE))
    torch.testing.assert_close(found, held.mean(1, keepdim=True).expand(-1, 3, -1), rtol=0, atol=1e-12)


def test_kinds_learn_as_if_they_had_been_a_softmax():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    still, _ = module.attend(asked, module.prepare(held, None, SIZE))
    module.train()
    scores = module.prepare(held, None, SIZE).keys
    torch.testing.assert_close(module.attend(asked, module.prepare(held, None, SIZE))[0], still, rtol=0, atol=1e-12)
    (ours,) = torch.autograd.grad(scores.sum(), module.kind.weight)
    offsets = module._offsets(held, None, SIZE)[0]
    soft = (held @ module.kind.weight.T).softmax(2)
    (right,) = torch.autograd.grad((soft * module.table[:, offsets].T).sum(), module.kind.weight)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", ["kinds", "radius"])
def test_refuses_less_than_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        VariableAttention(QUERY, MEMORY, **{option: 0})


def test_refuses_other_axes(unchecked):
    with pytest.raises(ValueError, match="axes must be 1 or 2, got 3"):
        VariableAttention(QUERY, MEMORY, axes=3)
