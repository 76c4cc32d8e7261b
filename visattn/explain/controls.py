"""Jain and Wallace: Attention is not Explanation (NAACL 2019), and what it is compared with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from visattn.explain.distance import jensen_shannon, kendall, total_variation

Given = Callable[[Float[Tensor, "b k n"]], Float[Tensor, "b v"]]
"""The outputs, with so many weights in place of a module's own."""


def shuffled(
    weights: Float[Tensor, "*k n"], times: int, generator: torch.Generator | None = None
) -> Float[Tensor, "times *k n"]:
    """Return weights so many times, each time with their regions in another order, the same for all rows."""
    if times < 1:
        raise ValueError(f"times must be at least 1, got {times}")
    orders = [torch.randperm(weights.shape[-1], generator=generator) for _ in range(times)]
    return torch.stack([weights[..., order.to(weights.device)] for order in orders])


def even(weights: Float[Tensor, "*k n"]) -> Float[Tensor, "*k n"]:
    """Return weights that are the same everywhere, and as much in all."""
    return weights.mean(-1, keepdim=True).expand_as(weights)


def permutation(
    given: Given, weights: Float[Tensor, "k n"], *, times: int = 100, generator: torch.Generator | None = None
) -> float:
    """Return how much the output moves when weights are shuffled: the median total variation.

    Args:
        given: Returns the output with other weights.
        weights: The weights.
        times: How often they are shuffled.
        generator: Where the chance comes from.

    Raises:
        ValueError: If ``times`` is less than 1.
    """
    outputs = given(torch.cat((weights[None], shuffled(weights, times, generator))))
    return float(total_variation(outputs[1:], outputs[:1]).quantile(0.5))


def uniform(given: Given, weights: Float[Tensor, "k n"]) -> float:
    """Return how much the output moves when all regions are read alike: the total variation."""
    outputs = given(torch.stack((weights, even(weights))))
    return float(total_variation(outputs[0], outputs[1]))


class Difference(NamedTuple):
    """How far two maps are apart."""

    divergence: float
    """Jensen-Shannon divergence, in nats."""
    agreement: float
    """Kendall's rank correlation."""


def between(a: Float[Tensor, "h w"], b: Float[Tensor, "_ _"]) -> Difference:
    """Return how far the maps of two models are apart: of two seeds, what no explanation can be finer than.

    Raises:
        ValueError: If a weight is negative, a map has none above zero, or they have not one shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"maps must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(a.min(), b.min()) < 0 or not (a.any() and b.any()):
        raise ValueError("maps must not be negative, and not zero everywhere")
    p, q = (each.flatten() / each.sum() for each in (a, b))
    return Difference(float(jensen_shannon(p, q)), kendall(a, b))
