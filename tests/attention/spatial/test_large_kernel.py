import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import convolve
from visattn import LargeKernelAttention

CASES = [
    Case(
        LargeKernelAttention,
        {},
        lambda c: 3 * c * c + 79 * c,
        (17_344, 216_832),
        macs=lambda c, h, w: h * w * (3 * c * c + 74 * c),
        small=8,
    ),
    Case(
        LargeKernelAttention,
        {"project": False},
        lambda c: c * c + 77 * c,
        (9_024, 85_248),
        macs=lambda c, h, w: h * w * (c * c + 74 * c),
        small=8,
    ),
]


def paper(module: LargeKernelAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3.1 of the paper in loops: the weights and the result."""
    u = x
    if module.project:
        u = convolve(module.enter[0], x)
        u = u * torch.tensor([(1 + math.erf(v / math.sqrt(2))) / 2 for v in u.flatten()], dtype=u.dtype).view_as(u)
    weights = convolve(module.mix, convolve(module.distant, convolve(module.local, u)))
    return weights, x + convolve(module.leave, u * weights) if module.project else x * weights


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(21, 3), (6, 2)])
@torch.no_grad()
def test_equals_the_paper_in_loops(project, kernel_size, dilation):
    module = LargeKernelAttention(4, kernel_size=kernel_size, dilation=dilation, project=project).double()
    x = torch.randn(2, 4, 5, 8, dtype=torch.double)
    weights, y = zip(*(paper(module, image) for image in x), strict=True)
    torch.testing.assert_close(module.attend(x), torch.stack(weights), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x), torch.stack(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel_size", "dilation", "field"), [(21, 3, 23), (35, 5, 39)])
def test_sees_every_pixel_of_its_field_and_none_beyond(kernel_size, dilation, field):
    module = LargeKernelAttention(2, kernel_size=kernel_size, dilation=dilation, project=False).double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1)
    x = torch.zeros(1, 2, field + 2, field + 4, dtype=torch.double, requires_grad=True)
    weights = module.attend(x)
    weights[0, 0, field // 2 + 1, field // 2 + 2].backward()
    inside = torch.zeros(field + 2, field + 4, dtype=torch.bool)
    inside[1:-1, 2:-2] = True
    assert torch.equal(x.grad[0, 0] != 0, inside)


def test_is_of_degree_two_without_biases_as_with_a_sigmoid_it_would_not_be():
    module, x = LargeKernelAttention(64, project=False).double(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    for layer in (module.local, module.distant, module.mix):
        nn.init.zeros_(layer.bias)
    torch.testing.assert_close(module(3 * x), 9 * module(x), rtol=0, atol=1e-12)
    assert torch.equal(module(0 * x), 0 * x)
    assert module.attend(x).min() < 0  # no sigmoid
    assert not torch.allclose(3 * x * module.attend(3 * x).sigmoid(), 9 * x * module.attend(x).sigmoid())


def test_follows_the_map_around_a_torus_but_not_a_permutation():
    module, x = LargeKernelAttention(8).double(), torch.randn(2, 8, 12, 14, dtype=torch.double)
    for layer, pad in ((module.local, 2), (module.distant, 9)):
        layer.padding_mode = "circular"
        layer._reversed_padding_repeated_twice = [pad] * 4
    torch.testing.assert_close(module(x.roll((2, 3), (2, 3))), module(x).roll((2, 3), (2, 3)), rtol=0, atol=1e-12)
    order = torch.randperm(12 * 14)
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert not torch.allclose(module(shuffled), module(x).flatten(2)[..., order].view_as(x))


def test_without_weights_the_projected_form_adds_a_constant():
    module, x = LargeKernelAttention(64), torch.randn(2, 64, 5, 7)
    for parameter in module.mix.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(module(x), x + module.leave.bias[:, None, None])


def test_refuses_a_dilation_that_is_not_positive():
    with pytest.raises(ValueError, match="dilation must be positive, got 0"):
        LargeKernelAttention(64, dilation=0)


@pytest.mark.parametrize(("kernel_size", "taps"), [(22, 8), (0, 0), (-21, -7)])
def test_refuses_a_kernel_without_a_middle(kernel_size, taps):
    rule = f"kernel_size must need an odd number of taps at dilation=3, got {kernel_size} with {taps}"
    with pytest.raises(ValueError, match=rule):
        LargeKernelAttention(64, kernel_size=kernel_size)
