import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries, small
from visattn.attention import (
    CoverageAttention,
    HierarchicalAttention,
    MultiplicativeAttention,
    SmoothedAttention,
)

CASES = [
    MemoryCase(HierarchicalAttention, {"attention": small}, lambda q, d: 2 * (5 * (q + d) + 10), 17_940, ordered=True),
    MemoryCase(
        HierarchicalAttention,
        {"window": (2, 3), "top": 2, "attention": MultiplicativeAttention},
        lambda q, d: 2 * q * d,
        1_310_720,
        ordered=True,
    ),
    MemoryCase(
        HierarchicalAttention,
        {"window": (1, 4), "top": 9, "attention": small},
        lambda q, d: 2 * (5 * (q + d) + 10),
        17_940,
        ordered=True,
    ),
]


def paper(module: HierarchicalAttention, held: Tensor, query: Tensor, mask: Tensor) -> Tensor:
    """Windows, one by one, and the regions in each."""
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(REGIONS):
        if mask[i]:
            row, column = divmod(i, SIZE[1])
            windows.setdefault((row // module.window[0], column // module.window[1]), []).append(i)
    scores = {}
    for window, regions in windows.items():
        mean = held[regions].mean(0)[None, None]
        scores[window] = module.windows.scores(query[None, None], module.windows.prepare(mean)).exp()[0, 0, 0]
    chosen = sorted(scores, key=lambda window: -scores[window])[: module.top]
    each = module.regions.scores(query[None, None], module.regions.prepare(held[None])).exp()[0, 0]
    weights = torch.zeros(REGIONS, dtype=torch.double)
    for window in chosen:
        for i in windows[window]:
            within = each[i] / each[windows[window]].sum()
            weights[i] = scores[window] / sum(scores[other] for other in chosen) * within
    return weights


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_chooses_windows_and_then_regions(case, masked):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, [0, 1, 5, 6, 9]] = not masked  # all of the first window, and a part of others
    prepared = module.prepare(held, mask if masked else None, SIZE)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            right = paper(module, held[b], asked[b, r], mask[b])
            torch.testing.assert_close(weights[b, r], right, rtol=0, atol=1e-12)
            torch.testing.assert_close(found[b, r], right @ held[b], rtol=0, atol=1e-11)


def test_windows_may_change_places_and_regions_may_not_change_windows():
    module, (asked, *_) = CASES[0].lively(), queries()
    held = torch.randn(2, 4, 6, MEMORY, dtype=torch.double)

    def read(held: Tensor) -> Tensor:
        return module(asked, module.prepare(held.flatten(1, 2), None, (4, 6)))[0]

    found = read(held)
    torch.testing.assert_close(read(held.roll((2, 2), (1, 2))), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(read(held.flip(1, 2)), found, rtol=0, atol=1e-12)
    assert not torch.allclose(read(held.roll(1, 2)), found, rtol=0, atol=1e-2)


def test_looks_into_no_more_windows_than_it_may():
    module, (asked, *_) = HierarchicalAttention(QUERY, MEMORY, window=(1, 5), top=1).double(), queries()
    weights, _ = module.attend(asked, module.prepare(memory(), None, SIZE))
    rows = weights.unflatten(2, SIZE).sum(3)
    assert torch.equal(rows.sort(2).values[..., :2], torch.zeros(2, 3, 2, dtype=torch.double))


@pytest.mark.parametrize("window", [(1, 1), (9, 9)], ids=str)
def test_windows_of_one_region_or_of_all_are_the_attention_inside(window):
    module, held, (asked, *_) = HierarchicalAttention(QUERY, MEMORY, window=window).double(), memory(), queries()
    inner = module.windows if window == (1, 1) else module.regions
    right, _ = inner.attend(asked, inner.prepare(held))
    torch.testing.assert_close(module.attend(asked, module.prepare(held, None, SIZE))[0], right, rtol=0, atol=1e-12)


def test_takes_values_of_others():
    module = HierarchicalAttention(QUERY, MEMORY, attention=SmoothedAttention).double()
    held, (asked, *_) = memory(), queries()
    prepared = module.prepare(held, None, SIZE)
    weights, _ = module.attend(asked, prepared)
    values = module.regions.prepare(held, None, SIZE).values
    torch.testing.assert_close(module(asked, prepared)[0], weights @ values, rtol=0, atol=1e-12)


def test_windows_are_made_once():
    module = CASES[0].lively()
    made = []
    module.windows.key.register_forward_hook(lambda *_: made.append(1))
    prepared = module.prepare(memory(), None, SIZE)
    for query in queries(steps=4):
        module(query, prepared)
    assert len(made) == 1


def test_refuses_windows_of_nothing_and_attention_that_is_more_than_a_softmax():
    with pytest.raises(ValueError, match=r"window must be a positive height and width, got \(0, 2\)"):
        HierarchicalAttention(QUERY, MEMORY, window=(0, 2))
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        HierarchicalAttention(QUERY, MEMORY, top=0)
    with pytest.raises(ValueError, match="by the softmax of their scores, got CoverageAttention"):
        HierarchicalAttention(QUERY, MEMORY, attention=CoverageAttention)
