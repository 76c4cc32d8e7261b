import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import GatedChannelTransform

NORMS = ["l2", "l1"]
CASES = [
    Case(GatedChannelTransform, {}, lambda c: 3 * c, (192, 768), macs=lambda c, h, w: 0),
    Case(GatedChannelTransform, {"norm": "l1"}, lambda c: 3 * c, (192, 768), macs=lambda c, h, w: 0),
]

either_norm = pytest.mark.parametrize("norm", NORMS)


def lively(channels: int = 64, norm: str = "l2") -> GatedChannelTransform:
    module = GatedChannelTransform(channels, norm=norm)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: GatedChannelTransform, x: Tensor, norm: str) -> Tensor:
    """Equations 2 to 4 of the paper, in loops; with its other norm, section 3.2."""
    y, epsilon, (alpha, gamma, beta) = torch.empty_like(x), 1e-5, (module.alpha, module.gamma, module.beta)
    channels = x.shape[1]
    for b in range(x.shape[0]):
        values = [[v for row in channel for v in row] for channel in x[b]]
        if norm == "l2":
            s = [alpha[c] * torch.sqrt(sum(v * v for v in values[c]) + epsilon) for c in range(channels)]
            total = torch.sqrt(sum(v * v for v in s) + epsilon) / math.sqrt(channels)
        else:
            s = [alpha[c] * sum(abs(v) for v in values[c]) for c in range(channels)]
            total = (sum(abs(v) for v in s) + epsilon) / channels
        for c in range(channels):
            y[b, c] = x[b, c] * (1 + torch.tanh(gamma[c] * s[c] / total + beta[c]))
    return y


@either_norm
def test_equals_the_paper_in_loops(norm):
    module, x = lively(6, norm).double(), torch.randn(2, 6, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x, norm), rtol=0, atol=1e-12)


@either_norm
def test_gate_sees_neither_where_things_are_nor_their_sign(norm):
    module, x = lively(norm=norm), torch.randn(2, 64, 5, 7)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(module.attend(-shuffled), module.attend(x))


@either_norm
def test_channels_compete_whichever_they_are_but_each_by_its_own_parameters(norm):
    module, x, order = lively(norm=norm), torch.randn(2, 64, 5, 7), torch.randperm(64)
    assert not torch.allclose(module.attend(x[:, order]), module.attend(x)[:, order])
    twin = GatedChannelTransform(64, norm=norm)
    twin.load_state_dict({name: value[order] for name, value in module.state_dict().items()})
    torch.testing.assert_close(twin.attend(x[:, order]), module.attend(x)[:, order])
    louder = x.clone()
    louder[:, 20] *= 10
    assert (module.attend(louder) != module.attend(x)).all()  # all hear the one


@either_norm
def test_scales_with_the_map(norm):
    module, x = lively(norm=norm), torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(module(8 * x), 8 * module(x))


def test_competes_for_positive_gamma_only():
    module = GatedChannelTransform(64)
    x = torch.randn(1, 64, 5, 7) * torch.linspace(0.1, 3, 64)[:, None, None]
    size = torch.linalg.vector_norm(x, dim=(2, 3))[0]
    for gamma, descending in ((0.5, False), (-0.5, True)):
        nn.init.constant_(module.gamma, gamma)
        weights = module.attend(x)[0, :, 0, 0]
        assert torch.equal(weights.argsort(descending=descending), size.argsort())


@either_norm
def test_a_map_of_zeros_stays_and_has_a_gradient(norm):
    x = torch.zeros(2, 64, 5, 7, requires_grad=True)
    y = lively(norm=norm)(x)
    assert torch.equal(y, x)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@either_norm
def test_norms_of_halves_do_not_overflow(norm):
    module, x = lively(norm=norm), torch.full((1, 64, 56, 56), 30.0)
    assert x.square().sum((2, 3)).max() > 65504
    expected = module.attend(x)
    torch.testing.assert_close(module.half().attend(x.half()), expected, rtol=5e-3, atol=0)


def test_refuses_an_unknown_norm(unchecked):
    with pytest.raises(ValueError, match="norm must be 'l2' or 'l1', got 'max'"):
        GatedChannelTransform(64, norm="max")
