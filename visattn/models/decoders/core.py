"""What decoders have in common: they say a sentence word by word, about a memory that is prepared once for an image."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from visattn.attention.base import Built
from visattn.attention.memory.core import MemoryAttention
from visattn.models.network import at_least_one

First = Literal["begin", "zeros"]
Look = TypeVar("Look", bound=MemoryAttention)


class Said(NamedTuple):
    """What a decoder makes of words, at every place of a sentence."""

    features: Float[Tensor, "b r t d"]
    """What the next word is said from, by :meth:`Decoder.write`."""
    maps: Any
    """Where it looked: what its attention returned, with the axes ``b r t``; None without attention."""


class Decoder(Built):
    """Say sentences about what lies in a memory, each word from those before.

    A memory of regions is prepared once for an image (:meth:`prepare`). All sentences about it share it: the captions
    it is trained with, or beams. With the words known, :meth:`forward` takes all steps; :meth:`step` takes one. Words
    are numbers below ``vocabulary``, one of which ends a sentence; what begins it is no word, but an input of the
    decoder's own.

    Args:
        vocabulary: How many words there are.
        memory: Features of the memory.

    Raises:
        ValueError: If a number is less than 1.
    """

    parallel: ClassVar[bool] = False
    """Does it look for all steps at once, so that no look can depend on those before?"""

    def __init__(self, vocabulary: int, memory: int):
        super().__init__()
        at_least_one(vocabulary=vocabulary, memory=memory)
        self.vocabulary = vocabulary

    def carried(self, attention: Look, asks: int, reads: int | None = None) -> Look:
        """Return attention that this decoder can carry.

        Args:
            attention: What looks at the memory.
            asks: Features of the queries there are.
            reads: Features that what is read is to have; None: any.

        Raises:
            ValueError: If it wants other queries, or what it reads is of no use, or it is causal, or depends on the
                looks before where all steps look at once.
        """
        own, other = type(self).__name__, type(attention).__name__
        if attention.asks != asks:
            raise ValueError(f"{own} asks with {asks} features, {other} wants to be asked with {attention.asks}")
        if reads is not None and attention.features != reads:
            raise ValueError(f"{own} wants to read {reads} features, {other} reads {attention.features}")
        if attention.causal:
            raise ValueError(f"{own} lets every word look at all regions, {other} is causal")
        if self.parallel and attention.stateful:
            raise ValueError(f"{own} looks for all steps at once, {other} looks by what it saw before")
        return attention

    def prepare(self, memory: Float[Tensor, "b l d"], mask: Tensor | None = None, size: Any = None) -> Any:
        """Make a memory ready, once for all sentences and steps.

        Args:
            memory: The regions of images.
            mask: True where there is a region; None: everywhere.
            size: Height and width of the map whose positions, row by row, are the memory.
        """
        raise NotImplementedError

    def begin(self, prepared: Any, count: int) -> Any:
        """Return the state before the first word of ``count`` sentences about each image.

        It is a tree of tensors that begin with the axes ``b r``, so that beams can be put in another order.
        """
        raise NotImplementedError

    def step(self, word: Int[Tensor, "b r"] | None, prepared: Any, state: Any) -> tuple[Tensor, Any, Any]:
        """Take a step: return the features of the next word, where was looked, and the state after it.

        Args:
            word: What was said last; None at the first step.
            prepared: What :meth:`prepare` returned.
            state: What :meth:`begin` or the step before returned.
        """
        raise NotImplementedError

    def forward(self, prepared: Any, words: Int[Tensor, "b r t"], lengths: Int[Tensor, "b r"] | None = None) -> Said:
        """Take all steps, with the words known that are said before each step but the first.

        Args:
            prepared: What :meth:`prepare` returned.
            words: What is said; of t words come t + 1 steps.
            lengths: How many steps of each sentence count; None: all. A decoder may leave out the others, which then
                have zeros.
        """
        state = self.begin(prepared, words.shape[1])
        features, maps = [], []
        for t in range(words.shape[2] + 1):
            each, where, state = self.step(words[:, :, t - 1] if t else None, prepared, state)
            features.append(each)
            maps.append(where)
        return Said(torch.stack(features, 2), stacked(maps))

    def write(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the logits of the next word."""
        raise NotImplementedError


class Embedding(nn.Module):
    """Words as vectors, and what stands before the first.

    Args:
        vocabulary: How many words there are.
        width: Features of a vector.
        first: What stands before the first word: a learned vector that tells where a sentence is to ``"begin"``, or
            ``"zeros"``.
        dropout: Probability to drop a number.
    """

    def __init__(self, vocabulary: int, width: int, *, first: First = "begin", dropout: float = 0.0):
        super().__init__()
        if first not in get_args(First):
            raise ValueError(f"first must be {' or '.join(get_args(First))}, got {first!r}")
        self.weight = nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)
        self.first = nn.Parameter(torch.randn(width) * width**-0.5) if first == "begin" else None
        self.dropout = nn.Dropout(dropout)

    def begin(self, *shape: int) -> Float[Tensor, "*b e"]:
        """Return what stands before the first word."""
        width = self.weight.shape[1]
        first = self.weight.new_zeros(width) if self.first is None else self.first
        return self.dropout(first.expand(*shape, width))

    def one(self, word: Int[Tensor, "b r"] | None, shape: Sequence[int]) -> Float[Tensor, "b r e"]:
        """Return the vector of a word, or of what stands before the first."""
        return self.begin(*shape) if word is None else self.dropout(nn.functional.embedding(word, self.weight))

    def forward(self, words: Int[Tensor, "b r t"]) -> Float[Tensor, "b r s e"]:
        """Return the vectors of words, with what stands before them."""
        vectors = nn.functional.embedding(words, self.weight)
        return torch.cat((self.begin(*words.shape[:2], 1), self.dropout(vectors)), 2)


def stacked(maps: Sequence[Any]) -> Any:
    """Put the maps of all steps side by side, behind the axes of images and sentences."""
    return tree_map(lambda *each: torch.stack(each, 2) if isinstance(each[0], Tensor) else None, *maps)


def over(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to all tensors of a tree."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
