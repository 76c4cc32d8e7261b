import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries
from tests.attention.pairwise.test_area import rectangles
from visattn.attention import AreaMemoryAttention, MultiplicativeAttention

CASES = [
    MemoryCase(AreaMemoryAttention, {"width": 4}, lambda q, d: 4 * (q + d), 7168, sums_to_one=False, ordered=True),
    MemoryCase(
        AreaMemoryAttention,
        {"width": 4, "area": (2, 1), "key": "features"},
        lambda q, d: 4 * (q + d) + (2 + 1) * 2 + 4 * (4 + 4 + 2 + 2) + 4 + 4 * 4 + 4,
        7246,
        sums_to_one=False,
        ordered=True,
    ),
]


def paper(module: AreaMemoryAttention, held: Tensor, query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3 of the paper in loops over rectangles of what is there: what each region adds, and what is read."""
    keys, values, parts = [], [], []
    for rows, columns in rectangles(*SIZE, module.areas.area):
        part = torch.zeros(SIZE, dtype=torch.bool)
        part[rows, columns] = True
        part = part.flatten() & mask
        if part.any():
            items = held[part] @ module.key.weight.T
            key = items.mean(0)
            if module.areas.hidden is not None:
                deviation = ((items**2).mean(0) - key**2).abs().add(1e-6).sqrt()
                size = (
                    module.areas.heights[rows.stop - rows.start - 1],
                    module.areas.widths[columns.stop - columns.start - 1],
                )
                key = module.areas.out(module.areas.hidden(torch.cat((key, deviation, *size))).relu())
            keys.append(key)
            values.append(held[part].sum(0))
            parts.append(part.double())
    weights = (torch.stack(keys) @ module.query.weight @ query / keys[0].numel() ** 0.5).softmax(0)
    return weights @ torch.stack(parts), weights @ torch.stack(values)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_paper_in_loops(case, masked):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, [2, 6, 7, 8]] = not masked
    prepared = module.prepare(held, mask if masked else None, SIZE)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            expected, read = paper(module, held[b], asked[b, r], mask[b])
            torch.testing.assert_close(weights[b, r], expected, rtol=0, atol=1e-11)
            torch.testing.assert_close(found[b, r], read, rtol=0, atol=1e-10)


def test_of_single_regions_is_multiplicative_attention():
    module, held, (asked, *_) = AreaMemoryAttention(QUERY, MEMORY, width=4, area=(1, 1)).double(), memory(), queries()
    plain = MultiplicativeAttention(QUERY, MEMORY).double()
    with torch.no_grad():
        plain.key.weight.copy_(module.query.weight.T @ module.key.weight / 2)
    ours, theirs = module(asked, module.prepare(held, None, SIZE)), plain(asked, plain.prepare(held))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_turned_around_it_reads_the_same_and_wrapped_otherwise_it_does_not():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    found, _ = module(asked, module.prepare(held, None, SIZE))
    torch.testing.assert_close(module(asked, module.prepare(held.flip(1), None, SIZE))[0], found, rtol=0, atol=1e-11)
    assert not torch.allclose(module(asked, module.prepare(held, None, (5, 3)))[0], found, rtol=0, atol=1e-2)


def test_refuses_a_width_of_nothing():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        AreaMemoryAttention(QUERY, MEMORY, width=0)
