"""The recurrent attention model: glimpses of an image, one after another, chosen by what was seen before."""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import softmax, uncast, wide
from visattn.attention.sampling.retina import Retina
from visattn.models.looker import Looker, Policy, Rollout, decided
from visattn.models.network import at_least_one, named
from visattn.models.policy import GaussianPolicy

Core = Literal["rnn", "lstm"]
First = Literal["random", "centre"]
Readout = Literal["last", "mean", "attention"]


class RecurrentAttention(Looker):
    r"""Look at an image by glimpses, each where what was seen before says, and classify what was seen.

    .. math:: g_t = \bigl(W_1 (W_\rho\, \rho(x, l_t))_+ + W_2 (W_l\, l_t)_+\bigr)_+, \quad
        h_t = (W_h h_{t-1} + W_g g_t)_+, \quad \mu_{t+1} = W_\mu h_t, \quad z = W_z h_T

    The paper's (arXiv:1406.6247) for classification; :math:`\rho` is a :class:`~visattn.attention.sampling.Retina`,
    :math:`\mu` the mean of a :class:`~visattn.models.policy.GaussianPolicy`. Biases are not written. The gradient of
    the logits reaches all but what chooses locations and what guesses the reward: these see the states, and change
    nothing in them, which the paper leaves open. With defaults but 12×12 pixels it has 256,781 parameters at 3 scales,
    275,213 at 4.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the images.
        size: Height and width of the images.
        glimpses: How many glimpses are taken.
        patch: Height and width of a patch, in pixels.
        scales: How many patches a glimpse has, each of a wider part of the image.
        zoom: How much wider each is than the one before.
        width: Components of a glimpse's vector, and of the state.
        glimpse_width: Components of what is made of the patches, before the location is added.
        location_width: Components of what is made of the location.
        core: ``"rnn"``, or ``"lstm"``.
        encoder: Name of a timm model that reads patches first, each for itself, so that trained weights can be used;
            what it makes of all scales is put together.
        encoder_args: Arguments of ``timm.create_model``, such as ``img_size``.
        pretrained: Whether the encoder starts with its trained weights.
        spread: Standard deviation of locations around what the state says, in units of half the image; or the first
            and the last of a training, since the paper does not say it.
        learned_spread: Whether it is learned.
        first: The first location: ``"random"``, anywhere, as in the paper; or the ``"centre"``.
        readout: What is classified after a glimpse: the ``"last"`` state, the ``"mean"`` of all so far, or their sum by
            weights of ``"attention"``.
        halting: Whether a probability to stop follows from each state (arXiv:2107.05407); :meth:`forward` stops where
            that to have stopped passes a half.
        informed: Whether there is, for wake-sleep training (arXiv:1509.06812), something that is told the answer and
            draws locations.

    Raises:
        ValueError: If an option is out of its range, or images are smaller than a patch.

    Example:
        >>> network = RecurrentAttention(10)
        >>> rollout = network.rollout(torch.rand(2, 1, 28, 28), rollouts=3)
        >>> rollout.logits.shape, rollout.locations.shape, rollout.log_probs.shape
        (torch.Size([6, 6, 10]), torch.Size([6, 6, 2]), torch.Size([6, 5]))
        >>> sum(p.numel() for p in network.parameters())
        209677
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_chans: int = 1,
        size: tuple[int, int] = (28, 28),
        glimpses: int = 6,
        patch: int = 8,
        scales: int = 1,
        zoom: int = 2,
        width: int = 256,
        glimpse_width: int = 128,
        location_width: int = 128,
        core: Core = "rnn",
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        spread: float | tuple[float, float] = (0.2, 0.05),
        learned_spread: bool = False,
        first: First = "random",
        readout: Readout = "last",
        halting: bool = False,
        informed: bool = False,
    ):
        super().__init__()
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        counts = {"num_classes": num_classes, "in_chans": in_chans, "glimpses": glimpses, "patch": patch}
        counts |= {"scales": scales, "width": width, "glimpse_width": glimpse_width, "location_width": location_width}
        at_least_one(**counts)
        for name, given, kinds in (("core", core, Core), ("first", first, First), ("readout", readout, Readout)):
            if given not in get_args(kinds):
                raise ValueError(f"{name} must be {' or '.join(get_args(kinds))}, got {given!r}")
        if (pretrained or encoder_args) and not encoder:
            raise ValueError("pretrained and encoder_args must be left out without an encoder")
        self.num_classes = num_classes
        self.glimpses = glimpses
        self.begins_anywhere = first == "random"
        self.readout = readout
        self.informed = informed
        self.sensor = Retina(patch, scales=scales, zoom=zoom)
        self.sensor.prepare(torch.empty(1, in_chans, *size, device="meta"))  # raises if they are too small
        reader = None
        if encoder:
            options = encoder_args or {}
            reader = named("encoder", encoder, num_classes=0, in_chans=in_chans, pretrained=pretrained, **options)
        self.glimpse = GlimpseNetwork(
            in_chans,
            patch=patch,
            scales=scales,
            widths=(glimpse_width, location_width, width),
            encoder=reader,
        )
        self.core: nn.Module = RectifiedCell(width) if core == "rnn" else nn.LSTMCell(width, width)
        self.locator = nn.Linear(width, 2)
        self.policy = GaussianPolicy(spread=spread, learned=learned_spread)
        self.classifier = nn.Linear(width, num_classes)
        self.baseline = nn.Linear(width, 1)
        self.score = nn.Linear(width, 1) if readout == "attention" else None
        self.halt = nn.Linear(width, 1) if halting else None
        if self.halt:
            nn.init.constant_(self.halt.bias, -2.0)  # looks for long at first
        self.guide = Guide(width, num_classes) if informed else None

    def rollout(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        rollouts: int = 1,
        policy: Policy = "sample",
        first: Float[Tensor, "m 2"] | None = None,
        answer: Int[Tensor, "b"] | None = None,
    ) -> Rollout:
        count = self.count(images, rollouts, policy, first)
        if answer is not None and not (self.guide and policy == "sample"):
            raise ValueError("answer must be None unless the network is informed, and samples")
        if first is None:
            anywhere = policy == "random" or (self.begins_anywhere and policy != "centre")
            first = self._act(images.new_zeros(count, 2), "random" if anywhere else "centre")
        else:
            self.sensor.refuse_astray(first)
        return self._look(images, first, policy, None if answer is None else answer.repeat_interleave(rollouts))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        rollout = self._look(images, images.new_zeros(images.shape[0], 2), "mean", early=True)
        return decided(rollout.logits, rollout.halting)

    def _look(
        self, images: Tensor, first: Tensor, policy: Policy, answer: Tensor | None = None, *, early: bool = False
    ) -> Rollout:
        """Look from first locations on; what can be done for all glimpses at once is done behind the loop."""
        prepared = self.sensor.prepare(images)
        actions = [wide(first)]
        states: list[Tensor] = []
        state = None
        for t in range(self.glimpses):
            where = actions[-1].clamp(-1, 1)
            state = self.core(self.glimpse(self.sensor(prepared, where), where), state)
            states.append(state[0] if isinstance(state, tuple) else state)
            if t + 1 == self.glimpses or (early and self._stopped(states)):
                break
            with torch.no_grad():
                actions.append(self._act(states[-1], policy, answer))
        h, done = torch.stack(states), torch.stack(actions)  # time comes first, so that both are read in one piece
        logits, weights = self._read(h)
        known, chosen = h[:-1].detach(), done[1:]
        means = self._mean(known)
        return Rollout(
            logits.transpose(0, 1),
            done.clamp(-1, 1).transpose(0, 1),
            self.policy.log_prob(means, chosen).T,
            self.policy.entropy(means).T,
            self.baseline(known)[..., 0].T,
            weights,
            None if self.halt is None else stopping(self.halt(h)[..., 0].T),
            None if answer is None else self.policy.log_prob(self._mean(known, answer), chosen).T,
        )

    def _mean(self, states: Tensor, answer: Tensor | None = None) -> Tensor:
        """Return where to look next, on average."""
        with uncast(states.device):
            states = states.to(self.locator.weight.dtype)
            mean = self.locator(states) if answer is None else self.guide(states, answer)  # type: ignore[misc]
        return wide(mean)

    def _act(self, states: Tensor, policy: Policy, answer: Tensor | None = None) -> Tensor:
        if policy in ("random", "centre"):
            where = states.new_zeros(states.shape[0], 2, dtype=torch.promote_types(states.dtype, torch.float32))
            return where if policy == "centre" else where.uniform_(-1, 1)
        mean = self._mean(states, answer)
        return mean if policy == "mean" else self.policy.sample(mean)

    def _read(self, states: Float[Tensor, "t m d"]) -> tuple[Float[Tensor, "t m k"], Float[Tensor, "m t"]]:
        """Return the logits after each glimpse, and the weights of all glimpses in the last."""
        count, rows = states.shape[:2]
        if self.readout == "last":
            return self.classifier(states), F.pad(states.new_zeros(rows, count - 1), (0, 1), value=1)
        scores = states.new_zeros(rows, count) if self.score is None else self.score(states)[..., 0].T
        later = torch.ones(count, count, dtype=torch.bool, device=states.device).triu(1)
        weights = softmax(scores[:, None].masked_fill(later, -torch.inf))
        read = weights.to(states.dtype) @ states.transpose(0, 1)
        return self.classifier(read).transpose(0, 1), weights[:, -1]

    def _stopped(self, states: list[Tensor]) -> bool:
        """Say whether all have stopped, more likely than not; a compiler is not asked, and goes on."""
        if self.halt is None or torch.compiler.is_compiling():
            return False
        go = F.logsigmoid(-self.halt(torch.stack(states))[..., 0]).sum(0)
        return bool((go < math.log(0.5)).all())


class GlimpseNetwork(nn.Module):
    """Turn the patches of a glimpse, and where they are, into a vector.

    Args:
        channels: Channels of the patches.
        patch: Height and width of a patch.
        scales: How many patches there are.
        widths: Components of what is made of the patches, of the location, and of both.
        encoder: What makes a vector of each patch.
    """

    def __init__(
        self, channels: int, *, patch: int, scales: int, widths: tuple[int, int, int], encoder: nn.Module | None
    ):
        super().__init__()
        self.encoder = encoder
        features = channels * patch**2 if encoder is None else vectors(encoder, (channels, patch, patch))
        self.see = nn.Linear(scales * features, widths[0])
        self.place = nn.Linear(2, widths[1])
        self.join_seen = nn.Linear(widths[0], widths[2])
        self.join_place = nn.Linear(widths[1], widths[2])

    def forward(self, patches: Float[Tensor, "m k c g g"], where: Float[Tensor, "m 2"]) -> Float[Tensor, "m d"]:
        if self.encoder is not None:
            patches = self.encoder(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        seen = self.see(patches.flatten(1)).relu()
        place = self.place(where.to(self.place.weight.dtype)).relu()
        return (self.join_seen(seen) + self.join_place(place)).relu()


class RectifiedCell(nn.Module):
    """The paper's core: a state from the one before, which at first is zero, and a vector, rectified.

    It starts with keeping all of the state (arXiv:1504.00941), which the paper leaves open: the first epochs gain most.

    Args:
        width: Components of both.
    """

    def __init__(self, width: int):
        super().__init__()
        self.keep = nn.Linear(width, width)
        self.take = nn.Linear(width, width)
        nn.init.eye_(self.keep.weight)
        nn.init.zeros_(self.keep.bias)

    def forward(self, vector: Float[Tensor, "m d"], state: Float[Tensor, "m d"] | None) -> Float[Tensor, "m d"]:
        kept = self.keep.bias if state is None else self.keep(state)
        return (self.take(vector) + kept).relu()


class Guide(nn.Module):
    """Say where to look next from the state, and from the answer.

    Args:
        width: Components of the state.
        num_classes: How many answers there are.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.state = nn.Linear(width, width)
        self.answer = nn.Embedding(num_classes, width)
        self.mean = nn.Linear(width, 2)

    def forward(self, states: Float[Tensor, "*t m d"], answer: Int[Tensor, "m"]) -> Float[Tensor, "*t m 2"]:
        return self.mean((self.state(states) + self.answer(answer)).relu())


def stopping(scores: Float[Tensor, "m t"]) -> Float[Tensor, "m t"]:
    r"""Return the probability to stop at each step, of scores whose sigmoids are those if there is such a step at all.

    .. math:: p_t = \lambda_t \prod_{s<t} (1 - \lambda_s)

    The last step takes what is left.

    Example:
        >>> stopping(torch.tensor([[0.0, 0.0, -9.0]]))
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    scores = wide(scores)
    going = F.pad(F.logsigmoid(-scores[:, :-1]).cumsum(1), (1, 0))
    return (going + F.pad(F.logsigmoid(scores[:, :-1]), (0, 1))).exp()


def vectors(encoder: nn.Module, size: tuple[int, int, int]) -> int:
    """Return how many features an encoder makes of a patch."""
    training = encoder.training
    try:
        with torch.no_grad():
            return encoder.eval()(torch.zeros(1, *size)).shape[1]
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"encoder {type(encoder).__name__} cannot read patches of {size}: {reason}") from error
    finally:
        encoder.train(training)
