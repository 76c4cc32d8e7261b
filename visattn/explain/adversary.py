"""Jain and Wallace: Attention is not Explanation (NAACL 2019), adversarial attention."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from visattn.explain.controls import Given, shuffled
from visattn.explain.distance import jensen_shannon, total_variation


class Adversary(NamedTuple):
    """The farthest weights that were found to say the same."""

    weights: Float[Tensor, "k n"]
    divergence: float
    """How far they are from the module's, in nats: Jensen-Shannon, the mean of the rows."""
    moved: float
    """How much the output moved: total variation."""


def adversary(
    given: Given,
    weights: Float[Tensor, "k n"],
    *,
    gates: bool = False,
    epsilon: float = 0.01,
    starts: int = 8,
    steps: int = 200,
    rate: float = 0.1,
    force: float = 500.0,
    generator: torch.Generator | None = None,
) -> Adversary:
    r"""Look for weights as far as possible from a module's that leave its output where it is.

    .. math:: \max_{a'} \operatorname{JSD}(a, a') \quad \text{such that} \quad \operatorname{TVD}(y, y') \le \varepsilon

    by gradient ascent on logits of :math:`a'`, from several starts at once, some by chance and some of the module's own
    weights in another order, with a force against what of the total variation is above :math:`\varepsilon`. A row keeps
    its sum; a gate stays between 0 and 1. What is found is a lower bound: there may be weights farther away.

    Args:
        given: Returns the output with other weights, with gradients.
        weights: The module's weights.
        gates: Whether weights are gates, each on its own between 0 and 1, and not shares of a sum.
        epsilon: How much the output may move.
        starts: From how many places the search starts.
        steps: How many steps it takes.
        rate: How large they are.
        force: How strong the output is held back.
        generator: Where the starts come from.

    Raises:
        ValueError: If an option is out of its range, a weight is negative, or a gate is above 1.
    """
    for name, value in {"starts": starts, "steps": steps}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, number in {"epsilon": epsilon, "rate": rate, "force": force}.items():
        if number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")
    if not (weights >= 0).all():
        raise ValueError(f"weights must not be negative, got {float(weights.min()):.4g}")
    if gates and (weights > 1).any():
        raise ValueError(f"weights of gates must be at most 1, got {float(weights.max()):.4g}")
    weights = weights.detach().float()
    totals = weights.sum(-1, keepdim=True)
    own = weights / totals.clamp_min(torch.finfo(weights.dtype).tiny)
    with torch.no_grad():
        said = given(weights[None])[0]
    logits = torch.randn(starts, *weights.shape, generator=generator).to(weights.device)
    others = shuffled(weights, starts, generator)[::2]
    logits[::2] = others.logit(1e-4) if gates else others.clamp_min(1e-6).log()
    logits.requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=rate)
    best = Adversary(weights, 0.0, 0.0)
    for step in range(steps + 1):
        with torch.enable_grad():
            other = logits.sigmoid() if gates else logits.softmax(-1) * totals
            far = jensen_shannon(own, other / other.sum(-1, keepdim=True).clamp_min(1e-30)).mean(-1)
            moved = total_variation(given(other), said)
            loss = (force * (moved - epsilon).relu() - far).sum()
        far, moved = far.detach(), moved.detach()
        allowed = far.masked_fill(moved > epsilon, -torch.inf)
        k = int(allowed.argmax())
        if float(allowed[k]) > best.divergence:
            best = Adversary(other[k].detach(), float(far[k]), float(moved[k]))
        if step < steps:
            (logits.grad,) = torch.autograd.grad(loss, [logits])
            optimiser.step()
    return best
