import math

import pytest
import torch
from torch import Tensor

from tests.attention.case import Case
from visattn import SplitSpatialShiftAttention
from visattn.attention.spatial.split_spatial_shift import shift

CASES = [
    Case(
        SplitSpatialShiftAttention,
        {},
        lambda c: 8 * c * c + 4 * c,
        (33_024, 525_312),
        macs=lambda c, h, w: 4 * h * w * c * c + 4 * c * c,
        sums_to_one=1,
        small=8,
    ),
]
DOWN, UP, RIGHT, LEFT = (1, 0), (-1, 0), (0, 1), (0, -1)


def shifted(x: Tensor, steps: list[tuple[int, int]]) -> Tensor:
    """Every quarter of the channels by its own step; where nothing comes in, what was there stays."""
    (channels, height, width), y = x.shape, x.clone()
    for c in range(channels):
        down, right = steps[c // (channels // 4)]
        for p in range(height):
            for q in range(width):
                if 0 <= p - down < height and 0 <= q - right < width:
                    y[c, p, q] = x[c, p - down, q - right]
    return y


def paper(module: SplitSpatialShiftAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3.2 of the paper in loops: the weights and the result."""
    channels, height, width = x.shape
    at = [(p, q) for p in range(height) for q in range(width)]
    expanded = x.new_empty(3 * channels, height, width)
    for p, q in at:
        expanded[:, p, q] = module.expand.weight[:, :, 0, 0] @ x[:, p, q] + module.expand.bias
    first, second, third = (expanded[i * channels : (i + 1) * channels] for i in range(3))
    parts = [shifted(first, [DOWN, UP, RIGHT, LEFT]), shifted(second, [RIGHT, LEFT, DOWN, UP]), third]
    hidden = module.squeeze.weight @ sum(part[:, p, q] for part in parts for p, q in at)
    hidden = torch.stack([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in hidden])
    logits = module.excite.weight @ hidden
    weights, y = x.new_empty(3, channels), torch.empty_like(x)
    for c in range(channels):
        exponentials = [math.exp(logits[i * channels + c]) for i in range(3)]
        weights[:, c] = torch.tensor([e / sum(exponentials) for e in exponentials], dtype=x.dtype)
    for p, q in at:
        mixed = sum(weights[i] * parts[i][:, p, q] for i in range(3))
        y[:, p, q] = module.out.weight[:, :, 0, 0] @ mixed + module.out.bias
    return weights, y


@pytest.mark.parametrize("size", [(3, 5), (1, 4), (2, 1)])
@torch.no_grad()
def test_equals_the_paper_in_loops(size):
    module, x = SplitSpatialShiftAttention(8).double(), torch.randn(2, 8, *size, dtype=torch.double)
    weights, y = zip(*(paper(module, image) for image in x), strict=True)
    torch.testing.assert_close(module.attend(x)[..., 0, 0], torch.stack(weights), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x), torch.stack(y), rtol=0, atol=1e-12)


def test_shifts_copy_and_do_not_smear():
    ramp = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 8, 5, 3)
    rows = shift(ramp, 2, 3)[0, :, :, 0].tolist()
    assert rows == [*[[0, 0, 1, 2, 3]] * 2, *[[1, 2, 3, 4, 4]] * 2, *[[0, 1, 2, 3, 4]] * 4]
    smeared = ramp.clone()
    for row in range(1, 5):  # a copy in place, one row after the other
        smeared[:, :2, row] = smeared[:, :2, row - 1]
    assert smeared[0, 0, :, 0].tolist() == [0, 0, 0, 0, 0]


def test_turns_with_the_map_if_the_shifted_branches_change_places():
    module, x = SplitSpatialShiftAttention(8).double(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    y = module(x)
    assert not torch.allclose(module(x.mT), y.mT)
    order = torch.cat([torch.arange(8, 16), torch.arange(8), torch.arange(16, 24)])
    module.expand.weight.data, module.expand.bias.data = module.expand.weight[order], module.expand.bias[order]
    module.excite.weight.data = module.excite.weight[order]
    torch.testing.assert_close(module(x.mT), y.mT, rtol=0, atol=1e-12)


def test_mixes_neighbours_only():
    module, x = SplitSpatialShiftAttention(8).double(), torch.randn(1, 8, 5, 7, dtype=torch.double)
    weights, moved = module.attend(x), x.clone()
    moved[..., 2, 3] += 1
    changed = (module.read(moved, weights=weights) != module.read(x, weights=weights)).any(1)[0]
    assert changed.nonzero().tolist() == [[1, 3], [2, 2], [2, 3], [2, 4], [3, 3]]


def test_a_flat_map_is_not_shifted_and_its_branches_add_up():
    module, x = SplitSpatialShiftAttention(8).double(), torch.randn(2, 8, 1, 1, dtype=torch.double).expand(2, 8, 5, 7)
    branches = module.expand(x).unflatten(1, (3, 8))
    expected = module.out((branches * module.attend(x)).sum(1))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_refuses_channels_without_quarters():
    with pytest.raises(ValueError, match="channels must be a multiple of 4, got 66"):
        SplitSpatialShiftAttention(66)
