"""CIDEr and CIDEr-D, with references that are read once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int
from torch import Tensor

from visattn.metrics.captions import Caption, Scores, check
from visattn.metrics.ngrams import ORDER, Captions, References


class Frequencies(NamedTuple):
    """In the references of how many images n-grams stand.

    Example:
        >>> counts = {("a",): 40000, ("dog",): 1500, ("a", "dog"): 900}
        >>> cider_d(["a dog"], [["a dog", "a cat"]], Frequencies(40504, counts)).corpus > 0
        True
    """

    images: float
    """How many images there are."""
    counts: Mapping[tuple[str | int, ...], float]
    """In how many an n-gram stands; of those left out, in one at most."""


def document_frequencies(references: Sequence[Sequence[Caption]]) -> Frequencies:
    """Count in the references of how many images each n-gram stands, to score the captions of other images by it.

    Raises:
        ValueError: If there is no image, or one without references.

    Example:
        >>> document_frequencies([["a dog", "a cat"], ["a bird"]]).counts["a",]
        2
    """
    check(references)
    counts: Counter[tuple[str | int, ...]] = Counter()
    for several in references:
        tokens = [caption.split() if isinstance(caption, str) else caption for caption in several]
        counts.update({tuple(t[i : i + n]) for t in tokens for n in range(1, ORDER + 1) for i in range(len(t) - n + 1)})
    return Frequencies(len(references), counts)


class Cider:
    r"""Score captions by the n-grams that they share with references, rare ones above all.

    .. math:: \operatorname{CIDEr}(h) = \frac{10}{4 R} \sum_{n=1}^4 \sum_{r=1}^R
        \frac{h_n \cdot r_n}{\|h_n\| \|r_n\|}, \quad h_n = \bigl(\text{count of } w \text{ in } h\bigr)
        \Bigl(\ln N - \ln \max(1, d_w)\Bigr)_w

    where :math:`d_w` of :math:`N` images have the n-gram :math:`w` in a reference. With one image all weights are 0, as
    is the score; with few they say little: give ``frequencies`` of more.

    Differs from the paper: counts are not divided by the caption's length, and words are not stemmed, as in the
    released code.

    Args:
        references: Captions of each image: words, or token ids. They are read once.
        frequencies: How rare n-grams are; by default what the references say.
        end: Token that ends a caption: what comes after it is not read, as what comes after a negative id.
        count_end: Whether it counts as a word, so that a caption cut off scores less than one that ends; a reference
            that lacks it then gets it.

    Raises:
        ValueError: If there is no image, one without references, or an n-gram in more images than there are.

    Example:
        >>> scorer = Cider([[[4, 5, 6], [4, 5]], [[7, 8]]], end=2)
        >>> scorer(torch.tensor([[[4, 5, 6, 2], [4, 2, 0, 0]], [[7, 8, 2, 0], [4, 5, 2, 0]]])).round(2)
        array([[6.53, 1.61],
               [7.5 , 0.  ]])
    """

    def __init__(
        self,
        references: Sequence[Sequence[Caption]],
        frequencies: Frequencies | None = None,
        *,
        end: str | int | None = None,
        count_end: bool = True,
    ) -> None:
        images = len(references) if frequencies is None else frequencies.images
        counts = {} if frequencies is None else {gram: c for gram, c in frequencies.counts.items() if c > 1}
        if (most := max(counts.values(), default=0)) > images:
            raise ValueError(f"frequencies must have images for all counts, got {images} images and a count of {most}")
        self.references = References(references, known=counts, end=end, count_end=count_end)
        self.rarity, self.norms = [], []
        for n, known in enumerate(self.references.known):
            image, term = np.divmod(known.places, max(1, len(known.keys)))
            found = np.bincount(term, minlength=len(known.keys)).astype(float)
            if frequencies is not None:
                listed = {gram: count for gram, count in counts.items() if len(gram) == n + 1}
                found[:] = 0
                found[self.references.numbers(listed, n)] = list(listed.values())
            rarity = np.log(images) - np.log(np.maximum(1, found))
            squares = (known.counts * rarity[term, None]) ** 2
            self.norms.append(np.sqrt(self.summed(image, squares, len(references))))
            self.rarity.append(np.append(rarity, np.log(images)))  # the last: of n-grams without a number, −1

    @staticmethod
    def summed(row: Int[np.ndarray, "g"], values: Float64[np.ndarray, "g r"], rows: int) -> Float64[np.ndarray, "b r"]:
        """Add values by row, in their order."""
        return np.stack([np.bincount(row, value, rows) for value in values.T], 1, dtype=np.float64)

    def product(
        self, hypothesis: Float64[np.ndarray, "g 1"], reference: Float64[np.ndarray, "g r"]
    ) -> Float64[np.ndarray, "g r"]:
        """Return what an n-gram of these weights adds to the product."""
        return hypothesis * reference

    def closeness(self, difference: Int[np.ndarray, "b r"]) -> Float64[np.ndarray, "b r"]:
        """Return by what the difference in the number of bigrams multiplies the score."""
        return np.ones(difference.shape)

    def __call__(
        self, hypotheses: Captions, images: Sequence[int] | Int[np.ndarray, "b"] | Int[Tensor, "b"] | None = None
    ) -> Float64[np.ndarray, "*b"]:
        """Return the score of each caption.

        Args:
            hypotheses: A list of captions, or an array of token ids: (b, t), or with several captions of each image
                (b, n, t).
            images: Of which image each is, counted as in ``references``; by default all, in their order.

        Raises:
            ValueError: If ``hypotheses`` and ``images`` are not of one length, an image is unknown, or words are
                compared with token ids.
        """
        tokens = self.references.read(hypotheses)
        shape = hypotheses.shape[:-1] if isinstance(hypotheses, (Tensor, np.ndarray)) else (len(hypotheses),)
        images = images.cpu() if isinstance(images, Tensor) else images
        which = np.arange(len(self.references.sizes)) if images is None else np.asarray(images, np.int64)
        if len(which) != shape[0]:
            raise ValueError(f"hypotheses must be of one image each, got {shape[0]} for {len(which)} images")
        if which.size and not 0 <= which.min() <= which.max() < len(self.references.sizes):
            raise ValueError(f"images must be from 0 to {len(self.references.sizes) - 1}, got {which.tolist()}")
        which = np.repeat(which, len(tokens) // max(1, len(which)))
        total = np.zeros((len(tokens), self.references.lengths.shape[1]))
        for rarity, norms, match in zip(self.rarity, self.norms, self.references.compare(tokens, which), strict=True):
            weights = match.times * rarity[match.term]
            norm = np.sqrt(self.summed(match.row, weights[:, None] ** 2, len(tokens))) * norms[which]
            found = match.found
            products = self.product(weights[found, None], match.reference * rarity[match.term[found], None])
            shared = self.summed(match.row[found], products, len(tokens))
            total += np.divide(shared, norm, out=np.zeros_like(shared), where=norm > 0)
        bigrams = np.maximum(0, (tokens >= 0).sum(1)[:, None] - 1) - np.maximum(0, self.references.lengths[which] - 1)
        scores = (total * self.closeness(bigrams)).sum(1) / ORDER / self.references.sizes[which] * 10
        return scores.reshape(shape)


class CiderD(Cider):
    r"""Score captions by the n-grams that they share with references, where repeating words does not pay.

    .. math:: \operatorname{CIDEr-D}(h) = \frac{10}{4 R} \sum_{n=1}^4 \sum_{r=1}^R
        e^{-(b_h - b_r)^2 / 2 \sigma^2} \frac{\min(h_n, r_n) \cdot r_n}{\|h_n\| \|r_n\|}, \quad \sigma = 6

    with the weights of :class:`Cider` and :math:`b` the number of bigrams. It is what the evaluation of COCO captions
    calls CIDEr, and the reward of self-critical training: keep one scorer, and give it the samples of each batch.

    Arguments and errors as of :class:`Cider`.

    Example:
        >>> scorer = CiderD([["a dog runs", "a dog"], ["two birds"]])
        >>> scorer(["a dog runs", "a dog", "a dog a dog"], images=[0, 0, 0]).round(2)
        array([5.63, 4.38, 2.01])
    """

    def product(
        self, hypothesis: Float64[np.ndarray, "g 1"], reference: Float64[np.ndarray, "g r"]
    ) -> Float64[np.ndarray, "g r"]:
        return np.minimum(hypothesis, reference) * reference

    def closeness(self, difference: Int[np.ndarray, "b r"]) -> Float64[np.ndarray, "b r"]:
        return np.exp(-(difference**2) / (2 * 6.0**2))


def cider(
    hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]], frequencies: Frequencies | None = None
) -> Scores:
    """Return :class:`Cider` of a caption of each image, and the mean.

    Raises:
        ValueError: As :class:`Cider` does, and if there is not a hypothesis for each image.

    Example:
        >>> cider(["a dog", "two birds"], [["a dog"], ["two birds"]]).corpus
        5.0
    """
    check(references, hypotheses)
    return Scores.mean(Cider(references, frequencies)(hypotheses))


def cider_d(
    hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]], frequencies: Frequencies | None = None
) -> Scores:
    """Return :class:`CiderD` of a caption of each image, and the mean.

    Raises:
        ValueError: As :class:`Cider` does, and if there is not a hypothesis for each image.

    Example:
        >>> cider_d(["a dog", "two birds birds"], [["a dog"], ["two birds"]]).images.round(2).tolist()
        [5.0, 3.3]
    """
    check(references, hypotheses)
    return Scores.mean(CiderD(references, frequencies)(hypotheses))
