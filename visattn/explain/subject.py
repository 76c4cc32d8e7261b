"""What is to be explained: something a model says of an image, and the weights it says it with."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Gradient = Literal["norm", "product"]
BATCH = 32  # images, or weights, at once


class Subject(ABC):
    """What a model says of an image, and the weights it says it with: what all measures ask.

    Args:
        image: The image, as the model takes it.
        name: What the weights are called.
        target: The number, among the outputs, of what is said.
        weights: A row for each head, query or channel, and in it a weight for each region of the map, row by row.
        size: Height and width of the map.
        gates: Whether weights are gates, each on its own between 0 and 1, and not shares of a sum.
        fixed: Whether other weights cannot be put in their place: the attention is not ours.
    """

    pictured: ClassVar[bool] = True
    """Are regions taken away from the image, and not from what is made of it?"""

    def __init__(
        self,
        image: Float[Tensor, "c h w"],
        name: str,
        target: int,
        weights: Float[Tensor, "k n"],
        size: tuple[int, int],
        *,
        gates: bool = False,
        fixed: bool = False,
    ):
        self.image, self.name, self.target = image, name, target
        self.weights, self.size, self.gates, self.fixed = weights, size, gates, fixed

    @property
    def map(self) -> Float[Tensor, "h w"]:
        """The mean of the rows, where it lies on the image."""
        return self.weights.mean(0).view(self.size)

    @property
    def output(self) -> Float[Tensor, " v"]:
        """The probabilities of all that could be said of the image."""
        return self.outputs(self.image[None])[0]

    @property
    def probability(self) -> float:
        """The probability of what is said."""
        return float(self.output[self.target])

    def outputs(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b v"]:
        """Return the probabilities of all that could be said of images."""
        with torch.no_grad():
            return torch.cat([self.said(each) for each in images.split(BATCH)])

    def given(self, weights: Float[Tensor, "b k n"]) -> Float[Tensor, "b v"]:
        """Return the outputs with other weights in place of the module's own; gradients go through.

        Raises:
            ValueError: If the attention is not ours.
        """
        if self.fixed:
            raise ValueError(f"weights of {self.name} can be recorded, but not replaced")
        return torch.cat([self.read(each) for each in weights.split(BATCH)])

    def without(self, there: Bool[Tensor, "b rows columns"], empty: Float[Tensor, "c h w"]) -> Float[Tensor, "b v"]:
        """Return the outputs where only some regions of the map are there, and the image is ``empty`` elsewhere."""
        with torch.no_grad():
            return torch.cat([self.left(each, empty) for each in there.split(BATCH)])

    @abstractmethod
    def said(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b v"]:
        """Do as :meth:`outputs`, for a few images."""

    @abstractmethod
    def read(self, weights: Float[Tensor, "b k n"]) -> Float[Tensor, "b v"]:
        """Do as :meth:`given`, for a few weights."""

    @abstractmethod
    def left(self, there: Bool[Tensor, "b rows columns"], empty: Float[Tensor, "c h w"]) -> Float[Tensor, "b v"]:
        """Do as :meth:`without`, a few times."""

    @abstractmethod
    def gradient(self, kind: Gradient = "norm") -> Float[Tensor, "h w"]:
        """Return how much the probability depends on each region.

        Args:
            kind: The ``"norm"`` of the gradient there, or the absolute ``"product"`` of gradient and region.
        """


def evaluated(model: nn.Module) -> None:
    """Raise a ``ValueError`` for a model in training mode, which says otherwise each time, and may change."""
    if model.training:
        raise ValueError(f"model must be in eval mode to be explained, {type(model).__name__} is in training mode")


def strength(gradient: Float[Tensor, "*b d"], x: Float[Tensor, "*b d"], kind: Gradient) -> Float[Tensor, "*b"]:
    """Return how strong a gradient is, over the last axis.

    Raises:
        ValueError: If ``kind`` is unknown.
    """
    if kind not in ("norm", "product"):
        raise ValueError(f"kind must be norm or product, got {kind!r}")
    return gradient.norm(dim=-1) if kind == "norm" else (gradient * x).sum(-1).abs()
