"""What networks that look at one place after another have in common: the roll-out, and a forward made of it."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from visattn.attention.core import uncast, wide
from visattn.models.network import Classifier
from visattn.models.policy import GaussianPolicy
from visattn.models.readout import at_last, so_far

Policy = Literal["sample", "mean", "random", "centre"]


class Rollout(NamedTuple):
    """What networks saw and did on images: m roll-outs, those of an image one after the other; t glimpses.

    An action chooses a location that is then looked at. There are as many as glimpses, or one fewer where the first
    location was given or drawn without being asked.
    """

    logits: Float[Tensor, "m t k"]
    """After each glimpse, of all glimpses so far."""
    locations: Float[Tensor, "m t p"]
    """Where it looked, within the image."""
    log_probs: Float[Tensor, "m a"]
    """Log-probability of each action by the policy."""
    entropies: Float[Tensor, "m a"]
    """Entropy of the policy before each action."""
    baselines: Float[Tensor, "m a"]
    """What the network guesses, before each action, that its reward will be."""
    weights: Float[Tensor, "m t"]
    """Of each glimpse in the last logits; they sum to one."""
    halting: Float[Tensor, "m t"] | None = None
    """Probability to stop after each glimpse, where the network halts by itself; they sum to one."""
    informed: Float[Tensor, "m a"] | None = None
    """Log-probability of each action by what was told the answer, where that drew them."""

    @property
    def glimpses(self) -> Int[Tensor, "m"]:
        """How many glimpses are taken: until the probability to have stopped passes a half; without halting, all."""
        return taken(self.stops)

    @property
    def stops(self) -> Float[Tensor, "m t"]:
        """Probability to stop after each glimpse; without halting, all at the last."""
        if self.halting is not None:
            return self.halting
        return at_last(self.weights)

    @property
    def expected_glimpses(self) -> Float[Tensor, "m"]:
        """How many glimpses are taken on average."""
        return sum(t * stop for t, stop in enumerate(self.stops.unbind(1), 1))  # type: ignore[return-value]

    @property
    def decision(self) -> Float[Tensor, "m k"]:
        """The logits after the last glimpse that is taken."""
        return decided(self.logits, self.halting)


def taken(halting: Float[Tensor, "m t"]) -> Int[Tensor, "m"]:
    """Return after how many glimpses the probability to have stopped passes a half."""
    return 1 + (so_far(halting)[:, :-1] <= 0.5).sum(1)


def decided(logits: Float[Tensor, "m t k"], halting: Float[Tensor, "m t"] | None) -> Float[Tensor, "m k"]:
    """Return the logits after the last glimpse that is taken; compilers see through this, and not a tuple's own."""
    if halting is None:
        return logits[:, -1]
    return logits.gather(1, (taken(halting) - 1)[:, None, None].expand(-1, 1, logits.shape[2]))[:, 0]


class Looker(Classifier):
    """A classifier that looks at one place after another.

    Its ``forward`` is the same in every call: each action is the mean of the policy, and the first location, where the
    network begins anywhere, is the centre.
    """

    begins_anywhere: bool = False
    """Whether the first location is drawn without being asked."""
    targets: int = 1
    """How many targets it names one after another, each by the logits after the last of equally many glimpses."""
    halts: bool = False
    """Whether it learns when to stop."""
    informed: bool = False
    """Whether :meth:`rollout` takes the answer, and something that is told it draws the actions."""

    def rollout(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        rollouts: int = 1,
        policy: Policy = "sample",
        first: Float[Tensor, "m p"] | None = None,
        answer: Int[Tensor, "b"] | None = None,
    ) -> Rollout:
        """Look at images.

        Args:
            images: The images.
            rollouts: How often each is looked at.
            policy: Actions are drawn by the policy (``"sample"``), or are its ``"mean"``; or, to compare with, are
                anywhere (``"random"``) or always at the ``"centre"``, the first location, too.
            first: The first locations, of all roll-outs; None: as the network or ``policy`` has them.
            answer: The classes, if something that is told them draws the actions.
        """
        raise NotImplementedError

    @staticmethod
    def count(
        images: Float[Tensor, "b c h w"], rollouts: int, policy: Policy, first: Float[Tensor, "m p"] | None
    ) -> int:
        """Return how many roll-outs there are in all, or raise a ``ValueError``."""
        if rollouts < 1:
            raise ValueError(f"rollouts must be at least 1, got {rollouts}")
        if policy not in get_args(Policy):
            raise ValueError(f"policy must be {' or '.join(get_args(Policy))}, got {policy!r}")
        count = images.shape[0] * rollouts
        if first is not None and first.shape[0] != count:
            raise ValueError(f"first must be a location for each of {count} roll-outs, got {first.shape[0]}")
        return count


class Chooser(Looker):
    """A looker that draws locations around what a layer says of its states, and guesses from these its reward."""

    locator: nn.Linear
    policy: GaussianPolicy
    baseline: nn.Linear

    def mean(self, states: Float[Tensor, "*t m d"]) -> Float[Tensor, "*t m 2"]:
        """Return where to look next, on average, in at least float32."""
        with uncast(states.device):
            return wide(self.locator(states.to(self.locator.weight.dtype)))

    @torch.no_grad()
    def act(self, states: Float[Tensor, "m d"], policy: Policy) -> Float[Tensor, "m 2"]:
        """Return where to look next."""
        if policy in ("random", "centre"):
            return anywhere(states, policy)
        mean = self.mean(states)
        return mean if policy == "mean" else self.policy.sample(mean)

    def judge(
        self, states: Float[Tensor, "a m d"], actions: Float[Tensor, "a m 2"]
    ) -> tuple[Float[Tensor, "m a"], Float[Tensor, "m a"], Float[Tensor, "m a"]]:
        """Return log-probabilities of actions, entropies before them, and the rewards that are guessed."""
        means = self.mean(states)
        guessed = self.baseline(states.detach())[..., 0]
        return self.policy.log_prob(means, actions).T, self.policy.entropy(means).T, guessed.T


def anywhere(states: Float[Tensor, "m d"], policy: Policy) -> Float[Tensor, "m 2"]:
    """Return locations that ask nothing of states: anywhere, or the centre."""
    where = wide(states.new_zeros(states.shape[0], 2))
    return where if policy == "centre" else where.uniform_(-1, 1)
