import math

import pytest
import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import ConditionalConvolution

CASES = [
    Case(
        ConditionalConvolution,
        options,
        lambda c, experts=experts, groups=groups: experts * (9 * c**2 // groups + c + 1),
        golden,
        lambda c, h, w, experts=experts, groups=groups: (h * w + experts) * 9 * c**2 // groups + experts * c,
        small=small,
    )
    for options, experts, groups, golden, small in (
        ({}, 8, 1, (295_432, 4_720_648), 4),
        ({"experts": 4, "groups": 16}, 4, 16, (9_476, 148_484), 16),
    )
]


def lively(channels: int = 8, **options) -> ConditionalConvolution:
    module = ConditionalConvolution(channels, **options).double()
    nn.init.normal_(module.route.weight, std=3)
    return module


def paper(module: ConditionalConvolution, x: Tensor, stride: int, groups: int) -> Tensor:
    """Section 3 of the paper, in loops."""
    outputs = []
    for image in x:
        z = [sum(v for row in channel for v in row) / channel.numel() for channel in image]
        alpha = [
            1 / (1 + math.exp(-(sum(w * each for w, each in zip(row, z, strict=True)) + bias)))
            for row, bias in zip(module.route.weight, module.route.bias, strict=True)
        ]
        weight = sum(a * expert for a, expert in zip(alpha, module.experts.weight, strict=True))
        outputs.append(F.conv2d(image[None], weight, None, stride, weight.shape[-1] // 2, 1, groups)[0])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("options", "stride", "groups"),
    [
        ({}, 1, 1),
        ({"stride": 2, "out_channels": 12, "groups": 2}, 2, 2),
        ({"groups": 8, "kernel_size": 5, "experts": 3}, 1, 8),
    ],
)
def test_equals_the_paper_in_loops(options, stride, groups):
    module, x = lively(**options), torch.randn(3, 8, 5, 7, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, stride, groups), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("stride", "groups", "kernel_size"), [(1, 1, 3), (2, 4, 5), (1, 64, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_equals_timm_with_the_same_routing(stride, groups, kernel_size, last):
    ours = ConditionalConvolution(64, stride=stride, groups=groups, kernel_size=kernel_size)
    theirs = CondConv2d(64, 64, kernel_size, stride, groups=groups, num_experts=8)
    x = torch.randn(2, 64, 5, 7)
    x = x.to(memory_format=torch.channels_last) if last else x
    with torch.no_grad():
        theirs.weight.copy_(ours.experts.weight.flatten(1))
        torch.testing.assert_close(ours(x), theirs(x, ours.attend(x).flatten(1)))


def test_one_expert_alone_is_its_convolution_and_the_experts_add_up():
    module, x = lively(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    maps = [F.conv2d(x, expert, padding=1) for expert in module.experts.weight]
    for k, alone in enumerate(maps):
        weights = F.one_hot(torch.tensor([k, k]), 8).double()[..., None, None, None]
        torch.testing.assert_close(module.read(x, weights=weights), alone, rtol=0, atol=1e-12)
    weights = module.attend(x)
    mixed = sum(weights[:, k] * each for k, each in enumerate(maps))
    torch.testing.assert_close(module(x), mixed, rtol=0, atol=1e-12)


def test_each_expert_is_weighed_apart_from_the_others():
    module, x = lively(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    before = module.attend(x)
    with torch.no_grad():
        module.route.bias[3] += 5
    moved = (module.attend(x) != before).flatten(1).any(0)
    assert moved.nonzero().flatten().tolist() == [3]


def test_the_choice_is_blind_to_places_and_the_output_is_not():
    module, x = lively(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    order = torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    assert not torch.allclose(module(shuffled), module(x).flatten(2)[..., order].view_as(x))


def test_refuses_no_experts():
    with pytest.raises(ValueError, match="experts must be positive, got 0"):
        ConditionalConvolution(64, experts=0)


def test_refuses_a_kernel_without_a_middle():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got 2"):
        ConditionalConvolution(64, kernel_size=2)


def test_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="groups must divide channels=64 and out_channels=64, got 3"):
        ConditionalConvolution(64, groups=3)
