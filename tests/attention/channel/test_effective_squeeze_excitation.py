import torch
from timm.layers import EffectiveSEModule
from torch import nn

from tests.attention.case import Case
from visattn import EffectiveSqueezeExcitation

CASES = [Case(EffectiveSqueezeExcitation, {}, lambda c: c * c + c, (4160, 65_792), macs=lambda c, h, w: c * c)]


def lively(channels: int = 64) -> EffectiveSqueezeExcitation:
    """With logits that reach both ends of the hard sigmoid."""
    module = EffectiveSqueezeExcitation(channels)
    nn.init.normal_(module.excite.weight, std=4)
    return module


def paper(module: EffectiveSqueezeExcitation, x: torch.Tensor) -> torch.Tensor:
    """Equation 3 of the paper, in loops, with the hard sigmoid of the released code."""
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        z = [sum(v for row in channel for v in row) / channel.numel() for channel in x[b]]
        for c in range(x.shape[1]):
            s = sum(w * v for w, v in zip(module.excite.weight[c], z, strict=True)) + module.excite.bias[c]
            y[b, c] = x[b, c] * min(max(s.item() + 3, 0), 6) / 6
    return y


def test_equals_the_paper_in_loops():
    module = lively(8).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    weights = module.attend(x)
    assert weights.min() == 0
    assert weights.max() == 1
    assert ((weights > 0) & (weights < 1)).any()
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_gate_does_not_see_where_things_are_but_does_see_which_channel():
    module, x = lively(), torch.randn(2, 64, 5, 7)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    order = torch.randperm(64)
    assert not torch.allclose(module.attend(x[:, order]), module.attend(x)[:, order])


def test_zero_weights_halve_the_map():
    module, x = EffectiveSqueezeExcitation(64), torch.randn(2, 64, 5, 7)
    nn.init.zeros_(module.excite.weight)
    nn.init.zeros_(module.excite.bias)
    assert torch.equal(module(x), x / 2)


def test_equals_timm_after_copying_weights():
    ours, theirs, x = lively(), EffectiveSEModule(64), torch.randn(2, 64, 5, 7)
    with torch.no_grad():
        theirs.fc.weight.copy_(ours.excite.weight[:, :, None, None])
        theirs.fc.bias.copy_(ours.excite.bias)
    torch.testing.assert_close(ours(x), theirs(x))
