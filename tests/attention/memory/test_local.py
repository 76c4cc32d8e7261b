import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries, steps
from visattn.attention import (
    AdditiveAttention,
    CosineAttention,
    CoverageAttention,
    LocalAttention,
    LocationAttention,
    MultiHeadAttention,
    SmoothedAttention,
)

CASES = [
    MemoryCase(
        LocalAttention,
        {"radius": 1, "width": 5},
        lambda q, d: q * d + 5 * q + 10,
        657_930,
        sums_to_one=False,
        ordered=True,
    ),
    MemoryCase(
        LocalAttention,
        {"radius": 2, "width": 5, "axes": 1, "attention": AdditiveAttention},
        lambda q, d: 512 * (q + d) + 2 * 512 + 5 * q + 5,
        921_093,
        sums_to_one=False,
        ordered=True,
    ),
    MemoryCase(
        LocalAttention,
        {"radius": 2, "alignment": "monotonic"},
        lambda q, d: q * d,
        655_360,
        sums_to_one=False,
        ordered=True,
    ),
    MemoryCase(
        LocalAttention,
        {"radius": 2, "alignment": "monotonic", "axes": 1},
        lambda q, d: q * d,
        655_360,
        sums_to_one=False,
        ordered=True,
    ),
]


def places(axes: int) -> list[tuple[int, ...]]:
    """Where the regions lie."""
    return [(i,) for i in range(REGIONS)] if axes == 1 else [(i, j) for i in range(SIZE[0]) for j in range(SIZE[1])]


def paper(module: LocalAttention, held: Tensor, asked: list[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """Section 3.2 in loops, for all steps of one query."""
    centre: list[float] = [(side - 1) / 2 for side in SIZE] if module.axes == 2 else [0.0]
    looks, count = [], REGIONS if mask is None else int(mask.sum())
    prepared = module.attention.prepare(held[None])
    for query in asked:
        if module.alignment == "predictive":
            hidden = torch.tanh(module.hidden.weight @ query)
            share = [1 / (1 + math.exp(-float(row @ hidden))) for row in module.centre.weight]
            ends = [side - 1 for side in SIZE] if module.axes == 2 else [count - 1]
            centre = [end * part for end, part in zip(ends, share, strict=True)]
        scores = module.attention.scores(query[None, None], prepared)[0, 0]
        window = [
            i
            for i, place in enumerate(places(module.axes))
            if all(abs(x - round(p)) <= module.radius for x, p in zip(place, centre, strict=True))
            and (mask is None or mask[i])
        ]
        total = sum(math.exp(scores[i]) for i in window)
        weights = torch.zeros(REGIONS, dtype=torch.double)
        for i in window:
            apart = sum((x - p) ** 2 for x, p in zip(places(module.axes)[i], centre, strict=True))
            weights[i] = math.exp(scores[i]) / total * math.exp(-apart / (2 * (module.radius / 2) ** 2))
        looks.append(weights)
        if module.axes == 1:
            centre = [centre[0] + 1]
        elif weights.any():
            spots = torch.tensor(places(2), dtype=torch.double)
            centre = ((weights[:, None] * spots).sum(0) / weights.sum()).tolist()
    return looks


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_looks_where_the_paper_s_loops_look(case, masked):
    module, held, asked = case.lively(), memory(), queries(steps=4)
    mask = None
    if masked:
        mask = torch.ones(2, REGIONS, dtype=torch.bool)
        mask[:, REGIONS - 4 :] = False
    looked, _ = steps(module, asked, module.prepare(held, mask, SIZE))
    for b in range(2):
        for r in range(3):
            expected = paper(module, held[b], [each[b, r] for each in asked], None if mask is None else mask[b])
            for ours, right in zip(looked, expected, strict=True):
                torch.testing.assert_close(ours[b, r], right, rtol=0, atol=1e-12)


def test_a_window_over_everything_with_a_wide_bell_is_the_attention_inside():
    module, held, (asked, *_) = LocalAttention(QUERY, MEMORY, radius=10**7).double(), memory(), queries()
    prepared = module.prepare(held, None, SIZE)
    torch.testing.assert_close(module(asked, prepared)[0], module.attention(asked, prepared)[0], rtol=0, atol=1e-9)


def test_cells_beyond_the_border_are_left_out():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    torch.nn.init.zeros_(module.attention.key.weight)  # so that all in the window score alike
    torch.nn.init.zeros_(module.hidden.weight)
    weights, _ = module.attend(asked, module.prepare(held, None, SIZE))
    middle = weights[0, 0].view(SIZE)
    assert (middle > 0).sum() == 9  # p is the middle, (1, 2)
    torch.testing.assert_close(middle[1, 2], torch.tensor(1 / 9, dtype=torch.double))
    corner, _ = LocalAttention.attend(
        module, asked, module.prepare(held, None, SIZE), torch.zeros(2, 3, 2, dtype=torch.double)
    )
    assert (corner[0, 0] > 0).sum() == 4
    torch.testing.assert_close(corner[0, 0, 0], torch.tensor(1 / 4, dtype=torch.double))


def test_a_place_learns_from_the_bell_and_moves_with_a_monotonic_look():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    weights, _ = module.attend(asked, module.prepare(held, None, SIZE))
    assert torch.autograd.grad((weights * torch.randn_like(weights)).sum(), module.centre.weight)[0].abs().min() > 0
    module = CASES[2].lively()
    prepared = module.prepare(held, None, SIZE)
    looks, state = module.attend(asked, prepared)
    places_ = torch.tensor(places(2), dtype=torch.double)
    torch.testing.assert_close(state, looks @ places_ / looks.sum(2, keepdim=True), rtol=0, atol=1e-12)
    assert (state - torch.tensor([1.0, 2.0])).abs().max() > 0.1


def test_moves_with_the_map_and_turned_around_it_does_not_read_the_same():
    module, (asked, *_) = LocalAttention(QUERY, MEMORY, radius=1, alignment="monotonic").double(), queries(1)
    held = torch.randn(1, 7, 9, MEMORY, dtype=torch.double)
    prepared = [module.prepare(each.flatten(1, 2), None, (7, 9)) for each in (held, held.roll((1, -2), (1, 2)))]
    state = torch.tensor([3.2, 4.4]).double().expand(1, 3, 2)
    ours = module.attend(asked, prepared[0], state)[0].view(1, 3, 7, 9)
    moved = module.attend(asked, prepared[1], state + torch.tensor([1.0, -2.0]))[0].view(1, 3, 7, 9)
    torch.testing.assert_close(moved, ours.roll((1, -2), (2, 3)), rtol=0, atol=1e-12)
    turned = module.attend(asked, module.prepare(held.flip(1, 2).flatten(1, 2), None, (7, 9)), state)[0]
    assert not torch.allclose(turned.view(1, 3, 7, 9), ours.flip(2, 3), rtol=0, atol=1e-2)


@pytest.mark.parametrize("inner", [CosineAttention, partial(LocationAttention, size=SIZE), SmoothedAttention])
def test_takes_the_scores_and_values_of_others(inner):
    module = LocalAttention(QUERY, MEMORY, radius=1, attention=inner).double()
    held, (asked, *_) = memory(), queries()
    prepared = module.prepare(held, None, SIZE)
    weights, _ = module.attend(asked, prepared)
    read = weights @ module.attention.prepare(held, None, SIZE).values
    torch.testing.assert_close(module(asked, prepared)[0], read, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="size must have as many"):
        module.prepare(held, None, (2, 3))


def test_beyond_the_last_word_there_is_nothing():
    module, held = CASES[3].lively(), memory()
    looked, found = steps(module, queries(steps=REGIONS + 5), module.prepare(held))
    assert looked[REGIONS + 1].any()
    assert not looked[REGIONS + 2].any()
    assert not found[-1].any()


@pytest.mark.parametrize("inner", [CoverageAttention, MultiHeadAttention])
def test_refuses_attention_that_is_more_than_a_softmax_of_scores(inner):
    with pytest.raises(
        ValueError, match=f"attention must weigh regions by the softmax of their scores, got {inner.__name__}"
    ):
        LocalAttention(8, MEMORY, attention=inner)


@pytest.mark.parametrize("option", ["radius", "width"])
def test_refuses_less_than_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        LocalAttention(QUERY, MEMORY, **{option: 0})


def test_refuses_what_it_does_not_know(unchecked):
    with pytest.raises(ValueError, match="alignment must be predictive or monotonic, got 'hard'"):
        LocalAttention(QUERY, MEMORY, alignment="hard")
    with pytest.raises(ValueError, match="axes must be 1 or 2, got 3"):
        LocalAttention(QUERY, MEMORY, axes=3)
