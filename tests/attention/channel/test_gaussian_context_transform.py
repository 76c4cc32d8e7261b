import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import GaussianContextTransform

CASES = [
    Case(GaussianContextTransform, {}, lambda c: 0, (0, 0), macs=lambda c, h, w: 0),
    Case(GaussianContextTransform, {"sigma": (1.0, 3.0)}, lambda c: 1, (1, 1), macs=lambda c, h, w: 0),
]


def paper(x: Tensor, sigma: float) -> Tensor:
    """Section 3 of the paper, in loops."""
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        z = [sum(v for row in channel for v in row) / channel.numel() for channel in x[b]]
        mean = sum(z) / len(z)
        deviation = torch.sqrt(sum((v - mean) ** 2 for v in z) / len(z) + 1e-5)
        for c in range(x.shape[1]):
            y[b, c] = x[b, c] * torch.exp(-(((z[c] - mean) / deviation) ** 2) / (2 * sigma**2))
    return y


@pytest.mark.parametrize("sigma", [2.0, 0.7])
def test_equals_the_paper_in_loops(sigma):
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    torch.testing.assert_close(GaussianContextTransform(8, sigma=sigma)(x), paper(x, sigma), rtol=0, atol=1e-12)


def test_learns_how_wide_within_bounds():
    module, x = GaussianContextTransform(8, sigma=(1.0, 3.0)).double(), torch.randn(2, 8, 3, 5, dtype=torch.double)
    for theta, sigma in ((0.0, 2.0), (-1.0, 1 + 2 / (1 + math.e)), (-100.0, 1.0), (100.0, 3.0)):
        nn.init.constant_(module.theta, theta)
        torch.testing.assert_close(module(x), paper(x, sigma), rtol=0, atol=1e-12)


def test_weighs_one_at_the_mean_and_less_a_deviation_away():
    z = torch.tensor([-1.0, 1.0, 0.0, -1.0, 1.0, 0.0, 0.0]) * math.sqrt(7 / 4)  # of variance one
    module, x = GaussianContextTransform(7), z[:, None, None].expand(1, 7, 5, 7)
    weights = module.attend(x)[0, :, 0, 0]
    at_mean, away = weights[2], weights[0]
    assert at_mean == 1
    torch.testing.assert_close(away, torch.tensor(math.exp(-7 / 4 / 8)), rtol=1e-4, atol=0)
    wrong = torch.exp(-z.square() * 2 / 2)  # where sigma multiplies instead
    assert (wrong - weights).abs().max() > 0.5


def test_a_deviation_away_weighs_what_the_gaussian_says():
    x = torch.tensor([-1.0, 1.0])[:, None, None].expand(1, 2, 5, 7)
    torch.testing.assert_close(
        GaussianContextTransform(2).attend(x), torch.full((1, 2, 1, 1), 0.8825), rtol=1e-4, atol=0
    )


def test_follows_positions_and_channels_but_not_a_change_of_one():
    module, x, order = GaussianContextTransform(64), torch.randn(2, 64, 5, 7), torch.randperm(64)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    torch.testing.assert_close(module.attend(x[:, order]), module.attend(x)[:, order])
    assert not torch.allclose(module.attend(x * torch.linspace(0.1, 3, 64)[:, None, None]), module.attend(x))


def test_sees_channels_beside_each_other_only():
    module, x = GaussianContextTransform(64), 3 * torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(module.attend(5 * x + 2), module.attend(x), rtol=1e-3, atol=1e-3)


def test_channels_of_one_mean_weigh_one_and_have_a_gradient():
    x = torch.ones(2, 64, 5, 7, requires_grad=True)
    y = GaussianContextTransform(64)(x)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("sigma", [0.0, -1.0, (0.0, 2.0), (2.0, 2.0), (3.0, 1.0)])
def test_refuses_a_width_that_is_none(sigma):
    with pytest.raises(ValueError, match=r"sigma must be positive, or two ascending positive bounds, got "):
        GaussianContextTransform(64, sigma=sigma)
