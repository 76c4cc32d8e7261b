import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import SpatialGroupEnhance

CASES = [
    Case(
        SpatialGroupEnhance,
        {"groups": groups},
        lambda c, groups=groups: 2 * groups,
        (2 * groups,) * 2,
        macs=lambda c, h, w: c * h * w,
        small=max(16, groups),
    )
    for groups in (8, 64)
]


def lively(channels: int = 64, groups: int = 8) -> SpatialGroupEnhance:
    module = SpatialGroupEnhance(channels, groups=groups).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def paper(module: SpatialGroupEnhance, x: Tensor) -> Tensor:
    """The paper's equations, in loops; with the standard deviation of the released code."""
    y, size = torch.empty_like(x), x.shape[1] // module.groups
    for b in range(x.shape[0]):
        for g in range(module.groups):
            group = x[b, g * size : (g + 1) * size]
            mean = [sum(v for row in channel for v in row) / channel.numel() for channel in group]
            s = [
                sum(group[c, p, q] * mean[c] for c in range(size))
                for p, q in torch.cartesian_prod(*map(torch.arange, group.shape[1:]))
            ]
            centre = sum(s) / len(s)
            deviation = torch.sqrt(sum((v - centre) ** 2 for v in s) / (len(s) - 1)) + 1e-5
            gate = [1 / (1 + torch.exp(-(module.weight[g] * (v - centre) / deviation + module.bias[g]))) for v in s]
            y[b, g * size : (g + 1) * size] = group * torch.stack(gate).view(group.shape[1:])
    return y


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 1e-3])  # the smaller, the more it matters where ε is added
def test_equals_the_paper_in_loops(scale):
    module, x = lively(12, 3), scale * torch.randn(2, 12, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_starts_at_the_same_weight_everywhere():
    x = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(SpatialGroupEnhance(64).attend(x), torch.full_like(x, 0.7310586))


def test_follows_positions_and_groups_wherever_they_go_but_not_channels():
    module, x = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    order, groups = torch.randperm(35), [5, 0, 3, 1, 7, 2, 4, 6]
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x).flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(module(x.roll(3, 1).roll(-3, 1)), module(x))
    assert not torch.allclose(module(x.roll(3, 1)), module(x).roll(3, 1))
    nn.init.constant_(module.weight, 0.5)
    nn.init.constant_(module.bias, -0.5)
    swapped = module(x.unflatten(1, (8, 8))[:, groups].flatten(1, 2))
    torch.testing.assert_close(swapped, module(x).unflatten(1, (8, 8))[:, groups].flatten(1, 2))


def test_weights_do_not_see_the_scale_of_a_map():
    module, x = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    torch.testing.assert_close(module.attend(3 * x), module.attend(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_a_flat_map_weighs_by_the_bias_and_has_a_gradient(size):
    module, x = lively(), torch.ones(2, 64, *size, dtype=torch.double, requires_grad=True)
    weights = module.attend(x)
    torch.testing.assert_close(weights, module.bias.sigmoid()[:, None, None].expand_as(weights))
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("groups", [0, 48])
def test_refuses_groups_that_do_not_divide_the_channels(groups):
    with pytest.raises(ValueError, match=f"groups must divide channels=64, got {groups}"):
        SpatialGroupEnhance(64, groups=groups)


@pytest.mark.parametrize(("channels", "groups"), [(64, 64), (24, 8), (7, 1)])
def test_takes_as_many_groups_as_divide_the_channels_if_it_is_free_to(channels, groups):
    assert SpatialGroupEnhance(channels).groups == groups
