"""A class, and the weights of a module in the network that says it."""

import math
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import wide
from visattn.drawing.reading import Heat, fields, read_maps, stated_pairs
from visattn.explain.curves import blended
from visattn.explain.replacing import replaced
from visattn.explain.subject import Gradient, Subject, evaluated, strength
from visattn.record import attentions, record

ENOUGH = 4  # cells along a side, for a map to say where


class Found(NamedTuple):
    """Weights that lie on an image."""

    place: str
    """The name of the recorded map."""
    field: str
    """Which of its fields, where it has several."""
    rows: Float[Tensor, "k m"]
    """A row for each head, query or channel: the weights of prefix tokens, and then of regions."""
    size: tuple[int, int]
    """Height and width of the map."""
    whole: bool
    """Are these the weights themselves, and not something made of them?"""


def spatial(model: nn.Module, image: Float[Tensor, "c h w"]) -> dict[str, Found]:
    """Return all weights of a model that lie on an image, by name.

    Args:
        model: The model, in eval mode.
        image: The image, as the model takes it.
    """
    with torch.no_grad(), record(model) as maps:
        model(image[None])
    found = {}
    for place, recorded in maps.items():
        for name, weights in fields({place: recorded}):
            try:
                size, rows = _laid(name, weights, (image.shape[1], image.shape[2]))
            except ValueError:  # it does not lie on the image
                continue
            if math.prod(size) > 1:
                found[name] = Found(place, name[len(place) + 1 :], rows, size, weights.ndim in (3, 4))
    return found


def _laid(name: str, weights: Tensor, image: tuple[int, int]) -> tuple[tuple[int, int], Float[Tensor, "k m"]]:
    (drawn,) = read_maps({name: weights}, image)
    if isinstance(drawn, Heat) and drawn.query is not None:
        (drawn,) = read_maps({name: weights.mean(-2, keepdim=True)}, image)
    if not isinstance(drawn, Heat):
        raise ValueError(f"{name}: weights must be of positions")
    size = (drawn.values.shape[0], drawn.values.shape[1])
    if weights.ndim > 4:
        return size, torch.from_numpy(drawn.values).to(weights.device).view(1, -1)
    flat = weights[0].flatten(1) if tuple(weights.shape[2:]) == size else weights[0].flatten(0, -2)
    return size, flat.float()


class Prediction(Subject):
    """The class that a model gives an image, and the weights of one of its attention modules.

    Regions are the cells of the image under the map. Where each position reads others, the map is the mean of what all
    positions read.

    Args:
        model: The model, in eval mode; it gives logits.
        image: The image, as the model takes it.
        name: Which weights, one of those of :func:`spatial`, or a pattern, of which the last is taken; None: the last
            of at least 4 × 4 regions, or the last.
        target: The class; None: the likeliest.

    Raises:
        ValueError: If the model is in training mode, or there is no such map or class.
    """

    def __init__(
        self, model: nn.Module, image: Float[Tensor, "c h w"], *, name: str | None = None, target: int | None = None
    ):
        evaluated(model)
        found = spatial(model, image)
        fine = [each for each in found if min(found[each].size) >= ENOUGH] or list(found)
        chosen = fine if name is None else [each for each in found if name == each or fnmatchcase(each, name)]
        if not chosen:
            raise ValueError(f"name must be that of a map ({', '.join(found) or 'the model has none'}), got {name!r}")
        name = chosen[-1]
        self.model, self.found = model, found[name]
        self.module = attentions(model).get(self.found.place) if self.found.whole else None
        with torch.no_grad():
            logits = model(image[None])[0]
        if logits.ndim != 1:
            raise ValueError(f"model must give one logit for each class, got {tuple(logits.shape)} for an image")
        if target is not None and not 0 <= target < len(logits):
            raise ValueError(f"target must be one of {len(logits)} classes, got {target}")
        self.label = int(logits.argmax()) if target is None else target
        self.alone = (getattr(model, "task", None) or "").startswith("multi-label")
        self.first = self.found.rows.shape[1] - math.prod(self.found.size)
        sums = self.found.rows.sum(1)
        super().__init__(
            image,
            name,
            0 if self.alone else self.label,
            self.found.rows[:, self.first :],
            self.found.size,
            gates=not (stated_pairs(name) or torch.allclose(sums, torch.ones_like(sums), atol=1e-2)),
            fixed=self.module is None,
        )

    def said(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b v"]:
        logits = self.model(images).float()
        if self.alone:  # it is there, or not, whatever else is
            likely = logits[:, self.label].sigmoid()
            return torch.stack((likely, 1 - likely), 1)
        return logits.softmax(1)

    def read(self, weights: Float[Tensor, "b k n"]) -> Float[Tensor, "b v"]:
        assert self.module is not None  # given asks first
        lead = self.found.rows[:, : self.first].expand(len(weights), -1, -1)
        rows = torch.cat((lead, weights), 2)

        def change(own: Any) -> Any:
            before: Tensor = getattr(own, self.found.field) if self.found.field else own
            after = rows.view(-1, *before.shape[1:]).to(before.dtype)
            return own._replace(**{self.found.field: after}) if self.found.field else after

        with replaced(self.module, change):
            return self.said(self.image.expand(len(weights), -1, -1, -1))

    def left(self, there: Bool[Tensor, "b rows columns"], empty: Float[Tensor, "c h w"]) -> Float[Tensor, "b v"]:
        return self.said(blended(self.image, empty, there.to(self.image.dtype)))

    def gradient(self, kind: Gradient = "norm") -> Float[Tensor, "h w"]:
        image = self.image.detach().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.said(image[None])[0, self.target], [image])
        gradient, image = wide(gradient), wide(image.detach())  # its squares are below what half precision holds
        if kind == "norm":
            return _pooled(strength(gradient.movedim(0, -1), image.movedim(0, -1), kind).square(), self.size).sqrt()
        return _pooled((gradient * image).sum(0), self.size).abs()


def _pooled(values: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    return F.adaptive_avg_pool2d(values[None], size)[0]
