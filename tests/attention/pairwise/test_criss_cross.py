import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.pairwise.test_core import Largest
from visattn import CrissCrossAttention, PositionAttention

CASES = [  # the paper counts h + w - 1 keys; as in its code, the position itself is a key twice and one of them masked
    Case(
        CrissCrossAttention,
        options,
        lambda c: 5 * c * c // 4 + 5 * c // 4 + 1,
        (5201, 82_241),
        macs=lambda c, h, w, steps=steps: steps * (5 * c * c * h * w // 4 + 9 * c * h * w * (h + w) // 8),
        sums_to_one=-1,
    )
    for options, steps in (({}, 2), ({"recurrence": 1}, 1))
]


def lively(channels: int = 8, recurrence: int = 2) -> CrissCrossAttention:
    """In double precision, with nothing zero."""
    module = CrissCrossAttention(channels, reduction=2, recurrence=recurrence).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: CrissCrossAttention, x: Tensor) -> Tensor:
    """Section 3.2 of the paper, in loops over the positions of a cross."""
    for _ in range(module.recurrence):
        y = torch.empty_like(x)
        query, key, value = (layer(x) for layer in (module.query, module.key, module.value))
        height, width = x.shape[2:]
        for b in range(x.shape[0]):
            for i in range(height):
                for j in range(width):
                    cross = [(i, column) for column in range(width)]
                    cross += [(row, j) for row in range(height) if row != i]
                    d = [torch.exp(query[b, :, i, j] @ key[b, :, row, column]) for row, column in cross]
                    read = sum(e / sum(d) * value[b, :, row, column] for e, (row, column) in zip(d, cross, strict=True))
                    y[b, :, i, j] = module.gamma * read + x[b, :, i, j]
        x = y
    return x


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_equals_the_paper_in_loops(recurrence):
    module, x = lively(recurrence=recurrence), torch.randn(2, 8, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-10)


def test_weights_lie_on_the_cross_and_count_the_position_itself_once():
    module, (h, w) = lively(), (3, 5)
    weights = module.attend(torch.randn(2, 8, h, w, dtype=torch.double)).view(2, 2, h, w, h, w)
    rows, columns = torch.eye(h, dtype=torch.bool), torch.eye(w, dtype=torch.bool)
    cross = rows[:, None, :, None] | columns[:, None]
    assert torch.equal(weights != 0, cross.expand_as(weights))
    with torch.no_grad():
        for parameter in (module.key.weight, module.key.bias):
            parameter.zero_()
    alike = module.attend(torch.randn(2, 8, h, w, dtype=torch.double)).view(2, 2, h, w, h, w)
    torch.testing.assert_close(alike, cross.double().expand_as(alike) / (h + w - 1))


@pytest.mark.parametrize("recurrence", [1, 2])
def test_reaches_the_cross_in_one_step_and_all_in_two(recurrence):
    module, x = lively(recurrence=recurrence), torch.randn(1, 8, 4, 5, dtype=torch.double, requires_grad=True)
    module(x)[0, :, 1, 2].sum().backward()
    reached = x.grad[0].any(0)
    assert reached[1].all()
    assert reached[:, 2].all()
    assert reached.sum() == (4 * 5 if recurrence == 2 else 4 + 5 - 1)


def test_of_one_row_is_attention_between_all_positions():
    module, other = lively(recurrence=1), PositionAttention(8, reduction=2).double()
    with torch.no_grad():
        for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours.view_as(theirs))
    for size in ((1, 6), (6, 1), (1, 1)):
        x = torch.randn(2, 8, *size, dtype=torch.double)
        torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-12)


def test_turns_with_the_map_and_with_the_order_of_rows_but_not_with_that_of_positions():
    module, x = lively(), torch.randn(2, 8, 4, 5, dtype=torch.double)
    torch.testing.assert_close(module(x.mT), module(x).mT, rtol=0, atol=1e-11)
    rows, columns, order = torch.randperm(4), torch.randperm(5), torch.randperm(20)
    moved = module(x[:, :, rows][..., columns])
    torch.testing.assert_close(moved, module(x)[:, :, rows][..., columns], rtol=0, atol=1e-11)
    shuffled = module(x.flatten(2)[..., order].view_as(x)).flatten(2)
    assert (shuffled - module(x).flatten(2)[..., order]).abs().max() > 0.01


def test_holds_no_matrix():
    module, x = CrissCrossAttention(8), torch.randn(1, 8, 60, 70, requires_grad=True)
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.elements <= 60 * 70 * (60 + 70)  # the matrix has 60 * 70 * 60 * 70


def test_logits_are_float32_where_halves_would_overflow():
    module, x = CrissCrossAttention(8).half(), 300 * torch.randn(1, 8, 4, 5, dtype=torch.half)
    for layer in (module.query, module.key):
        nn.init.ones_(layer.weight)
    assert module.attend(x).isfinite().all()


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        CrissCrossAttention(64, reduction=reduction)


def test_refuses_a_recurrence_of_nothing():
    with pytest.raises(ValueError, match="recurrence must be positive, got 0"):
        CrissCrossAttention(64, recurrence=0)
