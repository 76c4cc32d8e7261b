"""Wang, Lv, Huang, Song, Yang, Huang: Glance and Focus: a Dynamic Approach to Reducing Spatial Redundancy (2020)."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visattn.attention.core import plain, softmax, uncast, wide
from visattn.attention.sampling.glimpses import SQUARE, Sensor, pixels
from visattn.attention.sampling.retina import Retina
from visattn.models.looker import Looker, Policy, Rollout, decided
from visattn.models.network import at_least_one, headless
from visattn.models.policy import GaussianPolicy
from visattn.models.readout import at_last

Kind = Literal["recurrent", "concatenation"]
NARROW = 32  # channels to which the policy narrows a feature map


class Looks(NamedTuple):
    """What a network saw and did on images: m roll-outs, t glimpses, an action before each but the first."""

    logits: Float[Tensor, "m t k"]
    """After each glimpse, of all glimpses so far."""
    features: Float[Tensor, "m t d"]
    """What the backbone made of each glimpse alone."""
    maps: Float[Tensor, "m a c h w"]
    """The feature maps that the policy was shown before each action."""
    actions: Float[Tensor, "m a 2"]
    """As they were drawn."""
    locations: Float[Tensor, "m t 3"]
    """What was looked at, as the sensor is told."""


class Spent(NamedTuple):
    """What an image costs, on average."""

    glimpses: float
    macs: float
    """Multiplications, each with an addition."""


class GlanceFocus(Looker):
    r"""Look at a whole image, small, and then at parts of it in full resolution, until sure enough what it shows.

    .. math:: e_t = f(\tilde x_t), \quad p_t = f_C(e_1, \dots, e_t), \quad
        \mu_{t+1} = \pi(e_1, \dots, e_t), \quad \tilde x_1 = \operatorname{resize}(x)

    (arXiv:2010.05300). The first glimpse is the image, resized; each other is a crop of as many pixels, without
    resizing. An action says where the crop lies, across and down: from 0, at the left or upper edge of the image, to 1,
    at the opposite one; beyond, it is kept there. A location, as :class:`GlanceSensor` takes it, has a third number, 1
    where all of the image was seen. No gradient goes through places, or from the policy into the backbone.
    :meth:`forward` stops, in evaluation mode, with each image as soon as it is sure.

    Differs from the paper: one backbone reads both, unless another is named for the crops; the image is resized without
    aliases; places are rounded to whole pixels.

    Args:
        num_classes: Number of classes.
        backbone: Name of a timm model. One with a fixed size of its input reads patches of that size only.
        crop_backbone: Name of a timm model that reads the crops, with weights of its own; None: ``backbone`` does.
        in_chans: Channels of the images.
        glimpses: How many glimpses are taken, the first of the whole image.
        patch: Height and width of what the backbone reads, in pixels.
        classifier: ``"recurrent"``; or, as the paper has it for mobile networks, a linear one after each glimpse for
            the ``"concatenation"`` of all features so far.
        width: Components of the state of a recurrent classifier.
        policy_width: Components of the state of the policy; the paper has 256 for mobile networks.
        spread: Standard deviation of actions; or the first and the last of a training.
        confidence: An image has stopped as soon as its greatest probability reaches this; or a number for each glimpse
            but the last. None: never.
        backbone_args: Arguments of ``timm.create_model`` for each backbone, such as ``img_size``.
        pretrained: Whether each backbone starts with its trained weights.

    Raises:
        ValueError: If an option is out of its range, or images are smaller than a crop.

    Example:
        >>> network = GlanceFocus(10, backbone="resnet18", patch=64, glimpses=3, width=128, policy_width=64)
        >>> rollout = network.rollout(torch.rand(2, 3, 200, 300), rollouts=3)
        >>> rollout.logits.shape, rollout.locations.shape, rollout.log_probs.shape
        (torch.Size([6, 3, 10]), torch.Size([6, 3, 3]), torch.Size([6, 2]))
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        backbone: str,
        crop_backbone: str | None = None,
        in_chans: int = 3,
        glimpses: int = 5,
        patch: int = 96,
        classifier: Kind = "recurrent",
        width: int = 1024,
        policy_width: int = 1024,
        spread: float | tuple[float, float] = 0.1,
        confidence: float | Sequence[float | None] | None = None,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        counts = {"num_classes": num_classes, "in_chans": in_chans, "patch": patch, "width": width}
        at_least_one(**counts, policy_width=policy_width)
        if glimpses < 2:
            raise ValueError(f"glimpses must be at least 2, a glance and a crop, got {glimpses}")
        if classifier not in get_args(Kind):
            raise ValueError(f"classifier must be {' or '.join(get_args(Kind))}, got {classifier!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.glimpses = glimpses
        self.confidence = limits(confidence, glimpses - 1)
        self.sensor = GlanceSensor(patch)
        names = {"backbone": backbone} | ({"crop_backbone": crop_backbone} if crop_backbone else {})
        self.backbones = nn.ModuleList()
        for argument, name in names.items():
            model, known = headless(
                argument, name, backbone_args, in_chans=in_chans, pretrained=pretrained, among="backbone_args"
            )
            self.backbones.append(model)
            self.arguments |= known
        made = [shapes(name, each, (in_chans, patch, patch)) for name, each in zip(names, self.backbones, strict=True)]
        (seen, features) = made[0]
        if made[-1] != made[0]:
            raise ValueError(
                f"crop_backbone must make a map and features as backbone does, {seen} and {features}, "
                f"got {made[1][0]} and {made[1][1]}"
            )
        self.classifier: nn.Module = (
            RecurrentClassifier(features, width, num_classes)
            if classifier == "recurrent"
            else ConcatenationClassifier(features, glimpses, num_classes)
        )
        self.auxiliary = nn.ModuleList(nn.Linear(features, num_classes) for _ in names)
        self.locator = Locator(seen, policy_width)
        self.policy = GaussianPolicy(spread=spread)

    # --- looking ------------------------------------------------------------------------------------------------------

    def rollout(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        rollouts: int = 1,
        policy: Policy = "sample",
        first: Float[Tensor, "m 2"] | None = None,
        answer: Int[Tensor, "b"] | None = None,
    ) -> Rollout:
        """Look at images; see :meth:`Looker.rollout`. In evaluation mode it says when each has stopped, and goes on."""
        if first is not None or answer is not None:
            name = "answer" if first is None else "first"
            raise ValueError(f"{name} must be None: all begins with the whole image, and nothing is told the answer")
        looks = self.look(images, rollouts=rollouts, policy=policy)
        log_probs, entropies, values = self.judge(looks.maps, looks.actions)
        return Rollout(
            looks.logits,
            looks.locations,
            log_probs,
            entropies,
            values,
            at_last(looks.logits[..., 0]),
            self._halting(looks.logits),
        )

    def look(self, images: Float[Tensor, "b c h w"], *, rollouts: int = 1, policy: Policy = "sample") -> Looks:
        """Take all glimpses of images, and keep what the policy was shown. Arguments as in :meth:`Looker.rollout`."""
        count = self.count(images, rollouts, policy, None)
        seen, feature = (each.repeat_interleave(rollouts, 0) for each in self._see(0, self.sensor.glance(images)))
        logits, memory = self.classifier(feature, None)
        outputs, features, maps, actions, state = [logits], [feature], [], [], None
        for t in range(1, self.glimpses):
            maps.append(seen.detach())
            action, state = self._act(maps[-1], state, policy)
            actions.append(action)
            seen, feature = self._see(t, self.sensor.crop(images, self._place(action, images)))
            logits, memory = self.classifier(feature, memory)
            outputs.append(logits)
            features.append(feature)
        whole = wide(images.new_tensor((0.0, 0.0, 1.0))).expand(count, 1, 3)
        crops = F.pad(self._place(torch.stack(actions, 1), images), (0, 1))
        return Looks(
            torch.stack(outputs, 1),
            torch.stack(features, 1),
            torch.stack(maps, 1),
            torch.stack(actions, 1),
            torch.cat((whole, crops), 1),
        )

    def judge(
        self, maps: Float[Tensor, "m a c h w"], actions: Float[Tensor, "m a 2"]
    ) -> tuple[Float[Tensor, "m a"], Float[Tensor, "m a"], Float[Tensor, "m a"]]:
        """Return, of actions, the log-probability and the policy's entropy, and what reward is expected before each."""
        means, values, state = [], [], None
        for seen in maps.unbind(1):
            mean, value, state = self.locator(seen, state)
            means.append(mean)
            values.append(value)
        mean = torch.stack(means, 1)
        return self.policy.log_prob(mean, actions), self.policy.entropy(mean), torch.stack(values, 1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if self.training or self.confidence is None or plain(images):
            logits = self.look(images, policy="mean").logits
            return decided(logits, self._halting(logits))
        seen, feature = self._see(0, self.sensor.glance(images))
        found, memory = self.classifier(feature, None)
        logits, rows, state = found, torch.arange(images.shape[0], device=images.device), None
        for t, limit in enumerate(self.confidence, 1):
            go = (~certain(logits, limit)).nonzero()[:, 0]
            if not len(go):
                break
            if len(go) < len(rows):
                rows, images, seen, memory = rows[go], images[go], seen[go], memory[go]
                state = None if state is None else state[go]
            action, state = self._act(seen, state, "mean")
            seen, feature = self._see(t, self.sensor.crop(images, self._place(action, images)))
            logits, memory = self.classifier(feature, memory)
            found = found.index_copy(0, rows, logits)
        return found

    def _see(self, t: int, glimpse: Tensor) -> tuple[Float[Tensor, "m c h w"], Float[Tensor, "m d"]]:
        return read(self.backbones[min(t, len(self.backbones) - 1)], glimpse)

    @torch.no_grad()
    def _act(self, seen: Tensor, state: Tensor | None, policy: Policy) -> tuple[Float[Tensor, "m 2"], Tensor | None]:
        """Return actions, and the state of the policy, which is asked only where it chooses."""
        if policy in ("random", "centre"):
            middle = wide(seen.new_full((seen.shape[0], 2), 0.5))
            return middle if policy == "centre" else torch.rand_like(middle), None
        mean, _, state = self.locator(seen, state)
        return mean if policy == "mean" else self.policy.sample(mean), state

    def _place(self, actions: Float[Tensor, "*m 2"], images: Tensor) -> Float[Tensor, "*m 2"]:
        """Return the centres of crops, which lie in the image."""
        room = actions.new_tensor([1 - self.sensor.size / side for side in (images.shape[3], images.shape[2])])
        return (2 * actions.clamp(0, 1) - 1) * room

    def guess(self, features: Float[Tensor, "m t d"]) -> Float[Tensor, "m t k"]:
        """Return logits of each glimpse alone, which help to train a backbone."""
        return torch.cat([self.auxiliary[0](features[:, :1]), self.auxiliary[-1](features[:, 1:])], 1)

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _stops(self, logits: Float[Tensor, "m t k"]) -> Bool[Tensor, "m t"]:
        """Say after which glimpse each image has stopped."""
        limits = (*(self.confidence or [None] * (self.glimpses - 1)), 0.0)
        sure = torch.stack([certain(z, limit) for z, limit in zip(logits.unbind(1), limits, strict=True)], 1)
        return sure & (sure.cumsum(1) == 1)

    def _halting(self, logits: Float[Tensor, "m t k"]) -> Float[Tensor, "m t"] | None:
        """Return 1 where an image has stopped, else 0; None where all go on to the end."""
        if self.training or self.confidence is None:
            return None
        return self._stops(logits).to(torch.promote_types(logits.dtype, torch.float32))

    @cached_property
    def macs(self) -> tuple[int, ...]:
        """How many multiplications an image has cost after each glimpse; resizing and cropping count as none."""
        shell: Any = copy.deepcopy(self).to("meta").eval()
        shape, dtype = (1, self.in_chans, self.sensor.size, self.sensor.size), self.locator.see.weight.dtype
        glimpse = torch.empty(shape, dtype=dtype, device="meta")
        seen = memory = state = None
        costs = []
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for t in range(self.glimpses):
                if t:
                    _, _, state = shell.locator(seen, state)
                seen, feature = shell._see(t, glimpse)
                _, memory = shell.classifier(feature, memory)
                costs.append(counter.get_total_flops() // 2)
        return tuple(costs)

    def spent(self, logits: Float[Tensor, "n t k"]) -> Spent:
        """Return what images of these logits, after each glimpse, cost."""
        if not len(logits) or logits.shape[1] != self.glimpses:
            shape = tuple(logits.shape)
            raise ValueError(f"logits must be of some images after each of {self.glimpses} glimpses, got {shape}")
        share = self._stops(logits).double().mean(0).tolist()
        costs = range(1, self.glimpses + 1), self.macs
        return Spent(*(sum(part * cost for part, cost in zip(share, each, strict=True)) for each in costs))

    def calibrate(
        self, logits: Float[Tensor, "n t k"], *, glimpses: float | None = None, macs: float | None = None
    ) -> Spent:
        r"""Set how sure is sure enough, so that images of these logits cost what they may, or a little less.

        Of all images :math:`p_t \propto q^t` are to stop after glimpse :math:`t`, the most sure of those that are left,
        with the :math:`q` that the budget allows.

        Args:
            logits: After each glimpse, of images with which it was not trained.
            glimpses: How many glimpses an image may have on average.
            macs: Or how many multiplications it may cost on average.

        Returns:
            What they cost.
        """
        if (glimpses is None) == (macs is None):
            raise ValueError(f"one of glimpses and macs must be given, got {glimpses} and {macs}")
        self.spent(logits)  # raises if they are of another kind
        costs = range(1, self.glimpses + 1) if macs is None else self.macs
        name, budget = ("glimpses", glimpses) if macs is None else ("macs", macs)
        if not costs[0] <= budget <= costs[-1]:  # type: ignore[operator]
            raise ValueError(f"{name} must lie between {costs[0]} and {costs[-1]}, got {budget}")
        shares = geometric(torch.tensor(costs, dtype=torch.float64), budget)  # type: ignore[arg-type]
        wanted = (len(logits) * shares.cumsum(0) - 1e-6).ceil().long().tolist()
        confidence: list[float | None] = []
        left = softmax(logits).amax(-1)
        for t in range(self.glimpses - 1):
            ordered, stop = left[:, t].sort(descending=True).values.tolist(), wanted[t] - len(logits) + len(left)
            limit = None
            if stop > 0:
                limit = 0.0 if stop >= len(left) else (ordered[stop - 1] + ordered[stop]) / 2
                left = left[left[:, t] < limit]
            confidence.append(limit)
        self.confidence = tuple(confidence)
        self.arguments["confidence"] = confidence
        return self.spent(logits)


class GlanceSensor(Sensor):
    """See all of an image, small, or a crop of it.

    Where to look is said by a location (x, y), with the outer edges of the image at -1 and 1, and a third number: 1 for
    all of the image, 0 for a crop around the location, of the nearest whole pixels.

    Args:
        size: Height and width of what is seen, in pixels.

    Example:
        >>> sensor, image = GlanceSensor(2), torch.arange(16.0).view(1, 1, 4, 4)
        >>> sensor(sensor.prepare(image), torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]))[:, 0, 0]
        tensor([[[ 3.5714,  5.1429],
                 [ 9.8571, 11.4286]],
        <BLANKLINE>
                [[10.0000, 11.0000],
                 [14.0000, 15.0000]]])
    """

    number = 3
    scales = 1
    rule = Retina.rule

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.crops = Retina(size, form="exact")

    def astray(self, where: Float[Tensor, "m 3"]) -> Bool[Tensor, "m"]:
        return self.crops.astray(where[:, :2])

    def prepare(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Return the images, where pixels of crops lie, and all of each image, small."""
        return (*self.crops.prepare(images), self.glance(images))

    def forward(self, prepared: tuple[Tensor, ...], where: Float[Tensor, "m 3"]) -> Float[Tensor, "m k c g g"]:
        *crops, glances = prepared
        each = self.rollouts(where, glances).shape[1]
        whole = (where[:, 2] > 0)[:, None, None, None, None]
        return torch.where(whole, glances.repeat_interleave(each, 0)[:, None], self.crops(tuple(crops), where[:, :2]))

    def glance(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c g g"]:
        """Return all of each image, resized without aliases."""
        side, (height, width) = self.size, images.shape[2:]
        if min(height, width) < side:
            raise ValueError(f"images must be at least as high and wide as a crop of {side}, got {height} × {width}")
        resized = F.interpolate(wide(images), (side, side), mode="bilinear", antialias=True, align_corners=False)
        return resized.to(images.dtype)

    def crop(self, images: Float[Tensor, "b c h w"], where: Float[Tensor, "m 2"]) -> Float[Tensor, "m c g g"]:
        """Return crops of images; see :meth:`forward`."""
        return self.crops(self.crops.prepare(images), where)[:, 0]

    def corners(self, where: Float[Tensor, "m 3"], size: tuple[int, int]) -> Float[Tensor, "m k 4 2"]:
        crops = self.crops.corners(where[:, :2], size)
        return torch.where((where[:, 2] > 0)[:, None, None, None], pixels(crops.new_tensor(SQUARE), size), crops)


class RecurrentClassifier(nn.Module):
    """Classify all features so far by a state.

    Args:
        features: Components of the features of a glimpse.
        width: Components of the state.
        num_classes: Number of classes.
    """

    def __init__(self, features: int, width: int, num_classes: int):
        super().__init__()
        self.memory = nn.GRUCell(features, width)
        self.linear = nn.Linear(width, num_classes)

    def forward(
        self, feature: Float[Tensor, "m d"], state: Float[Tensor, "m s"] | None
    ) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m s"]]:
        state = self.memory(feature, state)
        return self.linear(state), state


class ConcatenationClassifier(nn.Module):
    """Classify all features so far, side by side.

    Args:
        features: Components of the features of a glimpse.
        glimpses: How many there may be.
        num_classes: Number of classes.
    """

    def __init__(self, features: int, glimpses: int, num_classes: int):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(features * count, num_classes) for count in range(1, glimpses + 1))

    def forward(
        self, feature: Float[Tensor, "m d"], before: Float[Tensor, "m s"] | None
    ) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m s2"]]:
        known = feature if before is None else torch.cat((before, feature), 1)
        return self.linears[known.shape[1] // feature.shape[1] - 1](known), known


class Locator(nn.Module):
    """Say where to look next from a feature map and a state, and what that will gain.

    Args:
        size: Channels, height and width of the map.
        width: Components of the state.
    """

    def __init__(self, size: tuple[int, int, int], width: int):
        super().__init__()
        channels, height, across = size
        self.see = nn.Conv2d(channels, NARROW, 1, bias=False)
        self.join = nn.Linear(NARROW * height * across, width)
        self.memory = nn.GRUCell(width, width)
        self.mean = nn.Linear(width, 2)
        self.value = nn.Linear(width, 1)

    def forward(
        self, seen: Float[Tensor, "m c h w"], state: Float[Tensor, "m d"] | None
    ) -> tuple[Float[Tensor, "m 2"], Float[Tensor, "m"], Float[Tensor, "m d"]]:
        state = self.memory(self.join(self.see(seen).relu().flatten(1)).relu(), state)
        with uncast(state.device):
            known = state.to(self.mean.weight.dtype)
            return wide(self.mean(known)).sigmoid(), wide(self.value(known))[:, 0], state


def read(backbone: Any, x: Float[Tensor, "m c h w"]) -> tuple[Float[Tensor, "m c2 h2 w2"], Float[Tensor, "m d"]]:
    """Return the last feature map of a backbone, channels first, and what its classifier would be given."""
    last, maps = backbone.forward_intermediates(x, indices=1)
    return maps[0], backbone.forward_head(last, pre_logits=True).flatten(1)


def shapes(argument: str, backbone: nn.Module, size: tuple[int, int, int]) -> tuple[tuple[int, int, int], int]:
    """Return channels, height and width of the last map of a backbone, and how many features it makes."""
    shell = copy.deepcopy(backbone).to("meta").eval()
    try:
        with torch.no_grad():
            seen, features = read(shell, torch.empty(1, *size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        name = type(backbone).__name__
        raise ValueError(f"patch must be a size that {argument} {name} reads ({reason}), got {size[1]}") from error
    channels, height, width = seen.shape[1:]
    return (channels, height, width), features.shape[1]


def limits(confidence: float | Sequence[float | None] | None, count: int) -> tuple[float | None, ...] | None:
    """Return how sure is sure enough after each glimpse but the last, None where nothing is; None where none is."""
    each = [confidence] * count if confidence is None or isinstance(confidence, (int, float)) else list(confidence)
    if len(each) != count or not all(limit is None or 0 <= limit <= 1 for limit in each):
        raise ValueError(f"confidence must be one number in [0, 1], or {count}, got {confidence}")
    return None if each == [None] * count else tuple(each)


def certain(logits: Float[Tensor, "m k"], limit: float | None) -> Bool[Tensor, "m"]:
    """Say where the greatest probability reaches a limit; None: nowhere."""
    if limit is None:
        return torch.zeros_like(logits[:, 0], dtype=torch.bool)
    return ~(softmax(logits).amax(-1) < limit)


def geometric(costs: Float[Tensor, "t"], budget: float) -> Float[Tensor, "t"]:
    r"""Return the shares :math:`p_t \propto q^t` at which the mean cost is the budget; costs rise.

    Example:
        >>> geometric(torch.tensor([1.0, 2.0, 3.0]), 2.0)
        tensor([0.3333, 0.3333, 0.3333])
    """
    steps = torch.arange(len(costs), dtype=costs.dtype, device=costs.device)
    low, high = -60.0, 60.0  # of the logarithm of q
    for _ in range(100):
        middle = (low + high) / 2
        if (middle * steps).softmax(0) @ costs > budget:
            high = middle
        else:
            low = middle
    return (low * steps).softmax(0)
