"""BLEU-1 to BLEU-4, of a corpus and of each caption."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from visattn.metrics.captions import Caption, check
from visattn.metrics.ngrams import References


class Counts(NamedTuple):
    """What BLEU is made of, of each caption (…, order); added over captions, of a corpus: add over its parts, too."""

    length: Int[np.ndarray, "*b"]
    """Words of the hypothesis."""
    reference: Int[np.ndarray, "*b"]
    """Words of the reference closest in length."""
    guessed: Int[np.ndarray, "*b o"]
    """N-grams of the hypothesis."""
    correct: Int[np.ndarray, "*b o"]
    """Those that a reference has as often."""

    def total(self) -> "Counts":
        """Return the counts of all captions together."""
        return Counts(*(count.sum(0) for count in self))


class Bleu(NamedTuple):
    """BLEU-1, BLEU-2, … of captions."""

    corpus: Float[np.ndarray, "o"]
    """Of all together, by the sums of their counts."""
    images: Float[np.ndarray, "n o"]
    """Of each."""
    counts: Counts
    """Of each."""


def bleu_from_counts(counts: Counts, *, brevity: bool = True) -> Float[np.ndarray, "*b o"]:
    r"""Return BLEU-1, BLEU-2, … of counts.

    .. math:: B_k = \min\Bigl(1, e^{1 - 1 / q}\Bigr) \Bigl(\prod_{n \le k} p_n\Bigr)^{1/k}, \quad
        p_n = \frac{c_n + 10^{-15}}{g_n + 10^{-9}}, \quad q = \frac{l + 10^{-15}}{r + 10^{-9}}

    with :math:`c_n` of :math:`g_n` n-grams correct and :math:`l` words beside :math:`r` of references.

    Args:
        counts: Of one or more captions, or of a corpus.
        brevity: Whether hypotheses shorter than their references are marked down.

    Example:
        >>> counts = Counts(*map(np.array, (9893, 9855, [9893, 8893, 7893, 6893], [5732, 2510, 1043, 423])))
        >>> bleu_from_counts(counts).round(3).tolist()
        [0.579, 0.404, 0.279, 0.191]
    """
    precision = (counts.correct + 1e-15) / (counts.guessed + 1e-9)
    scores = precision.cumprod(-1) ** (1 / np.arange(1, precision.shape[-1] + 1))
    if brevity:
        ratio = (counts.length + 1e-15) / (counts.reference + 1e-9)
        scores = scores * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]
    return scores


def bleu(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]], *, brevity: bool = True) -> Bleu:
    r"""Compare captions by their n-grams, as the evaluation of COCO captions does.

    An n-gram is correct as often as the one reference with most of it has it. Of references equally close in length,
    the shorter counts. The formula is that of :func:`bleu_from_counts`; a hypothesis without words gets 0.

    Args:
        hypotheses: A caption of each image.
        references: Captions of the same images, in the same order.
        brevity: Whether hypotheses shorter than their references are marked down. Some papers leave it out.

    Raises:
        ValueError: If there is no image, one without references, or not a hypothesis for each; or if hypotheses are
            words and references token ids, or the other way round.

    Example:
        >>> bleu(["a dog runs on grass"], [["a dog runs on the grass", "a brown dog"]]).corpus.round(2).tolist()
        [0.82, 0.71, 0.65, 0.58]
    """
    check(references, hypotheses)
    read = References(references)
    tokens = read.read(hypotheses)
    length = (tokens >= 0).sum(1)
    far = np.abs(read.lengths - length[:, None]) * (read.lengths.max() + 1) + read.lengths
    far[np.arange(far.shape[1]) >= read.sizes[:, None]] = np.iinfo(np.int64).max
    closest = np.take_along_axis(read.lengths, far.argmin(1)[:, None], 1)[:, 0]
    guessed, correct = [], []
    for n, match in enumerate(read.compare(tokens, np.arange(len(tokens)))):
        most = np.minimum(match.times[match.found], match.reference.max(1))
        correct.append(np.bincount(match.row[match.found], most, len(tokens)).astype(np.int64))
        guessed.append(np.maximum(0, length - n))
    counts = Counts(length, closest, np.stack(guessed, 1), np.stack(correct, 1))
    return Bleu(bleu_from_counts(counts.total(), brevity=brevity), bleu_from_counts(counts, brevity=brevity), counts)
