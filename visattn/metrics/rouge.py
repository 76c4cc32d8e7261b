"""ROUGE-L, by the longest common subsequence."""

from collections.abc import Sequence

import numpy as np

from visattn.metrics.captions import Caption, Scores, check

BETA = 1.2


def split(caption: Caption) -> Sequence[str | int]:
    """Return tokens; no words at all are one empty word, as in the original."""
    return caption.split(" ") if isinstance(caption, str) else caption or [""]


def common(first: Sequence[str | int], second: Sequence[str | int]) -> int:
    """Return the length of the longest common subsequence.

    All columns of the usual table are the bits of one number, 0 where the table steps up from the column before
    (Hyyrö, 2004, "Bit-parallel LCS-length computation revisited").

    Example:
        >>> common("a b c d e".split(), "a c b e".split())
        3
    """
    places: dict[str | int, int] = {}
    for k, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << k
    flat = ones = (1 << len(first)) - 1
    for token in second:
        steps = flat & places.get(token, 0)
        flat = ((flat + steps) | (flat - steps)) & ones
    return len(first) - flat.bit_count()


def rouge_l(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
    r"""Compare captions by their longest common subsequences, as the evaluation of COCO captions does.

    .. math:: R_L = \frac{(1 + \beta^2) P R}{R + \beta^2 P}, \quad
        P = \max_r \frac{\operatorname{lcs}(h, r)}{|h|}, \quad R = \max_r \frac{\operatorname{lcs}(h, r)}{|r|}, \quad
        \beta = 1.2

    Precision and recall may be those of different references. A string is cut at every single blank.

    Args:
        hypotheses: A caption of each image.
        references: Captions of the same images, in the same order.

    Raises:
        ValueError: If there is no image, one without references, or not a hypothesis for each.

    Example:
        >>> round(rouge_l(["a dog runs on grass"], [["a dog runs on the grass", "a brown dog"]]).corpus, 3)
        0.894
    """
    check(references, hypotheses)
    scores = []
    for hypothesis, several in zip(map(split, hypotheses), references, strict=True):
        lengths = [(common(hypothesis, tokens), len(tokens)) for tokens in map(split, several)]
        precision = max(shared for shared, _ in lengths) / len(hypothesis)
        recall = max(shared / length for shared, length in lengths)
        weighted = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / weighted if weighted else 0.0)
    return Scores.mean(np.array(scores))
