"""Ba, Mnih, Kavukcuoglu: Multiple Object Recognition with Visual Attention (ICLR 2015)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import wide
from visattn.attention.sampling.retina import Retina
from visattn.models.looker import Chooser, Policy, Rollout, anywhere, decided
from visattn.models.network import at_least_one, headless
from visattn.models.policy import GaussianPolicy
from visattn.models.readout import Halting, Readout, read_out, scorer
from visattn.models.recurrent_attention import vectors

KERNELS = (5, 3, 3)
LEAST = 1 + sum(kernel - 1 for kernel in KERNELS)
"""Height and width that convolutions without padding need."""


class DeepRecurrentAttention(Chooser):
    r"""Look at an image by glimpses, with one memory for what was seen and another for where to look, and name targets.

    .. math:: g_t = (G_\rho\, \rho(x, l_t))_+ \odot (G_l\, l_t)_+, \quad r^1_t = \mathrm{LSTM}_1(g_t, r^1_{t-1}), \quad
        r^2_t = \mathrm{LSTM}_2(r^1_t, r^2_{t-1})

    .. math:: \mu_{t+1} = W_\mu r^2_t, \quad z_t = W_z (W_h r^1_t)_+, \quad r^1_0 = 0, \quad r^2_0 = C(x)

    (arXiv:1412.7755). :math:`\rho` is a :class:`~visattn.attention.sampling.retina.Retina`, :math:`G_\rho` three
    convolutions and a layer, :math:`\mu` the mean of a :class:`~visattn.models.policy.GaussianPolicy`. Biases are not
    written. The context :math:`C`, three convolutions and a layer on the image made small, says where to look first,
    which is an action like all others, and reaches no logits but by where was looked. It is the cell of :math:`r^2_0`,
    whose state is its tanh; that, and how many filters there are but for glimpses of house numbers, the paper leaves
    open.

    The gradient of the logits reaches the glimpses, the first memory and the classifier; that of where was looked goes
    on from the second memory and the context to the first, as in the paper. What guesses the reward changes no memory.

    Several targets are named one after another, each by the logits after the last of its glimpses.

    Args:
        num_classes: Number of classes, of which one may say that there is no further target.
        in_chans: Channels of the images.
        size: Height and width of the images.
        targets: How many targets are named.
        glimpses: How many glimpses are taken for each.
        patch: Height and width of a patch, in pixels.
        scales: How many patches a glimpse has, each of a wider part of the image.
        zoom: How much wider each is than the one before.
        width: Components of each memory, and of the classifier's hidden layer.
        glimpse_width: Components of a glimpse's vector.
        filters: Filters of the convolutions that read patches, all scales together.
        encoder: Name of a timm model that reads patches instead, each for itself, so that trained weights can be used;
            what it makes of all scales is put together.
        encoder_args: Arguments of ``timm.create_model``, such as ``img_size``.
        pretrained: Whether the encoder starts with its trained weights.
        context: Height and width of the image that the context is made of; None: there is none, and the first location
            is anywhere.
        context_filters: Filters of the context's convolutions.
        spread: Standard deviation of locations around what the memory says, in units of half the image; or the first
            and the last of a training.
        learned_spread: Whether it is learned.
        readout: What is classified after a glimpse: the ``"last"`` state as in the paper, the ``"mean"`` of all since
            the target before, or their sum by weights of ``"attention"``.
        halting: Whether a probability to stop follows from each state (arXiv:2107.05407), for one target;
            :meth:`forward` stops where that to have stopped passes a half.

    Raises:
        ValueError: If an option is out of its range, or images are smaller than a patch.

    Example:
        >>> network = DeepRecurrentAttention(11, targets=3, glimpses=2)
        >>> rollout = network.rollout(torch.rand(2, 1, 100, 100), rollouts=5)
        >>> rollout.logits.shape, rollout.locations.shape, rollout.log_probs.shape
        (torch.Size([10, 6, 11]), torch.Size([10, 6, 2]), torch.Size([10, 6]))
        >>> network(torch.rand(2, 1, 100, 100)).shape
        torch.Size([2, 3, 11])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_chans: int = 1,
        size: tuple[int, int] = (100, 100),
        targets: int = 1,
        glimpses: int = 4,
        patch: int = 12,
        scales: int = 2,
        zoom: int = 2,
        width: int = 512,
        glimpse_width: int = 256,
        filters: tuple[int, int, int] = (64, 64, 128),
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        context: int | None = 16,
        context_filters: tuple[int, int, int] = (16, 16, 32),
        spread: float | tuple[float, float] = (0.2, 0.05),
        learned_spread: bool = False,
        readout: Readout = "last",
        halting: bool = False,
    ):
        super().__init__()
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        at_least_one(num_classes=num_classes, in_chans=in_chans, targets=targets, glimpses=glimpses, patch=patch)
        at_least_one(scales=scales, width=width, glimpse_width=glimpse_width)
        at_least_one(filters=min(filters), context_filters=min(context_filters))
        if (pretrained or encoder_args) and not encoder:
            raise ValueError("pretrained and encoder_args must be left out without an encoder")
        for name, side in {
            "patch": LEAST if encoder else patch,
            "context": LEAST if context is None else context,
        }.items():
            if side < LEAST:
                raise ValueError(f"{name} must be at least {LEAST} for convolutions without padding, got {side}")
        if halting and targets > 1:
            raise ValueError(f"halting must be False for several targets, whose glimpses go on, got {targets} targets")
        self.num_classes = num_classes
        self.targets = targets
        self.glimpses = glimpses
        self.begins_anywhere = context is None
        self.sensor = Retina(patch, scales=scales, zoom=zoom)
        self.sensor.prepare(torch.empty(1, in_chans, *size, device="meta"))  # raises if they are too small
        reader: nn.Module
        if encoder:
            model, known = headless("encoder", encoder, encoder_args, in_chans=in_chans, pretrained=pretrained)
            self.arguments |= known
            reader = EachPatch(model, (scales, in_chans, patch, patch), glimpse_width)
        else:
            reader = nn.Sequential(nn.Flatten(1, 2), convolutions(scales * in_chans, patch, filters, glimpse_width))
        self.glimpse = Glimpse(reader, glimpse_width)
        self.lower = nn.LSTMCell(glimpse_width, width)
        self.upper = nn.LSTMCell(width, width).requires_grad_(targets * glimpses > 1)  # else it is never asked
        self.context_size = context
        self.context = None if context is None else convolutions(in_chans, context, context_filters, width)
        self.locator = nn.Linear(width, 2)
        self.policy = GaussianPolicy(spread=spread, learned=learned_spread)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))
        self.baseline = nn.Linear(width, 1)
        self.readout = readout
        self.score = scorer(readout, width)
        self.halts = halting
        self.halt = Halting(width) if halting else None

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
        if answer is not None:
            raise ValueError("answer must be None: nothing that is told it draws actions")
        if first is not None:
            self.sensor.refuse_astray(first)
        elif self.begins_anywhere:
            first = anywhere(images.new_zeros(count, 1), "centre" if policy == "centre" else "random")
        return self._look(images, rollouts, first, policy)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *s k"]:
        first = images.new_zeros(images.shape[0], 2) if self.begins_anywhere else None
        rollout = self._look(images, 1, first, "mean", early=True)
        if self.targets == 1:
            return decided(rollout.logits, rollout.halting)
        return rollout.logits[:, self.glimpses - 1 :: self.glimpses]

    def _look(
        self, images: Tensor, rollouts: int, first: Tensor | None, policy: Policy, *, early: bool = False
    ) -> Rollout:
        """Look from first locations on; what can be done for all glimpses at once is done behind the loop."""
        prepared = self.sensor.prepare(images)
        known, plan = None, self._begin(images, rollouts)
        actions = [] if first is None else [wide(first)]
        seen: list[Tensor] = []
        plans: list[Tensor] = []
        for t in range(self.targets * self.glimpses):
            if seen:
                if early and self.halt is not None and self.halt.over(seen):
                    break
                plan = self.upper(seen[-1], plan)
            if plan is not None and t == len(actions):
                plans.append(plan[0])
                actions.append(self.act(plan[0], policy))
            where = actions[t].clamp(-1, 1)
            known = self.lower(self.glimpse(self.sensor(prepared, where), where), known)
            seen.append(known[0])
        states, done = torch.stack(seen), torch.stack(actions)  # time comes first, so that it is read in one piece
        before = torch.stack(plans) if plans else states[:0]
        read, weights = self._read(states)
        return Rollout(
            self.classifier(read).transpose(0, 1),
            done.clamp(-1, 1).transpose(0, 1),
            *self.judge(before, done[len(done) - len(before) :]),
            weights,
            None if self.halt is None else self.halt.probabilities(states),
        )

    def _read(self, states: Float[Tensor, "t m d"]) -> tuple[Float[Tensor, "t m d"], Float[Tensor, "m t"]]:
        """Return what is classified after each glimpse, and the weights of all glimpses in the last."""
        if self.targets == 1:
            return read_out(states, self.readout, self.score)
        each = states.unflatten(0, (self.targets, -1)).transpose(0, 1).flatten(1, 2)
        read, weights = read_out(each, self.readout, self.score)
        read = read.unflatten(1, (self.targets, -1)).transpose(0, 1).flatten(0, 1)
        last = weights.unflatten(0, (self.targets, -1))[-1]
        return read, F.pad(last, (len(states) - self.glimpses, 0))

    def _begin(self, images: Tensor, rollouts: int) -> tuple[Tensor, Tensor] | None:
        """Return the first state of where to look, and its cell."""
        if self.context is None or self.context_size is None:
            return None
        cell = self.context(F.interpolate(images, (self.context_size, self.context_size), mode="area"))
        cell = cell.repeat_interleave(rollouts, 0)
        return cell.tanh(), cell


class Glimpse(nn.Module):
    """Turn the patches of a glimpse, and where they are, into a vector: the product of both.

    Locations begin as factors around one, which the paper leaves open.

    Args:
        reader: What makes a vector of the patches.
        width: Components of the vector.
    """

    def __init__(self, reader: nn.Module, width: int):
        super().__init__()
        self.see = reader
        self.place = nn.Linear(2, width)
        nn.init.ones_(self.place.bias)

    def forward(self, patches: Float[Tensor, "m k c g g"], where: Float[Tensor, "m 2"]) -> Float[Tensor, "m d"]:
        return self.see(patches).relu() * self.place(where.to(self.place.weight.dtype)).relu()


class EachPatch(nn.Module):
    """Read every patch of a glimpse for itself, and put together what was found.

    Args:
        encoder: What makes a vector of each patch.
        shape: Patches, and the channels, height and width of each.
        width: Components of what is made of all.
    """

    def __init__(self, encoder: nn.Module, shape: tuple[int, int, int, int], width: int):
        super().__init__()
        self.encoder = encoder
        self.join = nn.Linear(shape[0] * vectors(encoder, shape[1:]), width)

    def forward(self, patches: Float[Tensor, "m k c g g"]) -> Float[Tensor, "m d"]:
        return self.join(self.encoder(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]).flatten(1))


def convolutions(channels: int, side: int, filters: tuple[int, int, int], width: int) -> nn.Sequential:
    """Make the paper's reader of small images: rectified convolutions without padding or pooling, and a layer.

    They begin as rectified layers keep the size of what goes through (arXiv:1502.01852), which the paper leaves open:
    by torch's own weights nearly nothing of an image would get as far as the memories.
    """
    parts: list[nn.Module] = []
    for kernel, count in zip(KERNELS, filters, strict=True):
        parts += [nn.Conv2d(channels, count, kernel), nn.ReLU()]
        channels = count
    parts += [nn.Flatten(), nn.Linear(channels * (side - LEAST + 1) ** 2, width)]
    reader = nn.Sequential(*parts)
    for p in reader.parameters():
        nn.init.kaiming_normal_(p, nonlinearity="relu") if p.ndim > 1 else nn.init.zeros_(p)
    return reader
