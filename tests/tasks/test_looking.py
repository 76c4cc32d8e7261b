import math
import os
import shlex
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.distributions import Normal
from torch.multiprocessing.spawn import spawn
from torch.optim import Adam

import visattn
from visattn.data.canvas import Canvas
from visattn.models import DeepRecurrentAttention, DigitClassifier, GlanceFocus, RecurrentAttention
from visattn.models.looker import Looker, Rollout
from visattn.tasks import Looking, RunError
from visattn.tasks.command_line import run_cli
from visattn.tasks.looking import DECAY
from visattn.tasks.run import Predictions

SMALL = {"width": 24, "glimpse_width": 16, "location_width": 8, "glimpses": 3, "size": (12, 14), "patch": 6}


def built(network=None, **options) -> Looking:
    """A task with its network, outside of a training."""
    task = Looking(network or partial(RecurrentAttention, **SMALL), **options)
    task.configure_model()
    task.logged = {}
    task.log = lambda name, value, **_: task.logged.update({name: value})
    task.log_dict = lambda values, **_: task.logged.update(values)
    task.training_loss = partial(type(task).training_loss, task)
    return task


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 12, 14), torch.arange(count) * 3 % 10


def gradients(task: Looking, seed: int = 1, **factors) -> dict[str, torch.Tensor]:
    """What the loss, with other factors, asks of each part of the network."""
    task.hparams.update(factors)
    task.zero_grad()
    torch.manual_seed(seed)
    task.training_loss(batch()).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in task.model.named_parameters()
    }


def parts(found: dict[str, torch.Tensor]) -> set[str]:
    return {name.partition(".")[0] for name, gradient in found.items() if gradient.any()}


# --- a looker of which everything is known ----------------------------------------------------------------------------


class Toy(Looker):
    """Looks once, where it is told to on average; how sure it then is depends on where."""

    begins_anywhere = False

    def __init__(
        self, num_classes: int = 2, *, x: float = 0.1, y: float = -0.2, spread: float = 0.4, guess: float = 0.3
    ):
        super().__init__()
        self.num_classes, self.spread = num_classes, spread
        self.mean = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))
        self.guess = nn.Parameter(torch.tensor(guess, dtype=torch.float64))

    @staticmethod
    def logits(where: torch.Tensor) -> torch.Tensor:
        sure = 3 * where[..., 0] - 2 * where[..., 1] ** 2 + 0.5
        return torch.stack((torch.zeros_like(sure), sure), -1)

    def rollout(self, images, *, rollouts=1, policy="sample", first=None, answer=None) -> Rollout:
        m = len(images) * rollouts
        action = self.mean.detach() + self.spread * torch.randn(m, 1, 2, dtype=torch.float64) * (policy == "sample")
        normal = Normal(self.mean, self.spread)
        where = action.clamp(-1, 1)
        return Rollout(
            self.logits(where),
            where,
            normal.log_prob(action).sum(-1),
            normal.entropy().sum().expand(m, 1),
            self.guess.expand(m, 1),
            torch.ones(m, 1, dtype=torch.float64),
        )


def expected_reward(kind: str, mean: torch.Tensor, spread: float = 0.4, n: int = 801) -> torch.Tensor:
    """By a sum over all actions."""
    line = torch.linspace(-7, 7, n, dtype=torch.float64) * spread
    actions = torch.cartesian_prod(line, line)  # the same for all means: a step in the reward stays where it is
    log_p = Toy.logits(actions.clamp(-1, 1)).log_softmax(-1)[:, 1]
    rewards = {"correct": (log_p > math.log(0.5)).double(), "probability": log_p.exp(), "log_probability": log_p}
    rewards["rise"] = rewards["probability"] - 0.5
    weight = Normal(mean, spread).log_prob(actions).sum(-1).exp() * (line[1] - line[0]) ** 2
    return (weight * rewards[kind]).sum()


def toy_gradient(m: int = 150_000, **options) -> torch.Tensor:
    """The gradient that the loss gives the mean, of very many roll-outs of one image."""
    task = built(Toy, rollouts=m, policy_factor=1.0, **options)
    task.training_loss((torch.zeros(1, 1, 1, 1), torch.tensor([1]))).backward()
    return task.model.mean.grad


@pytest.mark.parametrize(
    ("reward", "baseline"),
    [
        ("correct", "learned"),
        ("probability", "none"),
        ("probability", "learned"),
        ("probability", "average"),
        ("probability", "leave_one_out"),
        ("log_probability", "leave_one_out"),
        ("rise", "learned"),
    ],
)
def test_the_loss_has_the_gradient_of_the_expected_reward(reward, baseline):
    mean, step = torch.tensor([0.1, -0.2], dtype=torch.float64), 1e-4
    differences = [
        (expected_reward(reward, mean + shift) - expected_reward(reward, mean - shift)) / (2 * step)
        for shift in step * torch.eye(2, dtype=torch.float64)
    ]
    found = toy_gradient(reward=reward, baseline=baseline)
    # 1 / σ times the deviation of the reward, by the root of the roll-outs: at most 0.005 here
    torch.testing.assert_close(-found, torch.stack(differences), rtol=0, atol=0.02)
    assert torch.stack(differences).abs().max() > 0.1


def test_two_rollouts_that_leave_one_out_are_right_on_average():
    mean, step = torch.tensor([0.1, -0.2], dtype=torch.float64), 1e-4
    task = built(Toy, rollouts=2, reward="probability", baseline="leave_one_out", policy_factor=1.0)
    task.training_loss((torch.zeros(75_000, 1, 1, 1), torch.ones(75_000, dtype=torch.long))).backward()
    for k, shift in enumerate(step * torch.eye(2, dtype=torch.float64)):
        ends = [expected_reward("probability", mean + sign * shift) for sign in (1, -1)]
        assert -task.model.mean.grad[k] == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), abs=0.02)


# --- rewards and baselines --------------------------------------------------------------------------------------------


def known() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logarithms of probabilities after each of three glimpses, of two roll-outs; answers to each; where they stop."""
    p = torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.7, 0.3]], [[0.5, 0.5], [0.1, 0.9], [0.4, 0.6]]])
    return p.log(), torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0.0, 0, 1], [0, 0, 1]])


@pytest.mark.parametrize(
    ("reward", "rewards", "after"),
    [
        ("correct", [1.0, 0.0], [[1.0, 1], [0, 0]]),
        ("probability", [0.7, 0.4], [[0.7, 0.7], [0.4, 0.4]]),
        ("log_probability", [math.log(0.7), math.log(0.4)], [[math.log(0.7)] * 2, [math.log(0.4)] * 2]),
        ("rise", [0.7, 0.4], [[0.4 + 0.1, 0.1], [-0.4 + 0.3, 0.3]]),
    ],
)
def test_an_action_has_the_rewards_that_come_after_it(reward, rewards, after):
    found = built(reward=reward).returns(*known(), 2)
    torch.testing.assert_close(found[0], torch.tensor(rewards))
    torch.testing.assert_close(found[1], torch.tensor(after))


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stops", [[0.0, 0.0, 1.0], [0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
def test_an_action_has_a_share_of_later_rises(discount, stops):
    log_p, targets, _ = known()
    _, found, _ = built(reward="rise", discount=discount).returns(log_p, targets, torch.tensor([stops] * 2), 3)
    for m, p in enumerate(log_p[:, :, 0].exp().tolist()):
        for action in range(3):
            expected = 0.0
            for t in range(action, 3):
                rise = p[t] - (p[t - 1] if t else 0.5)
                expected += discount ** (t - action) * sum(stops[t:]) * rise
            assert found[m, action].item() == pytest.approx(expected, abs=1e-6)


def test_rises_keep_their_digits_under_autocast():
    task = built(reward="rise", discount=0.5)
    plain = task.returns(*known(), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, expected in zip(task.returns(*known(), 3), plain, strict=True):
            assert torch.equal(found, expected)


def test_the_first_glimpse_rises_from_chance_where_it_was_chosen():
    _, after, _ = built(reward="rise").returns(*known(), 3)
    torch.testing.assert_close(after[:, 0], torch.tensor([0.7 - 0.5, 0.4 - 0.5]))


def test_what_may_stop_is_rewarded_for_when_it_does():
    log_p, targets, _ = known()
    stops = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    reward, *_ = built(reward="probability").returns(log_p, targets, stops, 2)
    torch.testing.assert_close(reward, torch.tensor([0.5 * 0.2 + 0.25 * 0.6 + 0.25 * 0.7, 0.1]))
    reward, *_ = built(reward="correct").returns(log_p, targets, stops, 2)
    torch.testing.assert_close(reward, torch.tensor([0.5, 0.0]))


def rollout_of(baselines: torch.Tensor) -> Rollout:
    m, a = baselines.shape
    return Rollout(
        torch.zeros(m, a + 1, 2), torch.zeros(m, a + 1, 2), baselines, baselines, baselines, torch.zeros(m, a + 1)
    )


def test_baselines():
    returns, guess = torch.rand(6, 2), torch.rand(6, 2, requires_grad=True)
    rollout = rollout_of(guess)
    assert not built(baseline="none").expected(returns, rollout).any()
    learned = built(baseline="learned").expected(returns, rollout)
    assert torch.equal(learned, guess)
    assert not learned.requires_grad
    others = built(baseline="leave_one_out", rollouts=3).expected(returns, rollout)
    for image in range(2):
        for m in range(3):
            rest = [returns[3 * image + n] for n in range(3) if n != m]
            torch.testing.assert_close(others[3 * image + m], sum(rest) / 2)


def test_the_average_is_that_of_the_steps_before():
    task, expected = built(baseline="average"), 0.0
    for _ in range(4):
        returns = torch.rand(5, 2)
        torch.testing.assert_close(task.expected(returns, rollout_of(returns)), torch.full((5, 2), expected))
        expected = DECAY * expected + (1 - DECAY) * returns.mean().item()
    assert task.state_dict()["average"] == pytest.approx(expected)
    assert "average" not in built().state_dict()


def averaging(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(Path(folder) / "port").read_text())
    dist.init_process_group("gloo", rank=rank, world_size=2)
    task, returns = built(baseline="average"), torch.full((4, 2), 3.0 * rank + 1)
    task.expected(returns, rollout_of(returns))
    torch.save(task.average, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_average_is_that_of_all_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    spawn(averaging, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        average = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert average == pytest.approx((1 - DECAY) * 2.5)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers():
    task, (images, targets) = built(), batch()
    torch.manual_seed(3)
    found = task.training_loss((images, targets))
    torch.manual_seed(3)
    rollout = task.model.rollout(images)
    p = rollout.logits[:, -1].softmax(-1)
    expected = 0.0
    for m, target in enumerate(targets):
        reward = float(p[m].argmax() == target)
        expected -= p[m, target].log() / 4
        for t in range(2):
            advantage = reward - rollout.baselines[m, t].item()
            expected -= 0.01 * rollout.log_probs[m, t] * advantage / 4
            expected += (reward - rollout.baselines[m, t]) ** 2 / 8
    torch.testing.assert_close(found, expected)
    correct = (p.argmax(1) == targets).float().mean()
    assert task.logged["train/reward"] == correct
    torch.testing.assert_close(
        task.logged["train/cross_entropy"], nn.functional.cross_entropy(rollout.logits[:, -1], targets)
    )


def test_gradients_go_only_where_the_paper_sends_them():
    task = built(baseline="none", policy_factor=0.0)
    assert parts(gradients(task)) == {"glimpse", "core", "classifier"}
    plain, chosen = gradients(task), gradients(task, policy_factor=5.0, reward="probability")
    assert {name for name in plain if not torch.equal(plain[name], chosen[name])} == {"locator.weight", "locator.bias"}
    task = built(policy_factor=0.0)
    guessed = gradients(task)
    assert parts(guessed) == {"glimpse", "core", "classifier", "baseline"}
    task.model.requires_grad_(True)
    for name, gradient in gradients(task, baseline="none").items():
        assert torch.equal(gradient, guessed[name]) == (not name.startswith("baseline")), name


@pytest.mark.parametrize(
    "options",
    [
        {"reward": "probability"},
        {"reward": "rise", "baseline": "none", "every_step": 0.5},
        {"reward": "log_probability", "entropy_factor": 0.1},
    ],
)
def test_many_rollouts_are_as_many_steps_with_one(options):
    network = partial(RecurrentAttention, **SMALL, learned_spread=True)
    folded, one = built(network, rollouts=3, policy_factor=1.0, **options), built(network, policy_factor=1.0, **options)
    one.model.load_state_dict(folded.model.state_dict())
    images, targets = batch()
    first, noise = 2 * torch.rand(12, 2) - 1, torch.randn(2, 12, 2)

    def run(task: Looking, rows: slice) -> torch.Tensor:
        drawn, look = iter(noise[:, rows]), type(task.model).rollout
        task.model.policy.sample = lambda mean: (mean + task.model.policy.spread * next(drawn)).detach()
        task.model.rollout = lambda images, **more: look(task.model, images, first=first[rows], **more)
        return task.training_loss((images, targets))

    together = run(folded, slice(None))
    together.backward()
    alone = torch.stack([run(one, slice(m, None, 3)) for m in range(3)]).mean()
    alone.backward()
    torch.testing.assert_close(together, alone)
    for (name, p), q in zip(folded.model.named_parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_every_step_adds_the_mean_of_the_earlier_cross_entropies():
    task, (images, targets) = built(policy_factor=0.0, baseline="none"), batch()
    losses = []
    for factor in (0.0, 2.0):
        task.hparams["every_step"] = factor
        torch.manual_seed(3)
        losses.append(task.training_loss((images, targets)))
    torch.manual_seed(3)
    logits = task.model.rollout(images).logits
    each = torch.stack([nn.functional.cross_entropy(logits[:, t], targets) for t in range(2)])
    torch.testing.assert_close(losses[1] - losses[0], 2.0 * each.mean())


def test_one_glimpse_needs_no_policy():
    task = built(partial(RecurrentAttention, **SMALL | {"glimpses": 1}), every_step=1.0, baseline="average")
    assert parts(gradients(task)) == {"glimpse", "core", "classifier"}
    assert task.average == 0


def test_entropy_widens_a_spread_that_is_learned():
    task = built(partial(RecurrentAttention, **SMALL, learned_spread=True), policy_factor=0.0, entropy_factor=0.5)
    torch.testing.assert_close(gradients(task)["policy.log_spread"], torch.full((2,), -0.5 * 2))  # two actions


def test_glimpses_cost_what_may_stop():
    task = built(partial(RecurrentAttention, **SMALL, halting=True), policy_factor=0.0, baseline="none")
    losses, (images, targets) = [], batch()
    for cost in (0.0, 0.7):
        task.hparams["ponder"] = cost
        torch.manual_seed(3)
        losses.append(task.training_loss((images, targets)))
    torch.manual_seed(3)
    rollout = task.model.rollout(images)
    cost = (rollout.halting * torch.tensor([1.0, 2, 3])).sum(1).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.7 * cost)
    log_p = rollout.logits.log_softmax(-1)
    truth = torch.stack([log_p[m, :, target] for m, target in enumerate(targets)])
    torch.testing.assert_close(losses[0], -(rollout.halting * truth).sum(1).mean())
    assert gradients(task, ponder=0.7)["halt.bias"] < gradients(task, ponder=50.0)["halt.bias"].abs()
    assert gradients(task, ponder=50.0)["halt.bias"] < 0  # a step down the gradient makes it stop earlier


def test_every_parameter_has_a_gradient_whatever_is_learned():
    for options in ({"baseline": "none"}, {"learning": "wake_sleep", "rollouts": 2}):
        task = built(**options)
        task.training_loss(batch()).backward()
        assert [name for name, p in task.model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "make", [partial(RecurrentAttention, **SMALL | {"glimpses": 1}), partial(DeepRecurrentAttention, glimpses=1)]
)
def test_every_parameter_that_learns_has_a_gradient_of_a_single_glimpse(make):
    task = built(make)
    side = (28, 28) if make.func is RecurrentAttention else (100, 100)
    task.training_loss((torch.rand(2, 1, *side), torch.tensor([1, 2]))).backward()
    assert [name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("reward", ["correct", "probability", "log_probability", "rise"])
def test_rewards_are_added_up_deterministically_on_a_gpu_too(reward, monkeypatch):
    task = built(partial(RecurrentAttention, **SMALL, halting=True), reward=reward, ponder=0.1)
    monkeypatch.setattr(torch.Tensor, "cumsum", None)  # which refuses floating point numbers there
    assert {"glimpse", "halt", "locator"} <= parts(gradients(task))


def test_what_looking_cannot_train_is_refused():
    with pytest.raises(ValueError, match="network must not be GlanceFocus, which Focusing trains in stages, got "):
        built(partial(GlanceFocus, backbone="test_resnet"))
    with pytest.raises(ValueError, match=r"ponder must be 0 for a network that never halts, got 0\.1"):
        built(ponder=0.1)


# --- several targets --------------------------------------------------------------------------------------------------

DEEP = partial(
    DeepRecurrentAttention,
    width=16,
    glimpse_width=12,
    filters=(4, 4, 6),
    context_filters=(2, 3, 4),
    context=10,
    patch=9,
)
THREE = partial(DEEP, size=(12, 14), targets=3, glimpses=2)


class Chain(Looker):
    """Names two targets: the first by an action, the second, that depends on both, by another."""

    targets = 2

    def __init__(self, num_classes: int = 2):
        super().__init__()
        self.num_classes, self.spread = num_classes, 0.4
        self.mean = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.float64))
        self.guess = nn.Parameter(torch.tensor([0.8, 0.3], dtype=torch.float64))

    @staticmethod
    def logits(actions: torch.Tensor) -> torch.Tensor:
        sure = 4 * actions.cumsum(-1) - 0.8
        return torch.stack((torch.zeros_like(sure), sure), -1)

    def rollout(self, images, *, rollouts=1, policy="sample", first=None, answer=None) -> Rollout:
        m = len(images) * rollouts
        actions = self.mean.detach() + self.spread * torch.randn(m, 2, dtype=torch.float64)
        log_probs = Normal(self.mean, self.spread).log_prob(actions)
        guesses, last = self.guess.expand(m, 2), torch.tensor([[0.0, 1.0]]).expand(m, 2)
        return Rollout(self.logits(actions), actions[..., None], log_probs, guesses, guesses, last)


def expected_chain(kind: str, mean: torch.Tensor, spread: float = 0.4) -> torch.Tensor:
    """What both targets are worth, the second only behind a first that is right, by a sum over all actions."""
    line = torch.linspace(-6, 6, 501, dtype=torch.float64) * spread
    actions = torch.cartesian_prod(line, line)
    p = Chain.logits(actions).softmax(-1)[..., 1]
    right = (p > 0.5).double()
    worth = right if kind == "correct" else p
    weight = Normal(mean, spread).log_prob(actions).sum(-1).exp() * (line[1] - line[0]) ** 2
    return (weight * (worth[:, 0] + right[:, 0] * worth[:, 1])).sum()


@pytest.mark.parametrize("reward", ["correct", "probability"])
def test_a_sequence_has_the_gradient_of_what_is_expected_up_to_the_first_wrong_target(reward):
    mean, step = torch.tensor([0.1, 0.2], dtype=torch.float64), 1e-3
    differences = [
        (expected_chain(reward, mean + shift) - expected_chain(reward, mean - shift)) / (2 * step)
        for shift in step * torch.eye(2, dtype=torch.float64)
    ]
    for baseline in ("none", "learned", "leave_one_out"):
        task = built(Chain, rollouts=150_000, policy_factor=1.0, reward=reward, baseline=baseline)
        task.training_loss((torch.zeros(1, 1, 1, 1), torch.tensor([[1, 1]]))).backward()
        # 1 / σ times the deviation of the reward, by the root of the roll-outs: at most 0.01 here
        torch.testing.assert_close(-task.model.mean.grad, torch.stack(differences), rtol=0, atol=0.03)
    assert torch.stack(differences).abs().max() > 0.5


@pytest.mark.parametrize("actions", [6, 5])
@pytest.mark.parametrize("reward", ["correct", "probability"])
def test_what_follows_a_wrong_target_has_no_reward(reward, actions):
    task, targets = built(THREE, reward=reward), torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1]])
    right = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0]])
    sure = 0.6 + 0.1 * torch.arange(12.0).view(4, 3) / 12
    p = torch.rand(4, 6, 2)
    for m in range(4):
        for s in range(3):  # by the last of its two glimpses
            named = targets[m, s] if right[m, s] else 1 - targets[m, s]
            p[m, 2 * s + 1, named], p[m, 2 * s + 1, 1 - named] = sure[m, s], 1 - sure[m, s]
    stops = torch.tensor([0.0, 1, 0, 1, 0, 1]).expand(4, -1)
    found = task.returns(p.log(), targets.repeat_interleave(2, 1), stops, actions)
    for m in range(4):
        worth, counts = [], []
        for s in range(3):
            counts.append(float(all(right[m, :s])))
            hit = float(right[m, s]) if reward == "correct" else p[m, 2 * s + 1, targets[m, s]].item()
            worth.append(counts[-1] * hit)
        assert found[0][m] == pytest.approx(sum(worth))
        after = [sum(worth[t // 2 :]) for t in range(6 - actions, 6)]
        assert found[1][m].tolist() == pytest.approx(after)
        assert found[2][m].tolist() == [counts[t // 2] for t in range(6 - actions, 6)]


def test_the_loss_of_a_sequence_is_the_papers():
    task, images = built(THREE, every_step=0.5, policy_factor=0.3), torch.rand(5, 1, 12, 14)
    torch.manual_seed(3)
    p = task.model.rollout(images).logits[:, 1::2].softmax(-1)
    targets = p.argmax(-1)
    targets[0, 1] += 1 - 2 * (targets[0, 1] > 4)  # wrong in the middle, at the first, at the last; else right
    targets[1, 0] += 1 - 2 * (targets[1, 0] > 4)
    targets[2, 2] += 1 - 2 * (targets[2, 2] > 4)
    wrong = [1, 0, 2, 3, 3]
    torch.manual_seed(3)
    found = task.training_loss((images, targets))
    torch.manual_seed(3)
    rollout = task.model.rollout(images)
    log_p, expected, guesses = rollout.logits.log_softmax(-1), torch.zeros(()), []
    for m in range(5):
        for s in range(3):
            expected = expected - (log_p[m, 2 * s + 1, targets[m, s]] + 0.5 * log_p[m, 2 * s, targets[m, s]]) / 5
            if s > wrong[m]:
                continue
            for t in (2 * s, 2 * s + 1):
                gap = wrong[m] - s - rollout.baselines[m, t]  # as many as are still named right
                expected = expected - 0.3 * rollout.log_probs[m, t] * gap.detach() / 5
                guesses.append(gap**2)
    torch.testing.assert_close(found, expected + torch.stack(guesses).mean())
    assert task.logged["train/reward"] == sum(wrong) / 5


def test_gradients_of_a_sequence_go_only_where_the_paper_sends_them():
    task, data = built(THREE, baseline="none", policy_factor=0.0), (torch.rand(4, 1, 12, 14), torch.zeros(4, 3).long())
    found = {}
    for factors in ({}, {"baseline": "learned"}, {"policy_factor": 1.0, "reward": "probability"}):
        task.hparams.update({"baseline": "none", "policy_factor": 0.0, "reward": "correct"} | factors)
        task.zero_grad()
        torch.manual_seed(1)
        task.training_loss(data).backward()
        found[tuple(factors)] = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    named, guessed, chosen = found.values()
    assert parts(named) == {"glimpse", "lower", "classifier"}
    assert parts(guessed) == {"glimpse", "lower", "classifier", "baseline"}
    assert parts(chosen) == {"glimpse", "lower", "classifier", "upper", "context", "locator"}


def test_many_rollouts_of_a_sequence_are_rows_of_its_targets():
    task = built(THREE, rollouts=4, reward="probability", baseline="leave_one_out")
    images, targets = torch.rand(3, 1, 12, 14), torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    torch.manual_seed(3)
    task.training_loss((images, targets))
    torch.manual_seed(3)
    logits = task.model.rollout(images, rollouts=4).logits
    each = [nn.functional.cross_entropy(logits[m, 2 * s + 1], targets[m // 4, s]) for m in range(12) for s in range(3)]
    torch.testing.assert_close(task.logged["train/cross_entropy"], 3 * torch.stack(each).mean().detach())


def test_wake_sleep_weighs_whole_sequences():
    task = built(THREE, learning="wake_sleep", rollouts=3, policy_factor=1.0)
    task.training_loss((torch.rand(2, 1, 12, 14), torch.tensor([[1, 2, 3], [4, 5, 6]]))).backward()
    found = {name: p.grad for name, p in task.model.named_parameters()}
    assert parts(found) == {"glimpse", "lower", "classifier", "upper", "context", "locator"}


# --- wake-sleep -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("informed", [False, True])
def test_wake_sleep_climbs_the_log_likelihood_that_its_rollouts_estimate(informed):
    network = partial(RecurrentAttention, **SMALL, informed=informed, spread=0.3)
    task = built(network, learning="wake_sleep", rollouts=5, policy_factor=1.0)
    task.double()
    images, targets = batch()
    torch.manual_seed(3)
    task.training_loss((images.double(), targets)).backward()
    found = {name: p.grad.clone() for name, p in task.model.named_parameters()}

    task.zero_grad()
    torch.manual_seed(3)
    rollout = task.model.rollout(images.double(), rollouts=5, answer=targets if informed else None)
    log_p = rollout.logits[:, -1].log_softmax(-1).gather(1, targets.repeat_interleave(5)[:, None])[:, 0]
    prior = rollout.log_probs.sum(1)
    drawn = (rollout.informed.sum(1) if informed else prior).detach()
    bound = (log_p + prior - drawn).view(4, 5).logsumexp(1).mean()
    without = (prior - drawn).view(4, 5).logsumexp(1).mean()  # its gradient is zero on average: the control variate
    loss = without - bound
    if informed:
        shares = (log_p + prior - drawn).detach().view(4, 5).softmax(1)
        loss = loss - (shares * rollout.informed.sum(1).view(4, 5)).sum(1).mean()
    loss.backward()
    for name, p in task.model.named_parameters():
        torch.testing.assert_close(found[name], torch.zeros_like(p) if p.grad is None else p.grad, msg=name)
    assert found["locator.weight"].any()
    assert ("guide.mean.weight" in found) == informed


def test_wake_sleep_trains_the_policy_of_a_toy():
    task = built(Toy, learning="wake_sleep", rollouts=10, policy_factor=1.0)
    images, targets = torch.zeros(16, 1, 1, 1), torch.ones(16, dtype=torch.long)
    before = expected_reward("probability", task.model.mean.detach())
    optimizer = Adam(task.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        task.training_loss((images, targets)).backward()
        optimizer.step()
    assert expected_reward("probability", task.model.mean.detach()) > before + 0.1


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def canvas():
    """Makes the data: few batches of embedded digits."""

    def make(**options) -> Canvas:
        return Canvas("plain", **{"batch_size": 128, "val_fraction": 0.05} | options)

    return make


FEW = {"limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 2}
TINY = partial(RecurrentAttention, width=24, glimpse_width=16, location_width=8, glimpses=3)


class Seen(Callback):
    """Notes the loss and the spread of every step."""

    def __init__(self):
        self.losses, self.spreads = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.spreads.append(pl_module.model.policy.spread.item())


@pytest.mark.slow
def test_learns_to_read_digits(canvas, trainer):
    task = Looking(partial(RecurrentAttention, glimpses=4), every_step=1.0, optimizer=partial(Adam, lr=3e-3))
    seen = Seen()
    run = trainer(seen, max_epochs=4)
    run.fit(task, datamodule=canvas(batch_size=32))
    assert sum(seen.losses[-5:]) < 0.8 * sum(seen.losses[:5])
    assert run.callback_metrics["val/top1"] > 0.3  # chance is 0.1
    n = len(seen.spreads)
    assert seen.spreads == pytest.approx([0.2 * 4 ** (-k / n) for k in range(n)])
    assert {"train/reward", "train/cross_entropy", "val/loss"} <= run.callback_metrics.keys()


def test_builds_the_network_for_the_data(canvas, trainer):
    task = Looking(TINY)
    trainer(fast_dev_run=True).fit(task, datamodule=canvas(size=(30, 34), in_chans=3))
    assert task.model.arguments == {
        "width": 24,
        "glimpse_width": 16,
        "location_width": 8,
        "glimpses": 3,
        "num_classes": 10,
        "in_chans": 3,
        "size": (30, 34),
    }
    assert task.labels == [str(k) for k in range(10)]
    assert Looking().network is RecurrentAttention


def test_takes_images_and_all_that_is_known_of_canvases(canvas, digits, trainer):
    run = trainer(**FEW)
    run.fit(Looking(TINY), datamodule=digits())
    assert run.callback_metrics["val/top1"].isfinite()
    trainer(fast_dev_run=True).fit(Looking(TINY), datamodule=canvas(described=True))


@pytest.fixture
def finished(canvas, trainer, tmp_path):
    task, run = Looking(TINY, baseline="average"), trainer(**FEW)
    run.fit(task, datamodule=canvas())
    return task.eval(), run, tmp_path


def test_every_form_of_a_checkpoint_gives_the_same_network(finished, canvas, trainer):
    task, _, folder = finished
    x = torch.rand(3, 1, 28, 28)
    again = Looking.load_from_checkpoint(folder / "checkpoints/last.ckpt", weights_only=True).eval()
    forms = [again, visattn.load(folder / "checkpoints/last.ckpt"), visattn.load(folder / "model")]
    for form in forms:
        assert torch.equal(form(x), task(x))
        assert form.labels == task.labels
    assert again.average == task.average > 0
    assert again.hparams["baseline"] == "average"
    assert again.model.policy.spread == task.model.policy.spread < 0.2
    assert "# RecurrentAttention" in (folder / "model/card.md").read_text()
    probabilities = trainer().predict(again, datamodule=canvas())[0]
    assert probabilities.shape == (90, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(90))


def test_trains_on_sequences_and_counts_whole_ones_and_targets(trainer, tmp_path):
    task, data = Looking(partial(DEEP, glimpses=1)), Canvas("sequences", size=(40, 60), batch_size=64)
    run = trainer(Predictions(), **FEW)
    run.fit(task, datamodule=data)
    assert (task.model.targets, task.model.num_classes, task.labels[-1]) == (4, 11, "end")
    assert task.model.begins_anywhere is False
    assert run.callback_metrics["val/top1"] <= run.callback_metrics["val/top1_target"]
    run.test(task, datamodule=data, verbose=False)
    assert {"test/top1", "test/top1_M10", "test/top1_random", "test/top1_target"} <= run.callback_metrics.keys()
    assert visattn.load(tmp_path / "model")(torch.rand(2, 1, 40, 60)).shape == (2, 4, 11)
    probabilities = torch.cat(run.predict(task, datamodule=data))
    assert probabilities.shape == (179, 4, 11)
    rows = [line.split(",") for line in (tmp_path / "predictions.csv").read_text().splitlines()]
    assert rows[0] == ["image", *(f"{what}{place}" for place in range(1, 5) for what in ("label", "probability"))]
    best = probabilities[5].max(-1)
    assert rows[6][-8::2] == [task.labels[k] for k in best.indices]
    assert rows[6][-7::2] == [f"{p:.4f}" for p in best.values]


@pytest.mark.parametrize("preset", ["pairs", "sums"])
def test_trains_on_what_two_digits_are(preset, trainer):
    task = Looking(DEEP)
    trainer(fast_dev_run=True).fit(task, datamodule=Canvas(preset, size=40, batch_size=8))
    assert (task.model.targets, task.model.num_classes) == (1, {"pairs": 55, "sums": 19}[preset])


class StopAt(Callback):
    """Ctrl-C at the start of an epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_resuming_is_as_if_nothing_had_happened(canvas, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def run(folder, *more, ckpt_path=None):
        torch.manual_seed(3)
        seen, task = Seen(), Looking(TINY, baseline="average", rollouts=2)
        runner = trainer(seen, *more, max_epochs=2, default_root_dir=tmp_path / folder, **FEW)
        with suppress(SystemExit):
            runner.fit(task, datamodule=canvas(), ckpt_path=ckpt_path)
        return seen, task

    whole, expected = run("whole")
    first, _ = run("parts", StopAt())
    second, task = run("parts", ckpt_path=tmp_path / "parts/checkpoints/last.ckpt")
    assert len(first.losses) == len(second.losses) == 3
    assert first.losses + second.losses == whole.losses
    assert first.spreads + second.spreads == whole.spreads
    for (key, a), b in zip(task.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_trains_in_bfloat16_with_all_options(canvas, trainer):
    network = partial(
        TINY, scales=2, core="lstm", halting=True, readout="attention", informed=True, learned_spread=True
    )
    task = Looking(network, learning="wake_sleep", rollouts=3, entropy_factor=0.01, every_step=0.5, ponder=0.01)
    run = trainer(precision="bf16-mixed", **FEW)
    run.fit(task, datamodule=canvas())
    assert run.callback_metrics["val/loss"].isfinite()
    assert 1 <= run.callback_metrics["val/glimpses"] <= 3


@pytest.mark.slow
def test_two_processes_train_together(canvas, trainer):
    run = trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", **FEW)
    run.fit(Looking(TINY, baseline="average"), datamodule=canvas(batch_size=16))
    assert run.callback_metrics["val/top1"].isfinite()


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_a_test_reports_every_way_to_look(finished, canvas, trainer):
    task, *_ = finished
    found = []
    for _ in range(2):
        run = trainer(**FEW)
        run.test(task, datamodule=canvas(), verbose=False)
        found.append({name: value.item() for name, value in run.callback_metrics.items()})
        torch.rand(3)
    assert found[0] == found[1]  # the same numbers are drawn in each
    assert found[0].keys() == {
        "test/loss",
        "test/top1",
        "test/top1_min",
        "test/top1_max",
        "test/top1_sampled",
        "test/top1_M10",
        "test/top1_random",
        "test/top1_centre",
    }
    assert found[0]["test/top1_min"] < found[0]["test/top1"] < found[0]["test/top1_max"]


class Scripted(Looker):
    """Says what was put into it: logits by policy, of one image after another, and all their roll-outs."""

    begins_anywhere = True

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(()))

    def rollout(self, images, *, rollouts=1, policy="sample", first=None, answer=None) -> Rollout:
        logits = self.said[policy, rollouts][:, None]
        m = len(logits)
        empty = torch.zeros(m, 0)
        return Rollout(logits, torch.zeros(m, 1, 2), empty, empty, empty, torch.ones(m, 1))


def test_averages_probabilities_and_counts_every_first_location(monkeypatch):
    task = built(Scripted, draws=4)
    # one roll-out is sure of class 2, nine prefer class 0: the mean of the logarithms would be 2, too
    p = torch.tensor([[1e-30, 1e-30, 1.0]] + [[0.6, 0.3, 0.1]] * 9)
    right = torch.eye(3)[[1, 1, 0, 1]] * 9
    task.model.said = {
        ("mean", 4): right.repeat(2, 1),
        ("sample", 10): p.log().repeat(2, 1),
        ("random", 1): torch.eye(3)[[0, 1]],
        ("centre", 1): torch.eye(3)[[2, 2]],
    }
    assert p.log().mean(0).argmax() == 2
    assert p.mean(0).argmax() == 0
    monkeypatch.setattr(type(task), "trainer", type("One", (), {"world_size": 1})())
    targets = torch.tensor([0, 1])
    task.test_step((torch.zeros(2, 1, 1, 1), targets), 0)
    scores = {name: metric.compute().item() for name, metric in task.test_scores.items()}
    assert scores == {"test/top1_sampled": 0.0, "test/top1_M10": 0.5, "test/top1_random": 1.0, "test/top1_centre": 0.0}
    task.on_test_epoch_end()
    assert [task.logged[f"test/{name}"] for name in ("top1", "top1_min", "top1_max")] == [0.5, 0.5, 0.5]
    assert len(task.draws) == 4


def test_the_mean_the_worst_and_the_best_of_the_first_locations(monkeypatch):
    task = built(Scripted, draws=2)
    task.model.said = {
        ("mean", 2): torch.eye(3)[[1, 0, 1, 1, 2, 1, 1, 0]],
        ("sample", 10): torch.zeros(40, 3),
        ("random", 1): torch.zeros(4, 3),
        ("centre", 1): torch.zeros(4, 3),
    }
    monkeypatch.setattr(type(task), "trainer", type("One", (), {"world_size": 1})())
    task.test_step((torch.zeros(4, 1, 1, 1), torch.ones(4, dtype=torch.long)), 0)
    task.on_test_epoch_end()
    assert [task.logged[f"test/{name}"] for name in ("top1", "top1_min", "top1_max")] == [0.625, 0.5, 0.75]


class Sentences(Scripted):
    """Names two targets."""

    begins_anywhere, targets = False, 2

    def rollout(self, images, *, rollouts=1, policy="sample", first=None, answer=None) -> Rollout:
        found = super().rollout(images, rollouts=rollouts, policy=policy)
        return found._replace(
            logits=found.logits[:, 0], weights=torch.tensor([[0.0, 1.0]]).expand(len(found.logits), 2)
        )


def test_a_sequence_is_right_where_all_of_it_is(monkeypatch):
    task = built(Sentences)

    def sure(*classes: list[int]) -> torch.Tensor:
        return torch.eye(3)[torch.tensor(classes)]

    targets = torch.tensor([[0, 1], [2, 2]])
    task.model.said = {
        ("mean", 1): sure([0, 2], [2, 2]),
        ("sample", 10): sure(*targets.tolist()).repeat_interleave(10, 0),
        ("random", 1): sure([0, 0], [2, 1]),
        ("centre", 1): sure([0, 0], [2, 2]),
    }
    monkeypatch.setattr(type(task), "trainer", type("One", (), {"world_size": 1})())
    images = torch.zeros(2, 1, 1, 1)
    task.validation_step((images, targets), 0)
    scores = {name: metric.compute().item() for name, metric in task.val_scores.items()}
    assert scores == {"val/top1": 0.5, "val/top1_target": 0.75}
    logits = task.model.said["mean", 1].flatten(0, 1)
    torch.testing.assert_close(task.logged["val/loss"], 2 * nn.functional.cross_entropy(logits, targets.flatten()))
    task.test_step((images, targets), 0)
    scores = {name.removeprefix("test/top1_"): metric.compute().item() for name, metric in task.test_scores.items()}
    assert scores == {"sampled": 1.0, "M10": 1.0, "random": 0.0, "centre": 0.5, "target": 0.75}
    task.on_test_epoch_end()
    assert [task.logged[f"test/{name}"] for name in ("top1", "top1_min", "top1_max")] == [0.5, 0.5, 0.5]


def test_a_network_that_begins_at_the_centre_has_one_draw():
    assert len(built(partial(RecurrentAttention, **SMALL, first="centre")).draws) == 1
    assert len(built().draws) == 8


def test_evaluation_draws_nothing_from_where_training_draws(finished):
    task, *_ = finished
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with task.repeatable(0):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"network": DigitClassifier},
            "network must be one that looks, such as RecurrentAttention, got .*DigitClassifier",
        ),
        ({"network": partial(TINY, pretrained=True)}, "pretrained must be given beside the network"),
        ({"reward": "rise", "discount": 1.5}, r"discount must lie in \[0, 1\], got 1.5"),
        ({"discount": 0.5}, "discount must be 1 for a reward of correct, which comes at the end, got 0.5"),
        ({"reward": "right"}, "reward must be one of correct, probability, log_probability, rise, got 'right'"),
        ({"baseline": "mean"}, "baseline must be one of none, average, learned, leave_one_out, got 'mean'"),
        ({"learning": "ppo"}, "learning must be reinforce or wake_sleep, got 'ppo'"),
        ({"rollouts": 0}, "rollouts must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"baseline": "leave_one_out"}, "rollouts must be at least 2 for leave_one_out, which compares them, got 1"),
        ({"learning": "wake_sleep"}, "rollouts must be at least 2 for wake_sleep, which compares them, got 1"),
        ({"ponder": -1.0}, "ponder must not be negative, got -1.0"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_options_that_cannot_be(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Looking(**options)


def test_refuses_what_does_not_fit_the_network(canvas, trainer):
    with pytest.raises(ValueError, match="learning must be wake_sleep for a network that is informed, got 'reinforce'"):
        built(partial(RecurrentAttention, informed=True))
    with pytest.raises(ValueError, match="pretrained must be false for a network without an encoder, got true"):
        trainer(fast_dev_run=True).fit(Looking(TINY, pretrained=True), datamodule=canvas())
    with pytest.raises(ValueError, match="images must be as high or wide as a patch of 40, got 28 × 28"):
        trainer(fast_dev_run=True).fit(Looking(partial(TINY, patch=40)), datamodule=canvas())
    with pytest.raises(ValueError, match="pretrained must be false for backbone 'resnet200': timm has no weights"):
        trainer(fast_dev_run=True).fit(
            Looking(partial(TINY, encoder="resnet200", patch=16), pretrained=True), datamodule=canvas()
        )


def test_what_trained_weights_expect_is_that_of_the_encoder():
    task = Looking(partial(TINY, encoder="test_resnet"), pretrained=True)
    assert task.expects().mean == (0.5, 0.5, 0.5)
    assert Looking(partial(TINY, encoder="test_resnet")).expects() is None


def test_trained_weights_are_fetched_for_a_training_and_for_nothing_else(canvas, trainer, monkeypatch):
    loaded = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: loaded.append(model))
    network = partial(TINY, encoder="test_resnet.r160_in1k", patch=16, pretrained=False)  # as a command line has it
    task = Looking(network, pretrained=True)
    trainer(fast_dev_run=True).fit(task, datamodule=canvas(batch_size=8))
    assert loaded == [task.model.glimpse.encoder]
    built(partial(network, num_classes=10), pretrained=True)
    assert len(loaded) == 1


@pytest.mark.parametrize("reward", ["probability", "log_probability", "rise"])
def test_a_reward_that_is_no_number_ends_the_run_and_says_when(reward):
    task = built(reward=reward)
    nn.init.constant_(task.model.classifier.bias, math.nan)
    with pytest.raises(RunError, match=r"reward is not finite at step 0 \(epoch 0\)"):
        task.training_loss(batch())


def test_refuses_a_sequence_whose_reward_is_no_number_and_rewards_it_cannot_have():
    task = built(THREE, reward="probability")
    nn.init.constant_(task.model.classifier[-1].bias, math.nan)
    with pytest.raises(RunError, match=r"reward is not finite at step 0 \(epoch 0\)"):
        task.training_loss((torch.rand(2, 1, 12, 14), torch.zeros(2, 3).long()))
    for reward in ("rise", "log_probability"):
        with pytest.raises(
            ValueError, match=f"correct or probability for a network of several targets, got '{reward}'"
        ):
            built(THREE, reward=reward)


@pytest.mark.parametrize(
    ("network", "labels", "message"),
    [
        (THREE, (2,), r"labels must be of shape \(2, 3\), as the network names, got \(2,\)"),
        (THREE, (2, 4), r"labels must be of shape \(2, 3\), as the network names, got \(2, 4\)"),
        (None, (2, 3), r"labels must be of shape \(2,\), as the network names, got \(2, 3\)"),
    ],
)
def test_refuses_labels_of_another_number_than_targets(network, labels, message):
    with pytest.raises(ValueError, match=message):
        built(network).on_before_batch_transfer((torch.zeros(2, 1, 12, 14), torch.zeros(labels).long()), 0)


def test_refuses_labels_out_of_range():
    with pytest.raises(ValueError, match="label 10 is out of range: the model has 10 classes, 0 to 9"):
        built().on_before_batch_transfer((torch.zeros(2, 1, 12, 14), torch.tensor([0, 10])), 0)


# --- the command line -------------------------------------------------------------------------------------------------

LINE = (
    "--task Looking --data.preset plain --model.network RecurrentAttention --model.network.width 24"
    " --model.network.glimpses 2 --data.batch_size 256 --trainer.max_epochs 1 --trainer.accelerator cpu"
    " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
)


def test_the_command_line_fits_tests_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(shlex.split(f"fit {LINE}"))
    run = Path("runs/version_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == "Looking"
    assert visattn.load(run / "model").arguments["glimpses"] == 2
    run_cli(shlex.split(f"test {LINE} --ckpt_path best"))
    run_cli(shlex.split(f"predict {LINE} --ckpt_path best"))
    assert len((run / "predictions.csv").read_text().splitlines()) == 180
