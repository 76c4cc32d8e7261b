import math

import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries, steps
from visattn.attention import AdditiveAttention, LocationSensitiveAttention

SMALL = {"width": 5, "filters": 2, "kernel_size": 3}


def count(q: int, d: int, seen: int) -> int:
    """Parameters of a perceptron of 5 units and two filters that see so many weights."""
    return 5 * (q + d) + 2 * 5 + 2 * 5 + 2 * seen


CASES = [
    MemoryCase(LocationSensitiveAttention, SMALL, lambda q, d: count(q, d, 9), 8998, ordered=True),
    MemoryCase(
        LocationSensitiveAttention,
        {**SMALL, "cumulative": True, "smooth": True, "sharpness": 2.0},
        lambda q, d: count(q, d, 18),
        9016,
        ordered=True,
    ),
    MemoryCase(
        LocationSensitiveAttention, {**SMALL, "axes": 1, "top": 4}, lambda q, d: count(q, d, 3), 8986, ordered=True
    ),
    MemoryCase(
        LocationSensitiveAttention,
        {**SMALL, "axes": 1, "cumulative": True, "window": 3},
        lambda q, d: count(q, d, 6),
        8992,
        ordered=True,
    ),
    MemoryCase(
        LocationSensitiveAttention, {**SMALL, "window": 1, "top": 3}, lambda q, d: count(q, d, 9), 8998, ordered=True
    ),
]


def median(looks: list[float]) -> int:
    """Where half of the weight is behind."""
    return next(i for i in range(len(looks)) if sum(looks[: i + 1]) >= sum(looks) / 2)


def paper(module: LocationSensitiveAttention, held: Tensor, asked: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Equations 5 to 11 in loops, for all steps of one query, on a map or, of height 1, on words."""
    height, width = SIZE if module.axes == 2 else (1, REGIONS)
    looks: list[Tensor] = []
    filters = module.filters.weight if module.axes == 2 else module.filters.weight[:, :, None]
    reach = filters.shape[2] // 2, filters.shape[3] // 2
    for query in asked:
        before = [looks[-1] if looks else torch.zeros(REGIONS, dtype=torch.double)]
        if module.cumulative:
            before.append(sum(looks, torch.zeros(REGIONS, dtype=torch.double)))
        scores = []
        for i in range(height):
            for j in range(width):
                features = torch.zeros(len(filters), dtype=torch.double)
                for k, kernel in enumerate(filters):
                    for channel, look in enumerate(before):
                        for y in range(-reach[0], reach[0] + 1):
                            for x in range(-reach[1], reach[1] + 1):
                                if 0 <= i + y < height and 0 <= j + x < width:
                                    weight = kernel[channel, y + reach[0], x + reach[1]]
                                    features[k] += weight * look[(i + y) * width + j + x]
                inner = module.query.weight @ query + module.key(held[i * width + j])
                scores.append(module.score.weight[0] @ torch.tanh(inner + module.location.weight @ features))
        there = [i for i in range(REGIONS) if mask[i]]
        if module.window is not None and looks:
            grid = looks[-1].view(height, width)
            y, x = median(grid.sum(1).tolist()), median(grid.sum(0).tolist())
            there = [i for i in there if max(abs(i // width - y), abs(i % width - x)) <= module.window]
        if module.top is not None:
            there = sorted(there, key=lambda i: -scores[i])[: module.top]
        weights = torch.zeros(REGIONS, dtype=torch.double)
        for i in there:
            score = module.sharpness * float(scores[i])
            weights[i] = 1 / (1 + math.exp(-score)) if module.smooth else math.exp(score)
        looks.append(weights / weights.sum())
    return looks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_looks_where_the_paper_s_loops_look(case):
    module, held, asked = case.lively(), memory(), queries(steps=3)
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, [2, 7]] = False
    looked, _ = steps(module, asked, module.prepare(held, mask, SIZE))
    for b in range(2):
        for r in range(3):
            expected = paper(module, held[b], [each[b, r] for each in asked], mask[b])
            for ours, right in zip(looked, expected, strict=True):
                torch.testing.assert_close(ours[b, r], right, rtol=0, atol=1e-12)


def test_the_first_look_is_that_of_additive_attention():
    module, held, (first, second) = CASES[0].lively(), memory(), queries()
    plain = AdditiveAttention(QUERY, MEMORY, width=5).double()
    plain.load_state_dict({name: each for name, each in module.state_dict().items() if name in plain.state_dict()})
    prepared, theirs = module.prepare(held, None, SIZE), plain.prepare(held)
    looks, state = module.attend(first, prepared)
    torch.testing.assert_close(looks, plain.attend(first, theirs)[0], rtol=0, atol=1e-12)
    again, _ = module.attend(second, prepared, state)
    assert not torch.allclose(again, plain.attend(second, theirs)[0], rtol=0, atol=1e-3)


def test_the_sum_of_looks_is_kept_beside_the_last():
    module = CASES[3].lively()
    prepared, state, looks = module.prepare(memory()), None, []
    for query in queries(steps=4):
        weights, state = module.attend(query, prepared, state)
        looks.append(weights)
    torch.testing.assert_close(state, torch.stack((looks[-1], sum(looks)), 2), rtol=0, atol=1e-12)


def test_moves_with_map_and_last_look_and_turned_around_it_does_not_look_the_same():
    module, (asked, *_) = CASES[0].lively(), queries(1)
    held, last = torch.zeros(1, 7, 8, MEMORY).double(), torch.zeros(1, 3, 7, 8).double()
    held[:, 2:4, 2:5], last[:, :, 2:4, 2:5] = torch.randn(2, 3, MEMORY).double(), torch.rand(2, 3).double()

    def look(held: Tensor, last: Tensor) -> Tensor:
        prepared = module.prepare(held.flatten(1, 2), None, (7, 8))
        return module.attend(asked, prepared, last.flatten(2)[:, :, None])[0].view(1, 3, 7, 8)

    ours = look(held, last)
    moved = look(held.roll((1, 2), (1, 2)), last.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved, ours.roll((1, 2), (2, 3)), rtol=0, atol=1e-12)
    turned = look(held.flip(1, 2), last.flip(2, 3))
    assert not torch.allclose(turned, ours.flip(2, 3), rtol=0, atol=1e-3)


def test_gets_sharper_and_smoother():
    held, (asked, *_) = memory(), queries()
    looks = {}
    for name, option in {"plain": {}, "sharp": {"sharpness": 3.0}, "smooth": {"smooth": True}}.items():
        module = LocationSensitiveAttention(QUERY, MEMORY, **SMALL, **option).double()
        torch.manual_seed(1)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        looks[name] = module.attend(asked, module.prepare(held, None, SIZE))[0]
    peaks = {name: look.amax(2) for name, look in looks.items()}
    assert (peaks["sharp"] > peaks["plain"]).all()
    assert (peaks["plain"] > peaks["smooth"]).all()


def test_looks_at_the_best_and_no_more():
    module = CASES[2].lively()
    weights, _ = module.attend(queries()[0], module.prepare(memory()))
    assert torch.equal((weights > 0).sum(2), torch.full((2, 3), 4))


@pytest.mark.parametrize("option", ["width", "filters", "top", "window"])
def test_refuses_less_than_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        LocationSensitiveAttention(QUERY, MEMORY, **{option: 0})


@pytest.mark.parametrize("size", [0, 4])
def test_refuses_an_even_kernel(size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd, got {size}"):
        LocationSensitiveAttention(QUERY, MEMORY, kernel_size=size)


def test_refuses_a_sharpness_of_nothing_and_other_axes(unchecked):
    with pytest.raises(ValueError, match=r"sharpness must be positive, got 0\.0"):
        LocationSensitiveAttention(QUERY, MEMORY, sharpness=0.0)
    with pytest.raises(ValueError, match="axes must be 1 or 2, got 3"):
        LocationSensitiveAttention(QUERY, MEMORY, axes=3)
