"""Petsiuk, Das, Saenko: RISE: Randomized Input Sampling for Explanation of Black-box Models (BMVC 2018), measures."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

Baseline = Literal["blur", "mean", "zero"]
BLUR = 0.1  # standard deviation of the blur, in shorter sides of the image


class Curve(NamedTuple):
    """A score, as more and more is taken away, or put in."""

    shares: Float[Tensor, " s"]
    """How much was taken away, or put in, from nothing to all."""
    scores: Float[Tensor, " s"]

    @property
    def area(self) -> float:
        """The area under it: the mean score."""
        return float(torch.trapezoid(self.scores, self.shares))


def deletion(
    score: Callable[[Bool[Tensor, "b *n"]], Float[Tensor, " b"]],
    weights: Float[Tensor, "*n"],
    *,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Curve:
    """Take away what has the greatest weights first; where they show what a score needs, it falls at once.

    Args:
        score: Called with what is left, a row for each step: True where something is.
        weights: In whose order things are taken; among equal ones, by chance.
        steps: In how many steps, at most one for each thing.
        generator: Where the chance comes from.

    Raises:
        ValueError: If ``steps`` is less than 1, or weights are not finite.

    Example:
        >>> parts = torch.tensor([1.0, 5.0, 4.0])
        >>> deletion(lambda left: (left * parts).sum(1), parts, steps=3).scores
        tensor([10.,  5.,  1.,  0.])
    """
    ranks, shares = _ranks(weights, steps, generator)
    return Curve(shares, score(ranks >= (shares * weights.numel()).round().view(-1, *[1] * weights.ndim)))


def insertion(
    score: Callable[[Bool[Tensor, "b *n"]], Float[Tensor, " b"]],
    weights: Float[Tensor, "*n"],
    *,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Curve:
    """Put in what has the greatest weights first; see :func:`deletion`.

    Example:
        >>> parts = torch.tensor([1.0, 5.0, 4.0])
        >>> insertion(lambda there: (there * parts).sum(1), parts, steps=3).scores
        tensor([ 0.,  5.,  9., 10.])
    """
    ranks, shares = _ranks(weights, steps, generator)
    return Curve(shares, score(ranks < (shares * weights.numel()).round().view(-1, *[1] * weights.ndim)))


def _ranks(
    weights: Float[Tensor, "*n"], steps: int, generator: torch.Generator | None
) -> tuple[Float[Tensor, "*n"], Float[Tensor, " s"]]:
    """When the turn of each comes, and how much is taken by each step, whole things only."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not weights.isfinite().all():
        raise ValueError("weights must be finite, got NaN or infinity")
    count = weights.numel()
    mixed = torch.randperm(count, generator=generator).to(weights.device)
    order = mixed[weights.flatten()[mixed].argsort(descending=True, stable=True)]
    ranks = torch.empty(count, device=weights.device)
    ranks[order] = torch.arange(count, dtype=ranks.dtype, device=weights.device)
    taken = torch.linspace(0, count, min(steps, count) + 1, device=weights.device).round()
    return ranks.view(weights.shape), taken / count


def emptied(image: Float[Tensor, "c h w"], baseline: Baseline = "mean") -> Float[Tensor, "c h w"]:
    """Return an image that says little: what takes the place of what is taken away.

    Args:
        image: The image, as the model takes it.
        baseline: Its ``"mean"`` colour; ``"zero"``, what the model takes for the mean colour of all images; or a
            ``"blur"`` of it, which has no edges, though a large shape may still be told.

    Raises:
        ValueError: If ``baseline`` is none of these.
    """
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}, got {baseline!r}")
    if baseline == "zero":
        return torch.zeros_like(image)
    if baseline == "mean":
        return image.mean((1, 2), keepdim=True).expand_as(image)
    spread = BLUR * min(image.shape[1:])
    return gaussian_blur(image, [2 * int(2 * spread) + 1] * 2, [spread] * 2)


def blended(
    image: Float[Tensor, "c h w"], empty: Float[Tensor, "c h w"], there: Float[Tensor, "b rows columns"]
) -> Float[Tensor, "b c h w"]:
    """Return an image of which so much is there in each cell of a grid that covers it.

    Example:
        >>> blended(torch.ones(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[[1.0, 0.5]]]))[0, 0, 0]
        tensor([1.0000, 1.0000, 0.5000, 0.5000])
    """
    size = (image.shape[1], image.shape[2])
    return torch.lerp(empty, image, F.interpolate(there[:, None], size, mode="nearest-exact"))


def enlarged(weights: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    """Return a map at another size, linear between the centres of its cells."""
    return F.interpolate(weights[None, None], size, mode="bilinear", align_corners=False)[0, 0]
