import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import Involution
from visattn.attention.kernel.core import Aggregate, plain_aggregate

CASES = [  # the paper counts k²c more at every position: the sums, which are no matrix products
    Case(
        Involution,
        {},
        lambda c: c * c // 4 + c // 2 + c // 4 * 49 * c // 16 + 49 * c // 16,
        (4388, 67_472),
        lambda c, h, w: h * w * (c * c // 4 + c // 4 * 49 * c // 16),
        norm_over="positions",
    ),
    Case(
        Involution,
        {"kernel_size": 3, "group_channels": 8, "reduction": 2},
        lambda c: c * c // 2 + c + c // 2 * 9 * c // 8 + 9 * c // 8,
        (4488, 70_176),
        lambda c, h, w: h * w * (c * c // 2 + c // 2 * 9 * c // 8),
        norm_over="positions",
    ),
]


def lively(channels: int = 8, **options) -> Involution:
    module = Involution(channels, **{"kernel_size": 3, "group_channels": 4, **options}).double().eval()
    norm = module.squeeze[1]
    for tensor in (norm.weight, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def paper(module: Involution, x: Tensor) -> Tensor:
    """Section 3 of the paper, in loops."""
    (first, norm, _), last = module.squeeze, module.span
    k, s, wide = module.kernel_size, module.stride, module.group_channels
    batch, channels, height, width = x.shape
    y = x.new_zeros(batch, channels, -(-height // s), -(-width // s))
    for b in range(batch):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                block = x[b, :, i * s : (i + 1) * s, j * s : (j + 1) * s].flatten(1)
                z = first.weight[:, :, 0, 0] @ (block.sum(1) / block.shape[1])
                z = (z - norm.running_mean) / (norm.running_var + norm.eps) ** 0.5 * norm.weight + norm.bias
                kernel = last.weight[:, :, 0, 0] @ z.clamp(min=0) + last.bias
                for c in range(channels):
                    for u in range(k):
                        for v in range(k):
                            p, q = i * s + u - k // 2, j * s + v - k // 2
                            if 0 <= p < height and 0 <= q < width:
                                y[b, c, i, j] += kernel[(c // wide * k + u) * k + v] * x[b, c, p, q]
    return y


@pytest.mark.parametrize(
    "options", [{}, {"kernel_size": 5}, {"stride": 2}, {"stride": 3, "group_channels": 8}, {"kernel_size": 1}], ids=str
)
def test_equals_the_paper_in_loops(options):
    module, x = lively(**options), torch.randn(2, 8, 4, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_without_content_are_a_depthwise_convolution(stride):
    module, x = lively(stride=stride), torch.randn(2, 8, 5, 7, dtype=torch.double)
    nn.init.zeros_(module.span.weight)
    kernel = module.span.bias.view(2, 1, 3, 3).repeat_interleave(4, 0)
    plain = F.conv2d(x, kernel, stride=stride, padding=1, groups=8)
    torch.testing.assert_close(module(x), plain, rtol=0, atol=1e-12)


def test_a_kernel_of_one_is_a_gate_for_each_group():
    module, x = lively(kernel_size=1), torch.randn(2, 8, 5, 7, dtype=torch.double)
    gate = module.attend(x)[:, :, 0, 0].repeat_interleave(4, 1)
    torch.testing.assert_close(module(x), x * gate, rtol=0, atol=1e-12)


def test_moves_with_the_map_but_a_shuffle_or_a_transposed_map_is_another():
    module, x = lively(), torch.zeros(2, 8, 9, 9, dtype=torch.double)
    x[:, :, 3:6, 3:6] = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(module(x.roll((1, 2), (2, 3))), module(x).roll((1, 2), (2, 3)), rtol=0, atol=1e-11)
    assert not torch.allclose(module(x.mT), module(x).mT)
    order = torch.randperm(81)
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert not torch.allclose(module(shuffled), module(x).flatten(2)[..., order].view_as(x))


def test_channels_of_a_group_share_a_kernel_and_groups_do_not():
    module, x = lively(), torch.randn(1, 8, 5, 7, dtype=torch.double)
    weights = module.attend(x)
    same = x.clone()
    same[:, 1], same[:, 5] = x[:, 0], x[:, 0]
    y = module.read(same, weights=weights)
    assert torch.equal(y[:, 0], y[:, 1])
    assert not torch.allclose(y[:, 0], y[:, 5])


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_sum_without_copies_and_its_gradients_equal_the_plain_ones(stride):
    x = torch.randn(2, 3, 4, 5, 7, dtype=torch.double, requires_grad=True)
    kernels = torch.randn(2, 3, 5, 5, -(-5 // stride), -(-7 // stride), dtype=torch.double, requires_grad=True)
    lean, plain = Aggregate.apply(x, kernels, stride), plain_aggregate(x, kernels, stride)
    torch.testing.assert_close(lean, plain, rtol=0, atol=1e-12)
    g = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad(lean, (x, kernels), g), torch.autograd.grad(plain, (x, kernels), g), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lean", [False, True])
def test_sums_of_a_low_precision_are_not_rounded_at_every_tap(lean):
    aggregate = Aggregate.apply if lean else plain_aggregate
    x, kernels = torch.ones(1, 1, 1, 9, 9, dtype=torch.bfloat16), torch.full((1, 1, 9, 9, 9, 9), 0.0078125)
    kernels[0, 0, 0, 0] = 2  # beside which one of the small weights is lost
    x.requires_grad_()
    y = aggregate(x, kernels.bfloat16(), 1)
    assert y[0, 0, 0, 4, 4] == 2.625
    y.sum().backward()
    assert x.grad[0, 0, 0, 4, 4] == 2.625


def test_has_a_second_derivative():
    x = torch.randn(1, 1, 2, 3, 4, dtype=torch.double, requires_grad=True)
    kernels = torch.randn(1, 1, 3, 3, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *given: Aggregate.apply(*given, 1), (x, kernels))


def test_the_gradient_of_an_image_is_that_in_a_batch():
    module, x = lively(), torch.randn(3, 8, 40, 50, dtype=torch.double, requires_grad=True)
    (together,) = torch.autograd.grad(module(x).square().sum(), x)
    twin = copy.deepcopy(module)
    for n in range(3):
        (alone,) = torch.autograd.grad(twin(x[n : n + 1]).square().sum(), x)
        torch.testing.assert_close(alone[n], together[n], rtol=0, atol=1e-11)


def test_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="group_channels must divide channels=24, got 16"):
        Involution(24)


@pytest.mark.parametrize("kernel_size", [0, 4])
def test_refuses_a_kernel_without_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
        Involution(64, kernel_size=kernel_size)


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        Involution(64, reduction=reduction)
