"""The recurrent attention model: glimpses of an image, one after another, chosen by what was seen before."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from visattn.attention.core import uncast, wide
from visattn.attention.sampling.retina import Retina
from visattn.models.looker import Chooser, Policy, Rollout, anywhere, decided
from visattn.models.network import at_least_one, headless
from visattn.models.policy import GaussianPolicy
from visattn.models.readout import Halting, Readout, read_out, scorer

Core = Literal["rnn", "lstm"]
First = Literal["random", "centre"]


class RecurrentAttention(Chooser):
    r"""Look at an image by glimpses, each where what was seen before says, and classify what was seen.

    .. math:: g_t = \bigl(W_1 (W_\rho\, \rho(x, l_t))_+ + W_2 (W_l\, l_t)_+\bigr)_+, \quad
        h_t = (W_h h_{t-1} + W_g g_t)_+, \quad \mu_{t+1} = W_\mu h_t, \quad z = W_z h_T

    The paper's (arXiv:1406.6247) for classification; :math:`\rho` is a
    :class:`~visattn.attention.sampling.retina.Retina`, :math:`\mu` the mean of a
    :class:`~visattn.models.policy.GaussianPolicy`. Biases are not written. The gradient of the logits reaches all but
    what chooses locations and what guesses the reward: these see the states, and change nothing in them, which the
    paper leaves open. With defaults but 12×12 pixels it has 256,781 parameters at 3 scales, 275,213 at 4.

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
        for name, given, kinds in (("core", core, Core), ("first", first, First)):
            if given not in get_args(kinds):
                raise ValueError(f"{name} must be {' or '.join(get_args(kinds))}, got {given!r}")
        if (pretrained or encoder_args) and not encoder:
            raise ValueError("pretrained and encoder_args must be left out without an encoder")
        self.num_classes = num_classes
        self.glimpses = glimpses
        self.begins_anywhere = first == "random"
        self.readout = readout
        self.halts = halting
        self.informed = informed
        self.sensor = Retina(patch, scales=scales, zoom=zoom)
        self.sensor.prepare(torch.empty(1, in_chans, *size, device="meta"))  # raises if they are too small
        reader = None
        if encoder:
            reader, known = headless("encoder", encoder, encoder_args, in_chans=in_chans, pretrained=pretrained)
            self.arguments |= known
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
        self.score = scorer(readout, width)
        self.halt = Halting(width) if halting else None
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
            drawn = policy == "random" or (self.begins_anywhere and policy != "centre")
            first = anywhere(images.new_zeros(count, 1), "random" if drawn else "centre")
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
            if t + 1 == self.glimpses or (early and self.halt is not None and self.halt.over(states)):
                break
            actions.append(self.act(states[-1], policy, answer))
        h, done = torch.stack(states), torch.stack(actions)  # time comes first, so that both are read in one piece
        read, weights = read_out(h, self.readout, self.score)
        known, chosen = h[:-1].detach(), done[1:]
        return Rollout(
            self.classifier(read).transpose(0, 1),
            done.clamp(-1, 1).transpose(0, 1),
            *self.judge(known, chosen),
            weights,
            None if self.halt is None else self.halt.probabilities(h),
            None if answer is None else self.policy.log_prob(self._told(known, answer), chosen).T,
        )

    @torch.no_grad()
    def act(
        self, states: Float[Tensor, "m d"], policy: Policy, answer: Int[Tensor, "m"] | None = None
    ) -> Float[Tensor, "m 2"]:
        return super().act(states, policy) if answer is None else self.policy.sample(self._told(states, answer))

    def _told(self, states: Float[Tensor, "*t m d"], answer: Int[Tensor, "m"]) -> Float[Tensor, "*t m 2"]:
        """Return where to look next, on average, by what is told the answer."""
        with uncast(states.device):
            return wide(self.guide(states.to(self.locator.weight.dtype), answer))  # type: ignore[misc]


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
        state = torch.zeros_like(vector) if state is None else state  # so keep has a gradient if this is all
        return (self.take(vector) + self.keep(state)).relu()


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
