"""The n-grams of captions as arrays: which a caption has, how often, and how often the references of its image do."""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int, Shaped
from torch import Tensor

from visattn.metrics.captions import Caption, check

ORDER = 4
"""Words in the longest n-grams that are counted."""
ROWS = 512
"""Captions that are read at a time, so that what is compared of them fits into the cache of a processor."""

Captions: TypeAlias = Sequence[Caption] | Int[Tensor, "*b t"] | Int[np.ndarray, "*b t"]


class Numbers(dict[Any, int]):
    """Numbers of words; a word that has none gets the next one."""

    def __missing__(self, word: str | int) -> int:
        self[word] = number = len(self)
        return number


class Known(NamedTuple):
    """The n-grams of one order in the references."""

    keys: Int[np.ndarray, "k"]
    """Of each n-gram, sorted: the number of its first n − 1 words times that of words, plus the number of the last."""
    places: Int[np.ndarray, "p"]
    """Of each pair of an image and an n-gram of its references, sorted: image · k + n-gram."""
    counts: Shaped[np.ndarray, "p r"]
    """How often each reference of the image has it."""


class Matches(NamedTuple):
    """The distinct n-grams of one order in captions, caption by caption, in order of appearance."""

    row: Int[np.ndarray, "g"]
    """Which caption has it."""
    term: Int[np.ndarray, "g"]
    """Its number among the n-grams of all references, or −1."""
    times: Int[np.ndarray, "g"]
    """How often the caption has it."""
    found: Int[np.ndarray, "f"]
    """Which of these n-grams a reference of the image has."""
    reference: Shaped[np.ndarray, "f r"]
    """How often each reference has those."""


def number(keys: Int[np.ndarray, "k"], values: Int[np.ndarray, "*v"]) -> Int[np.ndarray, "*v"]:
    """Return where values stand among sorted keys, −1 for those that do not."""
    if not len(keys):
        return np.full(values.shape, -1)
    place = np.searchsorted(keys, values)
    place[place == len(keys)] = -1
    return np.where(keys[place] == values, place, -1)


def chained(*rows: Int[np.ndarray, "_ _"]) -> list[Int[np.ndarray, "_"]]:
    """Return the sorted keys of all n-grams in rows of tokens, order by order."""
    lengths = [(tokens >= 0).sum(1, keepdims=True) for tokens in rows]
    after = [(n - np.arange(tokens.shape[1]))[tokens >= 0] for tokens, n in zip(rows, lengths, strict=True)]
    left = np.concatenate(after)
    words, last = np.unique(np.concatenate([tokens[tokens >= 0] for tokens in rows]), return_inverse=True)
    keys, so_far, at = [words], last.copy(), np.arange(len(last))
    for n in range(1, ORDER):
        at = at[left[at] > n]
        grams, so_far[at] = np.unique(so_far[at] * len(words) + last[at + n], return_inverse=True)
        keys.append(grams)
    return keys


class References:
    """The references of images, read once; captions of these images are compared with them, many at a time.

    An n-gram is known by the number of its first n − 1 words and by its last word: nothing is hashed, so none is taken
    for another, and where captions are token ids no word is touched.

    Args:
        references: Captions of each image: words, or token ids.
        known: Further n-grams that get a number.
        end: Token that ends a caption: what comes after it is not read, as what comes after a negative id.
        count_end: Whether it counts as a word; a reference that lacks it then gets it.

    Raises:
        ValueError: If there is no image, or one without references.

    Example:
        >>> references = References([["a dog runs", "the dog"]])
        >>> tokens = references.read(["the dog runs"])
        >>> [match.reference.tolist() for match in references.compare(tokens, np.array([0]))]
        [[[0, 1], [1, 1], [1, 0]], [[0, 1], [1, 0]], [], []]
    """

    def __init__(
        self,
        references: Sequence[Sequence[Caption]],
        *,
        known: Collection[Sequence[str | int]] = (),
        end: str | int | None = None,
        count_end: bool = True,
    ) -> None:
        check(references)
        captions = list(chain.from_iterable(references))
        ids = not isinstance(next(chain.from_iterable(captions), ""), str)
        self.words = None if ids else Numbers()
        self.end = None if end is None else int(end) if self.words is None else self.words[str(end)]
        self.count_end = count_end
        fill = -1 if self.end is None or not count_end else self.end
        tokens = self.cut(self.padded("references", captions, self.words, fill))
        more = self.padded("frequencies", known, self.words)
        self.sizes = np.array([len(several) for several in references])
        image = np.repeat(np.arange(len(references)), self.sizes)
        which = np.arange(len(image)) - np.repeat(self.sizes.cumsum() - self.sizes, self.sizes)
        self.lengths = np.zeros((len(references), self.sizes.max()), np.int64)
        self.lengths[image, which] = (tokens >= 0).sum(1)
        self.keys = chained(tokens, more)
        self.known = []
        for keys, (row, term, count) in zip(self.keys, self.distinct(tokens), strict=True):
            places, inverse = np.unique(image[row] * len(keys) + term, return_inverse=True)
            counts = np.zeros((len(places), self.lengths.shape[1]), np.min_scalar_type(count.max(initial=0)))
            counts[inverse, which[row]] = count
            self.known.append(Known(keys, places, counts))

    def padded(
        self, name: str, captions: Collection[Caption], words: Numbers | None, fill: int = -1
    ) -> Int[np.ndarray, "b t"]:
        """Return captions as rows of numbers with one value behind their ends, once at least."""
        split = [caption.split() if isinstance(caption, str) else caption for caption in captions]
        first = next(chain.from_iterable(split), None)
        if first is not None and isinstance(first, str) != (words is not None):
            kinds = ("token ids", "words") if words is None else ("words", "token ids")
            raise ValueError(f"{name} must be {kinds[0]}, as references are, got {kinds[1]}: {first!r}")
        lengths = np.fromiter(map(len, split), np.int64, len(split))
        flat = chain.from_iterable(split)
        numbers = flat if words is None else map(words.__getitem__, flat)
        rows = np.full((len(split), max(ORDER, lengths.max(initial=0) + 1)), fill)
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.fromiter(numbers, np.int64, lengths.sum())
        return rows

    def cut(self, tokens: Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b t"]:
        """Return rows of tokens with −1 behind their ends."""
        over = tokens < 0
        if self.end is not None:
            ends = tokens == self.end
            over[:, self.count_end :] |= ends[:, : ends.shape[1] - self.count_end]
        return np.where(np.logical_or.accumulate(over, 1), -1, tokens)

    def read(self, captions: Captions) -> Int[np.ndarray, "rows length"]:
        """Return captions as rows of numbers, −1 behind their ends; those of an array in the order of its rows.

        Raises:
            ValueError: If they are words while the references are token ids, or the other way round.
        """
        if isinstance(captions, Tensor):
            captions = captions.detach().cpu().numpy()
        if not isinstance(captions, np.ndarray):
            return self.cut(self.padded("hypotheses", captions, None if self.words is None else Numbers(self.words)))
        if self.words is not None:
            raise ValueError(f"hypotheses must be words, as references are, got an array of {captions.dtype}")
        rows = captions.reshape(-1, captions.shape[-1]).astype(np.int64)
        return self.cut(np.pad(rows, ((0, 0), (0, max(0, ORDER - rows.shape[1]))), constant_values=-1))

    def terms(self, tokens: Int[np.ndarray, "b t"]) -> Iterator[Int[np.ndarray, "b _"]]:
        """Yield the numbers of the n-grams that begin at each token, order by order, −1 for unknown ones."""
        words = so_far = number(self.keys[0], tokens)
        yield so_far
        for n in range(1, ORDER):
            before, last = so_far[:, :-1], words[:, n:]
            whole = (before >= 0) & (last >= 0)
            so_far = np.full(last.shape, -1)
            so_far[whole] = number(self.keys[n], before[whole] * len(self.keys[0]) + last[whole])
            yield so_far

    def numbers(self, grams: Collection[Sequence[str | int]], n: int) -> Int[np.ndarray, "g"]:
        """Return the numbers of n-grams of n + 1 words."""
        return list(self.terms(self.padded("frequencies", grams, self.words)))[n][:, 0]

    def distinct(self, tokens: Int[np.ndarray, "b t"]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield row, number and count of the distinct n-grams in rows of tokens, order by order."""
        portions = [self.portion(tokens, at) for at in range(0, max(1, len(tokens)), ROWS)]
        for parts in zip(*portions, strict=True):
            yield tuple(map(np.concatenate, zip(*parts, strict=True)))

    def portion(self, tokens: Int[np.ndarray, "b t"], at: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the same of some of the rows: an n-gram counts where it equals none before it."""
        tokens = tokens[at : at + ROWS]
        tokens = tokens[:, : max(ORDER, (tokens >= 0).sum(1).max(initial=0))]
        same = pairs = tokens[:, :, None] == tokens[:, None, :]
        for n, term in enumerate(self.terms(tokens)):
            if n:
                same = same[:, :-1, :-1] & pairs[:, n:, n:]
            new = (tokens[:, n:] >= 0) & (same.argmax(2) == np.arange(same.shape[2]))
            yield np.nonzero(new)[0] + at, term[new], same.sum(2)[new]

    def compare(self, tokens: Int[np.ndarray, "b t"], images: Int[np.ndarray, "b"]) -> Iterator[Matches]:
        """Yield the n-grams of captions and how often the references of their images have them, order by order."""
        for known, (row, term, count) in zip(self.known, self.distinct(tokens), strict=True):
            seen = np.flatnonzero(term >= 0)
            place = number(known.places, images[row[seen]] * len(known.keys) + term[seen])
            yield Matches(row, term, count, seen[place >= 0], known.counts[place[place >= 0]])
