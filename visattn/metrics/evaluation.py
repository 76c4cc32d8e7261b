"""All metrics of captions in one call, also by the length of captions."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from visattn.metrics.bleu import Bleu, bleu
from visattn.metrics.captions import Caption, Scores, check
from visattn.metrics.cider import Frequencies, cider, cider_d, document_frequencies
from visattn.metrics.java import meteor, spice
from visattn.metrics.rouge import rouge_l
from visattn.metrics.tokens import tokenise

METRICS = ("bleu", "rouge_l", "cider_d")


def tokens(caption: Caption) -> Sequence[str | int]:
    """Return the tokens of a caption."""
    return tokenise(caption) if isinstance(caption, str) else caption


def evaluate(
    hypotheses: Sequence[Caption],
    references: Sequence[Sequence[Caption]],
    metrics: Sequence[str] = METRICS,
    *,
    frequencies: Frequencies | None = None,
    brevity: bool = True,
) -> dict[str, float]:
    """Return the scores of captions by name; BLEU's are ``bleu_1`` to ``bleu_4``.

    Strings are cut by :func:`~visattn.metrics.tokens.tokenise`; lists of tokens are taken as they are.

    Args:
        hypotheses: A caption of each image.
        references: Captions of the same images, in the same order.
        metrics: Any of ``bleu``, ``rouge_l``, ``cider``, ``cider_d`` (what the COCO evaluation calls CIDEr), ``meteor``
            and ``spice``.
        frequencies: How rare n-grams are, for CIDEr; by default what the references say.
        brevity: Whether BLEU marks hypotheses down that are shorter than their references.

    Raises:
        ValueError: If a metric is unknown, there is no image, one without references, or not a hypothesis for each.
        RuntimeError: If METEOR or SPICE is asked for and Java or pycocoevalcap is missing.

    Example:
        >>> scores = evaluate(["A dog runs."], [["A dog runs on grass.", "a brown dog"]], ["bleu", "rouge_l"])
        >>> {name: round(value, 2) for name, value in scores.items()}
        {'bleu_1': 1.0, 'bleu_2': 1.0, 'bleu_3': 1.0, 'bleu_4': 0.03, 'rouge_l': 0.77}
    """
    known: dict[str, Callable[..., Bleu | Scores]] = {
        "bleu": partial(bleu, brevity=brevity),
        "rouge_l": rouge_l,
        "cider": partial(cider, frequencies=frequencies),
        "cider_d": partial(cider_d, frequencies=frequencies),
        "meteor": meteor,
        "spice": spice,
    }
    if unknown := [metric for metric in metrics if metric not in known]:
        raise ValueError(f"metrics must be among {', '.join(known)}, got {', '.join(unknown)}")
    check(references, hypotheses)
    said = [tokens(caption) for caption in hypotheses]
    right = [[tokens(caption) for caption in several] for several in references]
    scores: dict[str, float] = {}
    for metric in metrics:
        corpus = known[metric](said, right).corpus
        if isinstance(corpus, float):
            scores[metric] = corpus
        else:
            scores |= {f"{metric}_{n}": float(value) for n, value in enumerate(corpus, 1)}
    return scores


def evaluate_by_length(
    hypotheses: Sequence[Caption],
    references: Sequence[Sequence[Caption]],
    edges: Sequence[int],
    metrics: Sequence[str] = METRICS,
    *,
    frequencies: Frequencies | None = None,
    brevity: bool = True,
) -> dict[str, dict[str, int | float]]:
    """Return the scores of :func:`evaluate`, apart for images with short and with long captions.

    Images are grouped by the mean number of words of their references, which is the same whatever is evaluated. How
    rare an n-gram is, CIDEr takes from all of them.

    Args:
        hypotheses: A caption of each image.
        references: Captions of the same images, in the same order.
        edges: Rising lengths, each the longest of a group: (8, 12) makes the groups "to 8", "to 12" and "above". One
            without images is left out. The scores of a group begin with the number of its ``images``.
        metrics: Which, as for :func:`evaluate`; so are the other arguments.

    Raises:
        ValueError: As ``evaluate`` does, and if there are no edges or they do not rise.

    Example:
        >>> scores = evaluate_by_length(["a dog", "a cat"], [["a dog"], ["a cat on a grey wall"]], [3])
        >>> {group: (score["images"], round(score["bleu_1"], 2)) for group, score in scores.items()}
        {'to 3': (1, 1.0), 'above': (1, 0.14)}
    """
    if not len(edges) or not all(low < high for low, high in pairwise(edges)):
        raise ValueError(f"edges must be one or more rising lengths, got {list(edges)}")
    check(references, hypotheses)
    right = [[tokens(caption) for caption in several] for several in references]
    frequencies = frequencies or document_frequencies(right)
    groups = np.searchsorted(edges, [np.mean([len(caption) for caption in several]) for several in right])
    scores: dict[str, dict[str, int | float]] = {}
    for k, name in enumerate((*(f"to {edge}" for edge in edges), "above")):
        if images := np.flatnonzero(groups == k).tolist():
            group = [hypotheses[i] for i in images], [right[i] for i in images]
            found = evaluate(*group, metrics, frequencies=frequencies, brevity=brevity)
            scores[name] = {"images": len(images), **found}
    return scores
