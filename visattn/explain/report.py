"""All measures of one map, each beside its controls."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from visattn.explain.adversary import Adversary, adversary
from visattn.explain.controls import permutation, shuffled, uniform
from visattn.explain.curves import Baseline, Curve, blended, deletion, emptied, enlarged, insertion
from visattn.explain.distance import kendall, total_variation
from visattn.explain.subject import Gradient, Subject

Measure = Literal["deletion", "insertion", "gradient", "leave-one-out", "permutation", "uniform", "adversary"]
By = Literal["pixels", "regions"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class Finding(NamedTuple):
    """What a measure says of a map, and of what it is compared with; None where there is no such thing."""

    of_map: float | None
    of_shuffled: float | None = None
    """The mean of the map with its regions in other orders; of outputs, the median."""
    of_uniform: float | None = None
    """Of regions that are all alike."""
    of_centre: float | None = None
    """Of the centre of the image, where something is pointed at."""


class Explanation(NamedTuple):
    """What was found of a map."""

    findings: dict[str, Finding]
    curves: dict[str, dict[str, Curve]]
    """Of ``deletion`` and ``insertion``: those of the ``map``, of ``shuffled`` maps and of a ``uniform`` one."""
    adversary: Adversary | None


def explain(
    subject: Subject,
    measures: Sequence[Measure] = MEASURES,
    *,
    baseline: Baseline = "mean",
    by: By = "pixels",
    steps: int = 20,
    draws: int = 5,
    shuffles: int = 100,
    epsilon: float = 0.01,
    gradient: Gradient = "norm",
    seed: int = 0,
) -> Explanation:
    r"""Ask in how far the weights of a subject explain what is said.

    ================= ================================================================================================
    measure           what it says
    ================= ================================================================================================
    ``deletion``      mean probability while what has great weights is taken away first: the less, the better
    ``insertion``     mean probability while what has great weights comes first: the more, the better
    ``gradient``      :math:`\tau` of weights and gradients
    ``leave-one-out`` :math:`\tau` of weights and of how much the output moves without a region
    ``permutation``   how much the output moves when weights are shuffled: the median
    ``uniform``       how much the output moves when all regions have the same weight
    ``adversary``     how far weights can be from the map, while the output moves by at most ``epsilon``
    ================= ================================================================================================

    Where the attention is not ours, weights cannot be replaced, and the last three say nothing; nor does an adversary
    of weights that are neither shares nor gates.

    Args:
        subject: What is said, and the weights it is said with.
        measures: What is measured.
        baseline: What takes the place of what is taken away; see :func:`~visattn.explain.emptied`.
        by: Whether single ``"pixels"`` are taken away, in the order of the map enlarged to the image, or ``"regions"``:
            cells under the map, or of a decoder's memory.
        steps: In how many steps.
        draws: Shuffled maps that curves are compared with.
        shuffles: How often weights are shuffled.
        epsilon: By how much the output may move under an adversary: total variation.
        gradient: What of a gradient counts.
        seed: Where chance starts.

    Raises:
        ValueError: If an option is out of its range.
    """
    if unknown := [each for each in measures if each not in MEASURES]:
        raise ValueError(f"measures must be of {', '.join(MEASURES)}, got {unknown[0]!r}")
    if by not in get_args(By):
        raise ValueError(f"by must be pixels or regions, got {by!r}")
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be norm or product, got {gradient!r}")
    chance = torch.Generator().manual_seed(seed)
    findings: dict[str, Finding] = {}
    empty = emptied(subject.image, baseline)
    curves = {}
    for name in (each for each in ("deletion", "insertion") if each in measures):
        curves[name] = controlled(subject, name, empty, by=by, steps=steps, draws=draws, generator=chance)
        findings[name] = Finding(*(curve.area for curve in curves[name].values()))  # those of a Finding, in its order
    weights, found = subject.weights, None
    others = shuffled(subject.map.flatten(), draws, chance)
    for name in (each for each in ("gradient", "leave-one-out") if each in measures):
        strong = subject.gradient(gradient) if name == "gradient" else leave_one_out(subject, empty)
        of_others = torch.tensor([kendall(each, strong.flatten()) for each in others])
        findings[name] = Finding(kendall(subject.map, strong), float(of_others.mean()))
    with torch.no_grad():
        if "permutation" in measures and not subject.fixed:
            moved = permutation(subject.given, weights, times=shuffles, generator=chance)
            findings["permutation"] = Finding(None, moved)
        if "uniform" in measures and not subject.fixed:
            findings["uniform"] = Finding(None, None, uniform(subject.given, weights))
    if "adversary" in measures and not subject.fixed and searchable(subject):
        found = adversary(subject.given, weights, gates=subject.gates, epsilon=epsilon, generator=chance)
        findings["adversary"] = Finding(found.divergence)
    return Explanation(findings, curves, found)


def controlled(
    subject: Subject,
    name: Literal["deletion", "insertion"],
    empty: Float[Tensor, "c h w"],
    *,
    by: By = "pixels",
    steps: int = 20,
    draws: int = 5,
    generator: torch.Generator | None = None,
) -> dict[str, Curve]:
    """Return a curve by the order of the map, the mean of those of shuffled maps, and that of an image that fades.

    A memory does not fade: of its regions there is no such curve.

    Args:
        subject: What is said, and the map.
        name: Which curve.
        empty: What the image is where things were taken away.
        by: What is taken away.
        steps: In how many steps.
        draws: How many shuffled maps there are.
        generator: Where the chance comes from.
    """
    size = (subject.image.shape[1], subject.image.shape[2])

    def score(there: Tensor) -> Tensor:
        if by == "regions":
            return subject.without(there, empty)[:, subject.target]
        return subject.outputs(blended(subject.image, empty, there.to(subject.image.dtype)))[:, subject.target]

    def along(weights: Tensor) -> Curve:
        order = weights if by == "regions" else enlarged(weights, size)
        return (deletion if name == "deletion" else insertion)(score, order, steps=steps, generator=generator)

    of_map = along(subject.map)
    others = [along(each.view(subject.size)) for each in shuffled(subject.map.flatten(), draws, generator)]
    of_shuffled = Curve(of_map.shares, torch.stack([each.scores for each in others]).mean(0))
    found = {"map": of_map, "shuffled": of_shuffled}
    if subject.pictured or by == "pixels":
        there = 1 - of_map.shares if name == "deletion" else of_map.shares
        faded = subject.outputs(blended(subject.image, empty, there.to(empty.dtype)[:, None, None]))
        found["uniform"] = Curve(of_map.shares, faded[:, subject.target])
    return found


def leave_one_out(subject: Subject, empty: Float[Tensor, "c h w"]) -> Float[Tensor, "rows columns"]:
    """Return how much the output moves without each region: total variation."""
    count = subject.weights.shape[1]
    there = ~torch.eye(count, dtype=torch.bool, device=subject.weights.device).view(count, *subject.size)
    return total_variation(subject.without(there, empty), subject.output).view(subject.size)


def searchable(subject: Subject) -> bool:
    """Can an adversary be looked for: are the weights shares, or gates?"""
    return bool((subject.weights >= 0).all()) and not (subject.gates and bool((subject.weights > 1).any()))
