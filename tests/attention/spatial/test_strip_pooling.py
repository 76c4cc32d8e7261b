import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import chain, convolve, interpolate, lively, logistic
from visattn import MixedPooling, StripPooling

CASES = [
    Case(
        StripPooling,
        {},
        lambda c: 7 * c * c + 5 * c,
        (28_992, 460_032),
        macs=lambda c, h, w: 3 * c * c * (h + w) + c * c * h * w,
        norm_over="strips",
        small=8,
    ),
    Case(
        MixedPooling,
        {},
        lambda c: 4 * c * (c // 4) + 51 * (c // 4) ** 2 + 18 * (c // 4) + 2 * c,
        (17_568, 276_096),
        macs=lambda c, h, w: (
            h * w * (4 * c * (c // 4) + 27 * (c // 4) ** 2)
            + 9 * (c // 4) ** 2 * (20**2 + 12**2)
            + 3 * (c // 4) ** 2 * (h + w)
        ),
        norm_over="strips",
        small=8,
    ),
]


def strips(rows: nn.Sequential, columns: nn.Sequential, x: Tensor) -> Tensor:
    """What rows say plus what columns say, at every position."""
    (_, height, width), y = x.shape, []
    row = chain(rows, torch.stack([sum(x[:, :, q] for q in range(width)) / width], 2))
    column = chain(columns, torch.stack([sum(x[:, p] for p in range(height)) / height], 1))
    for p in range(height):
        y.append(torch.stack([row[:, p, 0] + column[:, 0, q] for q in range(width)], 1))
    return torch.stack(y, 1)


def gates(module: StripPooling, x: Tensor) -> Tensor:
    """Section 3.1 of the paper, in loops, with the norms and the ReLU of the released code."""
    return logistic(convolve(module.mix, strips(module.rows, module.columns, x).clamp(min=0)))


def pool(x: Tensor, side: int) -> Tensor:
    """The mean of each of side × side bins, which may overlap and repeat."""
    (_, height, width), y = x.shape, x.new_empty(len(x), side, side)
    for i in range(side):
        for j in range(side):
            rows = range(i * height // side, -(-(i + 1) * height // side))
            columns = range(j * width // side, -(-(j + 1) * width // side))
            y[:, i, j] = sum(x[:, p, q] for p in rows for q in columns) / (len(rows) * len(columns))
    return y


def mixed(module: MixedPooling, x: Tensor) -> Tensor:
    """Section 3.2 of the paper, in loops, with the norms of the released code."""
    short, long = chain(module.short, x), chain(module.long, x)
    near = chain(module.local, short)
    for side, grid in zip(module.sizes, module.grids, strict=True):
        near = near + interpolate(chain(grid, pool(short, side)), *x.shape[1:])
    far = strips(module.rows, module.columns, long)
    return chain(module.out, torch.cat([chain(module.join_short, near), chain(module.join_long, far)]))


def test_strips_equal_the_paper_in_loops():
    module, x = lively(StripPooling(4)), torch.randn(2, 4, 3, 5, dtype=torch.double)
    expected = torch.stack([gates(module, image) for image in x])
    torch.testing.assert_close(module.attend(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x), x * expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(4, 2), (7,)])
def test_mixed_pools_equal_the_paper_in_loops(sizes):
    module, x = lively(MixedPooling(8, sizes=sizes)), torch.randn(2, 8, 3, 5, dtype=torch.double)
    expected = torch.stack([mixed(module, image) for image in x])
    torch.testing.assert_close(module.attend(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x), (x + expected).clamp(min=0), rtol=0, atol=1e-12)


def test_rows_and_columns_are_seen_but_not_where_things_are_in_them():
    module, x = lively(StripPooling(8)), torch.randn(2, 8, 6, 9, dtype=torch.double)
    within = x.clone()
    within[:, :, 2, 3] += 1
    within[:, :, 2, 5] -= 1  # the mean of row 2 stays, those of two columns do not
    rows = module.rows(x.mean(3, keepdim=True))
    torch.testing.assert_close(module.rows(within.mean(3, keepdim=True)), rows, rtol=0, atol=1e-12)
    changed = (module.columns(within.mean(2, keepdim=True)) - module.columns(x.mean(2, keepdim=True))).abs()
    assert (changed.amax((0, 1, 2)) > 1e-9).tolist() == [False, False, True, True, True, True, True, False, False]


def test_the_kernel_of_the_rows_looks_at_the_rows_beside():
    module, x = lively(StripPooling(8)), torch.randn(1, 8, 7, 5, dtype=torch.double)
    moved = x.clone()
    moved[:, :, 3, 1] += 1
    moved[:, :, 3, 4] -= 1
    moved[:, :, 3] += 1
    changed = (module.rows(moved.mean(3, keepdim=True)) != module.rows(x.mean(3, keepdim=True))).any(1).flatten()
    assert changed.tolist() == [False, False, True, True, True, False, False]


def test_what_precedes_the_relu_is_a_sum_of_rows_and_columns():
    module, x = lively(StripPooling(8)), torch.randn(1, 8, 4, 6, dtype=torch.double)
    seen = []
    module.mix.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module.rows[1].bias.data += 100  # the ReLU passes everything
    module(x)
    s = seen[0]
    corners = s[..., 1:, 1:] - s[..., 1:, :1] - s[..., :1, 1:] + s[..., :1, :1]
    torch.testing.assert_close(corners, torch.zeros_like(corners), rtol=0, atol=1e-11)


def test_turns_with_the_map_if_its_kernels_do():
    module, x = lively(StripPooling(8)), torch.randn(2, 8, 6, 9, dtype=torch.double)
    y = module(x)
    assert not torch.allclose(module(x.mT), y.mT)
    rows, columns = module.rows[0].weight.data.clone(), module.columns[0].weight.data.clone()
    module.rows[0].weight.data, module.columns[0].weight.data = columns.mT, rows.mT
    module.rows[1], module.columns[1] = module.columns[1], module.rows[1]
    torch.testing.assert_close(module(x.mT), y.mT, rtol=0, atol=1e-12)


def test_zero_weights_make_half_of_the_map():
    module, x = StripPooling(64), torch.randn(2, 64, 5, 7)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(x), x / 2)


def test_a_flat_map_is_the_same_everywhere_inside():
    module, x = lively(MixedPooling(8, sizes=(4,))), torch.randn(1, 8, 1, 1).double().expand(1, 8, 24, 28)
    inner = module.attend(x)[..., 11:13, 13:15]
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), rtol=0, atol=1e-11)


@pytest.mark.parametrize("cls", [StripPooling, MixedPooling])
@pytest.mark.parametrize("size", [(1, 6), (6, 1)])
def test_training_on_one_strip_says_what_the_norm_lacks(cls, size):
    module, x = cls(64), torch.randn(1, 64, *size)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(x)
    assert module.eval()(x).shape == x.shape


def test_refuses_too_few_channels():
    with pytest.raises(ValueError, match="channels must be at least 4, got 3"):
        MixedPooling(3)


def test_refuses_a_grid_of_nothing():
    with pytest.raises(ValueError, match=r"sizes must be positive, got \(12, 0\)"):
        MixedPooling(64, sizes=(12, 0))
