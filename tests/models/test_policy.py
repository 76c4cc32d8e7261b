import math

import pytest
import torch
from torch.distributions import Normal

from visattn.models.policy import GaussianPolicy


def quadrature(mean: torch.Tensor, spread: float, n: int = 161) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions all over the plane, and the area of each."""
    line = torch.linspace(-8 * spread, 8 * spread, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line) + mean, (line[1] - line[0]) ** 2


def reward(actions: torch.Tensor) -> torch.Tensor:
    """What is to be had where an action leads, which is within the image."""
    where = actions.clamp(-1, 1)
    return torch.exp(-(where - torch.tensor([0.3, -0.5])).square().sum(-1)) + (where[..., 0] > 0.1)


def test_log_probabilities_and_entropy_are_those_of_a_normal_distribution():
    policy, mean, action = GaussianPolicy(3, spread=0.3), torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    normal = Normal(mean, 0.3)
    torch.testing.assert_close(policy.log_prob(mean, action), normal.log_prob(action).sum(-1))
    torch.testing.assert_close(policy.entropy(mean), normal.entropy().sum(-1))


def test_actions_spread_around_their_means_and_may_leave_the_image():
    mean = torch.tensor([0.5, -0.9]).expand(20_000, 2)
    action = GaussianPolicy(spread=0.2).sample(mean)
    torch.testing.assert_close(action.mean(0), mean[0], rtol=0, atol=0.01)
    torch.testing.assert_close(action.std(0), torch.full((2,), 0.2), rtol=0, atol=0.005)
    assert action.min() < -1


@pytest.mark.parametrize("mean", [(0.2, 0.1), (0.95, -1.2)])
def test_the_score_gives_the_gradient_of_the_expected_reward(mean):
    policy = GaussianPolicy(spread=0.25, learned=True).double()
    mean = torch.tensor(mean, dtype=torch.float64, requires_grad=True)

    def expected(shift: torch.Tensor, spread: float) -> torch.Tensor:
        normal = Normal(mean.detach() + shift, spread)
        return (normal.log_prob(actions).sum(-1).exp() * reward(actions)).sum() * area

    actions, area = quadrature(mean.detach(), 0.25)
    log_prob = policy.log_prob(mean.expand_as(actions), actions)
    (log_prob.detach().exp() * area * reward(actions) * log_prob).sum().backward()
    step = 1e-5
    for k, shift in enumerate(step * torch.eye(2, dtype=torch.float64)):
        difference = (expected(shift, 0.25) - expected(-shift, 0.25)) / (2 * step)
        assert mean.grad[k] == pytest.approx(difference.item(), abs=1e-6)
    wider, narrower = (expected(torch.zeros(2), 0.25 * math.exp(by)) for by in (step, -step))
    assert policy.log_spread.grad.sum() == pytest.approx(((wider - narrower) / (2 * step)).item(), abs=1e-6)


def test_a_score_of_the_location_instead_would_be_wrong():
    policy, mean = GaussianPolicy(spread=0.25).double(), torch.tensor([0.95, -1.2], dtype=torch.float64)
    actions, area = quadrature(mean, 0.25)
    weight = policy.log_prob(mean.expand_as(actions), actions).exp() * area * reward(actions)
    right, wrong = (((where - mean) / 0.25**2 * weight[:, None]).sum(0) for where in (actions, actions.clamp(-1, 1)))
    assert (right - wrong).abs().max() > 0.1


def test_no_gradient_goes_through_an_action():
    policy, mean = GaussianPolicy(learned=True), torch.randn(3, 2, requires_grad=True)
    assert not policy.sample(mean).requires_grad
    action = torch.randn(3, 2, requires_grad=True)
    policy.log_prob(mean, action).sum().backward()
    assert action.grad is None
    torch.testing.assert_close(mean.grad, (action - mean).detach() / 0.2**2)


def test_the_spread_narrows_by_the_same_factor_in_every_part_of_the_training():
    policy = GaussianPolicy(spread=(0.2, 0.05))
    spreads = []
    for progress in (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0):
        policy.narrow(progress)
        spreads.append(policy.spread.item())
    assert spreads == pytest.approx([0.2, 0.2, 0.2 * 4**-0.25, 0.1, 0.2 * 4**-0.75, 0.05, 0.05])
    assert torch.equal(policy.state_dict()["narrowed"], torch.tensor(0.05))
    policy = GaussianPolicy(spread=0.1)
    policy.narrow(0.7)
    assert policy.spread == pytest.approx(0.1)


def test_a_learned_spread_is_a_parameter_and_does_not_narrow():
    policy = GaussianPolicy(spread=(0.2, 0.05), learned=True)
    policy.narrow(1.0)
    torch.testing.assert_close(policy.spread, torch.full((2,), 0.2))
    assert [name for name, _ in policy.named_parameters()] == ["log_spread"]
    policy.entropy(torch.zeros(1, 2)).sum().backward()
    torch.testing.assert_close(policy.log_spread.grad, torch.ones(2))


def test_is_sampled_and_scored_in_float32_when_means_are_coarse():
    policy, mean = GaussianPolicy(spread=0.05), torch.rand(1000, 2).bfloat16()
    assert policy.log_prob(mean.float(), policy.sample(mean.float())).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spread": 0.0}, "spread must be one or two positive numbers, got 0.0"),
        ({"spread": (0.2, -0.1)}, r"spread must be one or two positive numbers, got \(0.2, -0.1\)"),
        ({"spread": math.nan}, "spread must be one or two positive numbers, got nan"),
        ({"size": 0}, "size must be at least 1, got 0"),
    ],
)
def test_refuses_what_is_no_distribution(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianPolicy(**options)
