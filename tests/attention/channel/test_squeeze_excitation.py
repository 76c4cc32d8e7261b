import pytest
import torch
from timm.layers import SEModule

from tests.attention.case import Case
from visattn import SqueezeExcitation

CASES = [
    Case(SqueezeExcitation, {}, lambda c: c * c // 8 + c // 16 + c, (580, 8464), macs=lambda c, h, w: c * c // 8),
    Case(SqueezeExcitation, {"bias": False}, lambda c: c * c // 8, (512, 8192), macs=lambda c, h, w: c * c // 8),
]


def paper(module: SqueezeExcitation, x: torch.Tensor) -> torch.Tensor:
    """Section 3 of the paper, in loops."""
    y = torch.empty_like(x)
    w1, b1, w2, b2 = module.squeeze.weight, module.squeeze.bias, module.excite.weight, module.excite.bias
    for b in range(x.shape[0]):
        z = [sum(v for row in channel for v in row) / channel.numel() for channel in x[b]]
        hidden = [
            max(sum(w * v for w, v in zip(ws, z, strict=True)) + bias, torch.zeros(()))
            for ws, bias in zip(w1, b1, strict=True)
        ]
        for c in range(x.shape[1]):
            s = sum(w * v for w, v in zip(w2[c], hidden, strict=True)) + b2[c]
            y[b, c] = x[b, c] / (1 + torch.exp(-s))
    return y


def test_equals_the_paper_in_loops():
    module = SqueezeExcitation(8, reduction=2).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_gate_does_not_see_where_things_are_but_does_see_which_channel():
    module, x = SqueezeExcitation(64), torch.randn(2, 64, 5, 7)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    order = torch.randperm(64)
    assert not torch.allclose(module.attend(x[:, order]), module.attend(x)[:, order])


def test_zero_second_layer_halves_the_map():
    module, x = SqueezeExcitation(64), torch.randn(2, 64, 5, 7)
    torch.nn.init.zeros_(module.excite.weight)
    torch.nn.init.zeros_(module.excite.bias)
    assert torch.equal(module(x), x / 2)


def test_equals_timm_after_copying_weights():
    ours, theirs, x = SqueezeExcitation(64), SEModule(64, rd_divisor=1), torch.randn(2, 64, 5, 7)
    with torch.no_grad():
        for mine, its in ((ours.squeeze, theirs.fc1), (ours.excite, theirs.fc2)):
            its.weight.copy_(mine.weight[:, :, None, None])
            its.bias.copy_(mine.bias)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        SqueezeExcitation(64, reduction=reduction)
