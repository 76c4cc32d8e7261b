"""What networks have in common that take a backbone of timm apart: building it, and finding its parts."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Built
from visattn.surgery import insertions


class Classifier(Built):
    """A network from images to the logits of classes."""

    num_classes: int


class Network(Classifier):
    """A classifier around a backbone.

    Args:
        backbone: Name of a timm model, or the model itself, which is then taken as it is; such a network is not saved.
        num_classes: Number of classes; None: as many as the backbone has.
        pretrained: Whether a backbone that is named starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, such as ``in_chans``, for a backbone that is named.

    Raises:
        ValueError: If there are arguments for a backbone that is given, or something is inserted in it.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None,
        pretrained: bool,
        backbone_args: dict[str, Any] | None,
    ):
        super().__init__()
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        model: Any = backbone
        if isinstance(backbone, str):
            options = {} if num_classes is None else {"num_classes": num_classes}
            model = timm.create_model(backbone, pretrained=pretrained, **(backbone_args or {}) | options)
            self.arguments |= as_timm_has_it(backbone, model)
        elif pretrained or backbone_args:
            raise ValueError("pretrained and backbone_args are for a backbone that is named, got a model")
        elif insertions(model):
            raise ValueError("backbone must have nothing inserted: insert into the network that is made of it")
        elif num_classes not in (None, model.num_classes):
            model.reset_classifier(num_classes)
        self.backbone = model
        self.num_classes = model.num_classes


@dataclass
class Call:
    """One call of one module."""

    name: str
    given: Any
    start: int
    version: int  # of what was given: it counts what is written to it
    end: int = -1
    returned: Any = None
    wrote: bool = False


@dataclass
class Seen:
    """What goes through a backbone, on the meta device."""

    name: str
    maps: list[Tensor] = field(default_factory=list)  # of its levels, with the channels first
    last: Any = None  # what its head is given
    vector: Any = None  # what its classifier is given
    calls: list[Call] = field(default_factory=list)

    def levels(self, stages: int | Sequence[int]) -> tuple[int, ...]:
        """The levels that are asked for: the last so many, or those of these numbers, counted as in a list."""
        count = len(self.maps)
        numbers = range(-stages, 0) if isinstance(stages, int) else stages
        levels = tuple(n + count if n < 0 else n for n in numbers)
        if not levels or list(levels) != sorted(set(levels)) or levels[0] < 0 or levels[-1] >= count:
            raise ValueError(f"stages must be of the {count} levels of {self.name}, in order, got {stages}")
        return levels

    def behind(self, level: int) -> list[str]:
        """The modules that lead, one after the other, from the map of a level to the head."""
        tensor: Any = self.maps[level]
        time = max((call.end for call in self.calls if call.returned is tensor and call.wrote), default=None)
        names: list[str] = []
        while time is not None and tensor is not self.last:
            following = [call for call in self.calls if call.name and call.given is tensor and call.start > time]
            if not following:
                break
            call = min(following, key=lambda call: call.start)  # the outermost
            names.append(call.name)
            tensor, time = call.returned, call.end
        if tensor is not self.last:
            place = f"after {names[-1]}" if names else f"at level {level}"
            raise ValueError(
                f"{self.name} cannot be split {place}: from there to its head it is not one module after another"
            )
        return names


def look(backbone: nn.Module) -> Seen:
    """See what goes through a backbone, on the meta device: no weight is read, nothing is computed."""
    name = type(backbone).__name__
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(f"{name} cannot be split: it has no forward_intermediates, by which timm gives its maps")
    shell: Any = copy.deepcopy(backbone).to("meta").eval()
    image = image_for(shell)
    seen, running, clock = Seen(name), list[Call](), itertools.count()

    def enter(name: str, module: nn.Module, args: Any) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else None
        running.append(Call(name, given, next(clock), -1 if given is None else given._version))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.end, call.returned = next(clock), output
        call.wrote = output is not call.given or output._version != call.version
        seen.calls.append(call)

    for name, module in shell.named_modules():
        module.register_forward_pre_hook(partial(enter, name))
        module.register_forward_hook(leave)
    with torch.no_grad():
        seen.last, seen.maps = shell.forward_intermediates(image)
        seen.vector = shell.forward_head(seen.last, pre_logits=True)
    return seen


def image_for(backbone: nn.Module) -> Float[Tensor, "2 c h w"]:
    """Return images, on the meta device, such as a backbone was made for."""
    config: Any = getattr(backbone, "pretrained_cfg", None) or {}
    declared = config.get("input_size") or (3, 224, 224)
    first = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), declared[0])
    sizes: Any = (m.img_size for m in backbone.modules() if isinstance(getattr(m, "img_size", None), tuple))
    channels = first if first <= 4 else declared[0]  # else it is given small squares
    dtype = next(backbone.parameters()).dtype
    return torch.empty(2, channels, *next(sizes, declared[1:]), device="meta", dtype=dtype)


def named(argument: str, name: str, own: Sequence[str] = (), **options: Any) -> nn.Module:
    """Build the timm model that an argument names, which may also be one of ``own`` names."""
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        close = get_close_matches(name, [*own, *timm.list_models()])
        kinds = f"{', '.join(own)} or " if own else ""
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"{argument} must be {kinds}the name of a timm model, got {name!r}{hint}")
    return timm.create_model(name, **options)


def as_timm_has_it(name: str, model: Any, argument: str = "backbone") -> dict[str, Any]:
    """Return by which name and arguments timm builds again what was built from a folder, which may be gone by then."""
    if not name.startswith("local-dir:"):
        return {}
    cfg, args = model.pretrained_cfg, dict(model._model_args)
    if cfg.get("tag"):  # else it would be called after other weights, those that timm has by default
        args["pretrained_cfg_overlay"] = {"tag": cfg["tag"]}
    return {argument: cfg["architecture"], f"{argument}_args": args}


def headless(
    argument: str, name: str, args: dict[str, Any] | None, *, in_chans: int, pretrained: bool, among: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the timm model that an argument names, without its classifier.

    Args:
        argument: What the argument is called.
        name: What it says.
        args: Further arguments of ``timm.create_model``.
        in_chans: Channels of its input.
        pretrained: Whether it starts with its trained weights.
        among: What the argument with ``args`` is called; None: as ``argument``, with ``_args`` behind.

    Returns:
        The model, and what a network's :attr:`Built.arguments` are to say of it instead, so that it can be built again.
    """
    own: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
    among = among or f"{argument}_args"
    if known := sorted(own.keys() & (args or {}).keys()):
        raise ValueError(f"{among} must not have {' and '.join(known)}, which the network says, got {args}")
    model = named(argument, name, pretrained=pretrained, **own, **(args or {}))
    found = as_timm_has_it(name, model, argument)
    if not found:
        return model, {}
    kept = {key: value for key, value in found[f"{argument}_args"].items() if key not in own}
    return model, {argument: found[argument], among: kept}


def at_least_one(**counts: int) -> None:
    """Raise a ``ValueError`` if any count is less than 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
