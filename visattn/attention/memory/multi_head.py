"""Vaswani et al.: Attention Is All You Need (NeurIPS 2017), on a memory."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.core import scaled_dot_product, wide
from visattn.attention.memory.core import MemoryAttention, Prepared, spread


class MultiHeadAttention(MemoryAttention):
    r"""Let queries read from a memory in several ways at once.

    .. math:: z = W_o \Bigl[\sum_i a_i^n\, W_v^n v_i\Bigr]_n, \quad
        a^n = \operatorname{softmax}_i\bigl(q^\top W_q^{n\top} W_k^n v_i / \sqrt d\bigr)

    Each head :math:`n` has its own :math:`d = \text{width} / \text{heads}` features of query, key and value. Keys and
    values are made once for a memory, and kept in its dtype; where queries and memory are the same words, it is
    self-attention. With ``causal`` the last query reads the whole memory, the one before it all but the last, and so
    on: all words at once, or :meth:`extend` and ask word by word. Then the ``r`` queries are steps.

    With slots, learned keys :math:`\sqrt d\, M_k` and values :math:`\sqrt m\, M_v` of :math:`m` slots stand behind the
    memory, as in the Meshed-Memory Transformer (arXiv:1912.08226), and the weights have :math:`m` more regions.

    Args:
        query: Features of a query, and of what is read.
        memory: Features of the memory.
        heads: Into how many parts the width is split.
        width: Features of query, key and value of all heads together; None: as many as a query has.
        causal: Whether each query but the last leaves out what is for later ones.
        slots: Learned regions :math:`m` behind the memory.

    Raises:
        ValueError: If a number is less than 1, ``heads`` does not divide the width, or ``slots`` is negative.

    Example:
        >>> attention = MultiHeadAttention(16, 32, heads=2)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 16])
    """

    paper = "arXiv:1706.03762"

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        heads: int = 8,
        width: int | None = None,
        causal: bool = False,
        slots: int = 0,
    ):
        super().__init__(query, memory)
        width = query if width is None else width
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide width={width}, got {heads}")
        if slots < 0:
            raise ValueError(f"slots must be at least 0, got {slots}")
        self.heads, self.causal, self.slots = heads, causal, slots
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(query, width, bias=False)
        self.key = nn.Linear(memory, width, bias=False)
        self.value = nn.Linear(memory, width, bias=False)
        self.out = nn.Linear(width, query, bias=False)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
        if slots:
            self.slot_keys = nn.Parameter(torch.randn(slots, width) * self.scale**2)
            self.slot_values = nn.Parameter(torch.randn(slots, width) / slots)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, slots={self.slots}"

    @property
    def features(self) -> int:
        return self.asks

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        prepared = super().prepare(memory, mask, size)
        prepared = prepared._replace(keys=prepared.keys.to(prepared.values.dtype))
        if not self.slots:
            return prepared
        slots = self.slot_keys / self.scale, self.slot_values * self.slots**0.5
        keys, values = (
            torch.cat((each, slot.to(each.dtype).expand(each.shape[0], -1, -1)), 1)
            for each, slot in zip(prepared[:2], slots, strict=True)
        )
        return prepared._replace(keys=keys, values=values)

    def extend(
        self, prepared: Prepared, memory: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None = None
    ) -> Prepared:
        """Put more behind a memory that is prepared: the words since, whose keys and values alone are made.

        Args:
            prepared: What was prepared before.
            memory: What comes behind it.
            mask: True where there is something to read in what comes behind it.
        """
        further = super().prepare(memory, mask)
        end = prepared.values.shape[1] - self.slots
        keys, values = (
            torch.cat((before[:, :end], after.to(before.dtype), before[:, end:]), 1)
            for before, after in zip(prepared[:2], further[:2], strict=True)
        )
        if prepared.mask is not None or mask is not None:
            counts = (prepared.mask, end), (mask, memory.shape[1])
            mask = torch.cat(
                [memory.new_ones(len(memory), n, dtype=torch.bool) if m is None else m for m, n in counts], 1
            )
        return Prepared(keys, values, mask)

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
        return self.key(memory)

    def values(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
        return self.value(memory)

    def ask(self, query: Float[Tensor, "b r q"]) -> Float[Tensor, "b r e"]:
        return self.query(query)

    def compare(self, asked: Float[Tensor, "b r e"], keys: Float[Tensor, "b l e"]) -> Float[Tensor, "b r heads l"]:
        return (self._split(asked * self.scale) @ self._split(wide(keys)).mT).transpose(1, 2)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r heads l"], Any]:
        there = self._there(query.shape[1], prepared)
        weights = spread(self.scores(query, prepared), None if there is None else there[:, :, None])
        return weights.to(query.dtype), state

    def read(
        self,
        query: Float[Tensor, "b r q"],
        prepared: Prepared,
        state: Any = None,
        *,
        weights: Float[Tensor, "b r heads l"],
    ) -> Float[Tensor, "b r q"]:
        values = self._split(prepared.values)
        return self._write(query, weights.transpose(1, 2).to(values.dtype) @ values)

    def forward(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r q"], Any]:
        """Return what each query reads, and the state after it, without the weights where that is faster."""
        self.check(query)
        asked, keys, values = (self._split(each) for each in (self.ask(query).to(prepared.keys.dtype), *prepared[:2]))
        there = self._there(query.shape[1], prepared)
        if there is None:
            return self._write(query, scaled_dot_product(asked, keys, values)), state
        empty = ~there.any(2, keepdim=True)
        read = scaled_dot_product(asked, keys, values, mask=(there | empty)[:, None])
        return self._write(query, read.masked_fill(empty[:, None], 0.0)), state

    def _there(self, count: int, prepared: Prepared) -> Bool[Tensor, "b r l"] | None:
        """What each of so many queries can read, or all of them, of all memories, or each."""
        there = None if prepared.mask is None else prepared.mask[:, None]
        if self.causal and count > 1:
            regions = prepared.keys.shape[1] - self.slots
            before = prepared.keys.new_ones(1, count, regions, dtype=torch.bool).tril(regions - count)
            there = before if there is None else there & before
        if there is None or not self.slots:
            return there
        return torch.cat((there, there.any(2, keepdim=True).expand(-1, -1, self.slots)), 2)

    def _split(self, x: Float[Tensor, "b l e"]) -> Float[Tensor, "b heads l d"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _write(self, query: Float[Tensor, "b r q"], read: Float[Tensor, "b heads r d"]) -> Float[Tensor, "b r q"]:
        return self.out(read.transpose(1, 2).flatten(2)).to(query.dtype)
