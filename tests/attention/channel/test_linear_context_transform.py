import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import LinearContextTransform

CASES = [
    Case(LinearContextTransform, {}, lambda c: 2 * c, (128, 512), macs=lambda c, h, w: 0),
    Case(LinearContextTransform, {"groups": 1}, lambda c: 2 * c, (128, 512), macs=lambda c, h, w: 0),
]


def lively(channels: int = 64, groups: int = 8) -> LinearContextTransform:
    module = LinearContextTransform(channels, groups=groups)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def paper(module: LinearContextTransform, x: Tensor, groups: int) -> Tensor:
    """Section 3 of the paper, in loops."""
    y, width = torch.empty_like(x), x.shape[1] // groups
    for b in range(x.shape[0]):
        z = [sum(v for row in channel for v in row) / channel.numel() for channel in x[b]]
        for c in range(x.shape[1]):
            group = z[c // width * width : (c // width + 1) * width]
            mean = sum(group) / width
            deviation = torch.sqrt(sum((v - mean) ** 2 for v in group) / width + 1e-5)
            s = module.norm.weight[c] * (z[c] - mean) / deviation + module.norm.bias[c]
            y[b, c] = x[b, c] / (1 + torch.exp(-s))
    return y


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equals_the_paper_in_loops(groups):
    module, x = lively(12, groups).double(), torch.randn(2, 12, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x, groups), rtol=0, atol=1e-12)


def test_does_not_see_where_things_are_but_does_see_which_channel():
    module, x, order = lively(), torch.randn(2, 64, 5, 7), torch.randperm(64)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    assert not torch.allclose(module.attend(x[:, order]), module.attend(x)[:, order])


def test_groups_do_not_see_each_other():
    module, x = lively(), torch.randn(2, 64, 5, 7)
    moved = x.clone()
    moved[:, 20] += 1
    changed = (module.attend(moved) != module.attend(x)).any(0).flatten().nonzero().flatten()
    assert changed.tolist() == list(range(16, 24))


def test_a_fresh_module_scales_the_map():
    x = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(LinearContextTransform(64)(x), x * 0.7310586)


def test_a_flat_map_has_a_gradient():
    x = torch.ones(1, 64, 1, 1, requires_grad=True)
    assert torch.autograd.grad(lively()(x).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("groups", [0, 7, 64, 128])
def test_refuses_groups_that_leave_nothing_to_compare(groups):
    with pytest.raises(ValueError, match=f"groups must divide channels=64 into groups of two or more, got {groups}"):
        LinearContextTransform(64, groups=groups)
