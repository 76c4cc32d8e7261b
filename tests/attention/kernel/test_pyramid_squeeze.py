import math

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import convolve, logistic, mean
from visattn import PyramidSqueezeAttention, insert

CASES = [
    Case(
        PyramidSqueezeAttention,
        {"cardinalities": (1, 2, 2, 2), "reduction": 2},
        lambda c: 173 * c * c // 8 + c * c // 16 + 3 * c // 8,
        (88_856, 1_421_408),
        macs=lambda c, h, w: h * w * 173 * c * c // 8 + c * c // 4,
        sums_to_one=1,
        small=8,
    )
]
NARROW = {"kernel_sizes": (3, 5), "cardinalities": (1, 2), "reduction": 2}


def paper(module: PyramidSqueezeAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3.2 of the paper in loops: the weights and the result."""
    maps = [convolve(branch, x) for branch in module.branches]
    gates = []
    for each in maps:
        hidden = (module.squeeze.weight @ mean(each) + module.squeeze.bias).clamp(min=0)
        gates.append(logistic(module.excite.weight @ hidden + module.excite.bias))
    weights = torch.empty_like(torch.stack(gates))
    for c in range(len(gates[0])):
        total = sum(math.exp(gate[c]) for gate in gates)
        for i, gate in enumerate(gates):
            weights[i, c] = math.exp(gate[c]) / total
    return weights, torch.cat([weights[i, c] * each[c, None] for i, each in enumerate(maps) for c in range(len(each))])


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"out_channels": 12}, {"out_channels": 4, "stride": 3}])
@torch.no_grad()
def test_equals_the_paper_in_loops(options):
    module = PyramidSqueezeAttention(8, **NARROW, **options).double()
    x = torch.randn(2, 8, 4, 7, dtype=torch.double)
    weights, y = zip(*(paper(module, image) for image in x), strict=True)
    torch.testing.assert_close(module.attend(x)[..., 0, 0], torch.stack(weights), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x), torch.stack(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("channels", "count"), [(64, 27_121), (256, 433_732)])
def test_has_the_parameters_of_the_released_code(channels, count):
    module, width = PyramidSqueezeAttention(channels), channels // 4
    kernels = sum(k * k * channels * width // g for k, g in ((3, 1), (5, 4), (7, 8), (9, 16)))
    squeeze = 2 * width * (width // 16) + width // 16 + width
    assert sum(p.numel() for p in module.parameters()) == kernels + squeeze == count


def test_makes_epsanet_50_of_resnet_50():
    model = insert(timm.create_model("resnet50"), PyramidSqueezeAttention)
    count = sum(p.numel() for p in model.parameters())
    assert count == 22_561_715
    assert round(count / 1e6, 2) == 22.56  # as published


def test_released_order_is_that_of_the_paper_turned_around():
    ours, theirs = PyramidSqueezeAttention(64), PyramidSqueezeAttention(64, order="released")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 64, 5, 7)
    assert torch.equal(theirs(x), ours(x).unflatten(1, (4, 16)).flip(1).flatten(1, 2))
    assert torch.equal(theirs.attend(x), ours.attend(x))


def test_branches_compete_for_channels_of_the_same_number():
    module, x = PyramidSqueezeAttention(64), torch.randn(2, 64, 5, 7)
    weights = module.attend(x)
    assert weights.shape == (2, 4, 16, 1, 1)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 16, 1, 1))
    assert weights.max() < math.e / (math.e + 3)  # what a sigmoid leaves to one of four


def test_equal_branches_share_equally():
    module = PyramidSqueezeAttention(64, kernel_sizes=(3, 3, 3, 3), cardinalities=(1, 1, 1, 1))
    for branch in module.branches[1:]:
        branch.load_state_dict(module.branches[0].state_dict())
    x = torch.randn(2, 64, 5, 7)
    expected = module.branches[0](x) / 4
    torch.testing.assert_close(module(x), torch.cat([expected] * 4, 1))


def test_weights_follow_a_shift_of_the_map_and_the_kernels_keep_their_sides():
    module, x = PyramidSqueezeAttention(64).double(), torch.randn(2, 64, 9, 11, dtype=torch.double)
    for branch in module.branches:
        branch.padding_mode = "circular"
        branch._reversed_padding_repeated_twice = [branch.padding[0]] * 4
    torch.testing.assert_close(module(x.roll((2, 3), (2, 3))), module(x).roll((2, 3), (2, 3)), rtol=0, atol=1e-12)
    assert not torch.allclose(module(x.mT), module(x).mT)


def test_takes_the_shape_of_the_convolution_it_replaces():
    x = torch.randn(2, 64, 9, 7)
    module, convolution = (
        PyramidSqueezeAttention(64, out_channels=128, stride=2),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
    )
    assert module(x).shape == convolution(x).shape


@pytest.mark.parametrize("sizes", [(), (3, 4, 7, 9), (3, 5, 7, -9)])
def test_refuses_kernels_without_a_middle(sizes):
    with pytest.raises(ValueError, match=r"kernel_sizes must be odd and positive, got \("):
        PyramidSqueezeAttention(64, kernel_sizes=sizes)


def test_refuses_channels_that_branches_cannot_share():
    with pytest.raises(ValueError, match="out_channels must be a multiple of the 4 branches, got 66"):
        PyramidSqueezeAttention(64, out_channels=66)


def test_groups_fall_to_what_divides_the_channels():
    assert [branch.groups for branch in PyramidSqueezeAttention(64).branches] == [1, 4, 8, 16]
    assert [branch.groups for branch in PyramidSqueezeAttention(96).branches] == [1, 4, 8, 8]
    assert [branch.groups for branch in PyramidSqueezeAttention(24, out_channels=64).branches] == [1, 4, 8, 8]


@pytest.mark.parametrize("cardinalities", [(1, 4, 8), (1, 4, 8, 0)])
def test_refuses_other_than_one_positive_number_of_groups_a_branch(cardinalities):
    with pytest.raises(ValueError, match=r"cardinalities must be 4 positive numbers, got \(1, 4, 8"):
        PyramidSqueezeAttention(64, cardinalities=cardinalities)


@pytest.mark.parametrize("reduction", [0, 17])
def test_refuses_a_reduction_out_of_range(reduction):
    rule = f"reduction must lie between 1 and the 16 channels of a branch, got {reduction}"
    with pytest.raises(ValueError, match=rule):
        PyramidSqueezeAttention(64, reduction=reduction)


def test_refuses_an_unknown_order(unchecked):
    with pytest.raises(ValueError, match="order must be 'paper' or 'released', got 'reverse'"):
        PyramidSqueezeAttention(64, order="reverse")
