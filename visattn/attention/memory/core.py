"""What attention on a memory has in common: it is prepared once, and asked by many queries, step by step."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visattn.attention.base import Attention
from visattn.attention.core import softmax, uncast, wide


class Prepared(NamedTuple):
    """A memory made ready once for all who ask it: the beams or captions of an image, and all of their steps."""

    keys: Tensor
    """What queries are compared with, in at least float32."""
    values: Float[Tensor, "b l e"]
    """What is read."""
    mask: Bool[Tensor, "b l"] | None = None
    """True where there is something to read; None: everywhere."""
    size: tuple[int, int] | None = None
    """Height and width of the map whose positions, row by row, are the memory."""
    more: Any = None
    """What else a kind of attention makes once, for a memory."""


class MemoryAttention(Attention):
    r"""Let queries read from a memory: the regions of an image, or words.

    .. math:: z = \sum_i a_i v_i, \quad a = \operatorname{softmax}_i(e_i)

    A subclass says how queries and keys are compared, by :meth:`compare`, or has an :meth:`attend` of its own. What of
    it does not depend on the query is done once, by :meth:`prepare`. Queries come as ``(b, r, q)``: so many for each
    memory, which all share it, whether they are beams, captions or steps.

    Where weights depend on those before, :meth:`attend` also takes and returns a state: a tensor or a ``NamedTuple`` of
    tensors that begin with the axes ``b r``, so that beams can be put in another order. None is the state before the
    first step.

    Args:
        query: Features :math:`q` of a query.
        memory: Features :math:`d` of the memory.
    """

    place = None
    queried = True

    stateful: ClassVar[bool] = False
    """Do weights depend on those before, so that steps are to be taken one after another?"""

    needs_size: ClassVar[bool] = False
    """Does it ask where on a map the memory lies?"""

    size: tuple[int, int] | None = None
    """Height and width of the only map it looks at; None: of any."""

    causal: bool = False
    """Are queries steps, of which all but the last leave out what is for later ones?"""

    def __init__(self, query: int, memory: int):
        super().__init__()
        for name, features in {"query": query, "memory": memory}.items():
            if features < 1:
                raise ValueError(f"{name} must be at least 1, got {features}")
        self.asks = query
        """Features of a query."""
        self.holds = memory
        """Features of the memory."""

    @property
    def features(self) -> int:
        """Features of what is read."""
        return self.holds

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        """Make a memory ready for queries.

        Args:
            memory: The memory.
            mask: True where there is something to read. From a memory of nothing, zeros are read.
            size: Height and width of the map whose positions, row by row, are the memory.

        Raises:
            ValueError: If the memory's features are not as many as constructed, or the size is not the memory's, or
                missing where places count.
        """
        fits(memory, self.holds, size)
        if size is None and self.needs_size:
            raise ValueError("size must be the (height, width) of the map that is the memory, got None")
        return Prepared(wide(self.keys(memory)), self.values(memory), mask, size)

    def keys(self, memory: Float[Tensor, "b l d"]) -> Tensor:
        """Return what queries are compared with, once for a memory."""
        return memory

    def values(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
        """Return what is read, once for a memory."""
        return memory

    def ask(self, query: Float[Tensor, "b r q"]) -> Tensor:
        """Return what keys are compared with."""
        return query

    def compare(self, asked: Tensor, keys: Tensor) -> Float[Tensor, "b r *heads l"]:
        """Return a score of each region for each query. What is given is in at least float32, outside of autocast."""
        raise NotImplementedError

    def scores(self, query: Float[Tensor, "b r q"], prepared: Prepared) -> Float[Tensor, "b r *heads l"]:
        """Return a score of each region for each query, in at least float32, under autocast too."""
        self.check(query)
        asked = self.ask(query)
        with uncast(query.device):
            return self.compare(wide(asked), prepared.keys)

    def check(self, query: Float[Tensor, "b r _"]) -> None:
        """Refuse a query that does not fit.

        Raises:
            ValueError: If its features are not as many as constructed.
        """
        if query.shape[2] != self.asks:
            raise ValueError(f"query must have {self.asks} features as constructed, got {query.shape[2]}")

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r l"], Any]:
        """Return how much each query reads from each region, and the state after it."""
        return spread(self.scores(query, prepared), prepared.mask).to(query.dtype), state

    def read(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None, *, weights: Float[Tensor, "b r l"]
    ) -> Float[Tensor, "b r e"]:
        """Return what each query reads."""
        return torch.bmm(weights.to(prepared.values.dtype), prepared.values).to(query.dtype)

    def forward(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r e"], Any]:
        """Return what each query reads, and the state after it."""
        weights, after = self.attend(query, prepared, state)
        return self.read(query, prepared, state, weights=weights), after


class OuterAttention(MemoryAttention):
    """Attention around another, which prepares the memory and keeps the state.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        attention: Attention inside, called with the features of query and memory.

    Raises:
        ValueError: If the attention inside does not mix regions, but picks.
    """

    def __init__(self, query: int, memory: int, attention: Callable[[int, int], MemoryAttention]):
        super().__init__(query, memory)
        self.attention = attention(query, memory)
        if self.attention.hard:
            raise ValueError(f"attention must mix regions, got {type(self.attention).__name__}, which picks")
        self.asks = self.attention.asks
        self.size, self.causal = self.attention.size, self.attention.causal

    @property
    def features(self) -> int:
        return self.attention.features

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.attention.stateful

    @property
    def needs_size(self) -> bool:  # type: ignore[override]
        return self.attention.needs_size

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        return self.attention.prepare(memory, mask, size)


Scoring = TypeVar("Scoring", bound=MemoryAttention)


def scoring(attention: Scoring, *, sizes: bool = False) -> Scoring:
    """Return attention that weighs regions by the softmax of their scores, and reads their sum.

    Args:
        attention: The attention.
        sizes: Whether it is to look at memories of several sizes.

    Raises:
        ValueError: If it does more than that, or looks at memories of one size only.
    """
    name = type(attention).__name__
    if type(attention).attend is not MemoryAttention.attend:
        raise ValueError(f"attention must weigh regions by the softmax of their scores, got {name}")
    if type(attention).read is not MemoryAttention.read:
        raise ValueError(f"attention must read the sum of the regions, as they are weighed, got {name}")
    if sizes and attention.size is not None:
        raise ValueError(f"attention must look at maps of any size, got {name} for {attention.size}")
    return attention


def silenced(read: Float[Tensor, "b r e"], prepared: Prepared) -> Float[Tensor, "b r e"]:
    """Return what is read, and zeros from a memory of nothing, whatever a query says of itself."""
    mask = prepared.mask
    return read if mask is None else read.masked_fill(~mask.any(1)[:, None, None], 0.0)


def fits(memory: Float[Tensor, "b l d"], features: int, size: tuple[int, int] | None = None) -> None:
    """Raise a ``ValueError`` if a memory has other features, or its map other positions."""
    if memory.shape[2] != features:
        raise ValueError(f"memory must have {features} features as constructed, got {memory.shape[2]}")
    if size is not None and size[0] * size[1] != memory.shape[1]:
        raise ValueError(f"size must have as many positions as the memory, {memory.shape[1]}, got {size}")


def spread(scores: Float[Tensor, "b *r l"], mask: Bool[Tensor, "#b ... l"] | None) -> Float[Tensor, "b *r l"]:
    """Spread a weight of one over the regions that are there, in at least float32; zeros where there are none.

    The mask is that of the memory, or has as many axes as the scores.

    Example:
        >>> spread(torch.zeros(2, 1, 2), torch.tensor([[True, False], [False, False]]))
        tensor([[[1., 0.]],
        <BLANKLINE>
                [[0., 0.]]])
    """
    if mask is None:
        return softmax(scores)
    if mask.ndim == 2:
        mask = mask.view(mask.shape[0], *[1] * (scores.ndim - 2), mask.shape[1])
    empty = ~mask.any(-1, keepdim=True)
    return softmax(scores.masked_fill(~(mask | empty), -torch.inf)).masked_fill(empty, 0.0)


def places(like: Float[Tensor, "*b l"], size: tuple[int, int] | None) -> Float[Tensor, "l axes"]:
    """Return where regions are: in a row, or their rows and columns on a map.

    Example:
        >>> places(torch.zeros(3), None).mT, places(torch.zeros(4), (2, 2)).mT
        (tensor([[0., 1., 2.]]), tensor([[0., 0., 1., 1.],
                [0., 1., 0., 1.]]))
    """
    sides = (like.shape[-1],) if size is None else size
    axes = (torch.arange(side, dtype=like.dtype, device=like.device) for side in sides)
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)
