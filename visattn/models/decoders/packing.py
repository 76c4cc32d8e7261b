"""Sentences of different lengths side by side, without what would come after their ends."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from visattn.models.decoders.core import over, stacked


class Step(NamedTuple):
    """Who takes a step. Attention has places for an image's longest sentences, as many as the image with most needs."""

    going: int
    """How many sentences go on: the longest of all images."""
    width: int
    """How many places an image has."""
    asks: Int[Tensor, "b w"]
    """Which sentence asks at each place; where there are fewer, some other does, and nobody hears the answer."""
    finds: Int[Tensor, " n"]
    """At which of all images' places each sentence asks."""


class Packing:
    """The order in which sentences are left: step by step, those go on that are longer.

    Args:
        lengths: How many steps each sentence of each image has.
        steps: How many steps there are; longer sentences are cut.

    Example:
        >>> packing = Packing(torch.tensor([[1, 2], [3, 0]]), 3)
        >>> packing.counts  # three sentences take the first step
        [3, 2, 1]
        >>> packing.pack(torch.arange(12.0).view(2, 2, 3, 1)).flatten()
        tensor([6., 3., 0., 7., 4., 8.])
    """

    def __init__(self, lengths: Int[Tensor, "b r"], steps: int):
        self.shape = (*lengths.shape, steps)
        lengths = lengths.clamp(max=steps)
        self.order = lengths.flatten().argsort(descending=True, stable=True)
        self.by_length = lengths.argsort(dim=1, descending=True, stable=True)
        self.rank = self.by_length.argsort(dim=1)
        self.going = lengths[..., None] > torch.arange(steps, device=lengths.device)
        counts, widths = torch.stack((self.going.sum((0, 1)), self.going.sum(1).amax(0))).tolist()
        last = max(1, sum(count > 0 for count in counts))
        self.counts, self.widths = counts[:last], widths[:last]
        self.places = torch.cat([self.order[:count] * steps + t for t, count in enumerate(self.counts)])

    def pack(self, x: Float[Tensor, "b r t d"]) -> Float[Tensor, "n d"]:
        """Return what belongs to sentences, step after step, the longest first."""
        return x.flatten(0, 2)[self.places]

    def split(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "_ d"], ...]:
        """Return what belongs to each step."""
        return x.split(self.counts)

    def unpack(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "b r t d"]:
        """Put what belongs to sentences back, with zeros after their ends."""
        everything = x.new_zeros(self.order.numel() * self.shape[2], x.shape[1])
        return everything.index_copy(0, self.places, x).view(*self.shape, -1)

    def sort(self, x: Float[Tensor, "b r *d"]) -> Float[Tensor, "n *d"]:
        """Return the sentences of all images, the longest first."""
        return x.flatten(0, 1)[self.order]

    def sort_each(self, x: Tensor) -> Tensor:
        """Return each image's sentences, the longest first."""
        return x[torch.arange(self.shape[0], device=x.device)[:, None], self.by_length]

    def step(self, t: int) -> Step:
        """Return who takes a step."""
        count, width = self.counts[t], self.widths[t]
        who = self.order[:count]
        finds = who // self.shape[1] * width + self.rank.flatten()[who]
        asks = finds.new_zeros(self.shape[0] * width).index_copy(0, finds, torch.arange(count, device=finds.device))
        return Step(count, width, asks.view(self.shape[0], width), finds)

    def maps(self, maps: Sequence[Any]) -> Any:
        """Put the maps of all steps side by side, with zeros after the ends of sentences."""
        _, r, steps = self.shape

        def whole(x: Tensor) -> Tensor:
            x = F.pad(x, (*[0, 0] * (x.ndim - 3), 0, steps - x.shape[2]))[here, self.rank]
            there = self.going.view(*self.going.shape, *[1] * (x.ndim - 3))
            return torch.where(there, x, torch.zeros((), dtype=x.dtype, device=x.device))

        here = torch.arange(self.shape[0], device=self.rank.device)[:, None]
        wide = [over(lambda x: F.pad(x, (*[0, 0] * (x.ndim - 2), 0, r - x.shape[1])), each) for each in maps]
        return over(whole, stacked(wide))
