"""Huang, Wang, Chen, Wei: Attention on Attention for Image Captioning (ICCV 2019)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.memory.core import MemoryAttention, OuterAttention, Prepared, silenced
from visattn.attention.memory.multi_head import MultiHeadAttention


class AttentionOnAttention(OuterAttention):
    r"""Ask whether what was read answers the query: a second look, at query and answer, gates them.

    .. math:: y = (W_i [c; q] + b_i) \odot \sigma(W_g [c; q] + b_g)

    where :math:`c` is what the attention inside reads. Around :class:`~visattn.attention.MultiHeadAttention` it takes
    the place of the output projection, as in the paper, and :math:`c` are all heads side by side.

    Our :math:`c` is their :math:`\hat v`; the layer norm that the released code has on queries is left to the decoder.

    Args:
        query: Features of a query, and of what is read.
        memory: Features of the memory.
        attention: Attention inside, called with the features of query and memory.
        dropout: Probability to drop a number of :math:`[c; q]`.

    Raises:
        ValueError: If a number is less than 1, ``dropout`` is no probability, or the attention inside picks.

    Example:
        >>> attention = AttentionOnAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 16])
    """

    paper = "arXiv:1908.06954"

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = MultiHeadAttention,
        dropout: float = 0.3,
    ):
        super().__init__(query, memory, attention)
        read = self.attention.features
        if isinstance(self.attention, MultiHeadAttention):
            read = self.attention.value.out_features
            self.attention.out = nn.Identity()  # type: ignore[assignment]
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Linear(read + self.asks, 2 * query)

    @property
    def features(self) -> int:
        return self.gate.out_features // 2

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r *heads l"], Any]:
        return self.attention.attend(query, prepared, state)

    def read(
        self,
        query: Float[Tensor, "b r q"],
        prepared: Prepared,
        state: Any = None,
        *,
        weights: Float[Tensor, "b r *heads l"],
    ) -> Float[Tensor, "b r e"]:
        return self._answer(query, prepared, self.attention.read(query, prepared, state, weights=weights))

    def forward(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r e"], Any]:
        found, after = self.attention(query, prepared, state)
        return self._answer(query, prepared, found), after

    def _answer(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, found: Float[Tensor, "b r d"]
    ) -> Float[Tensor, "b r e"]:
        gated = F.glu(self.gate(self.dropout(torch.cat((found, query), 2))), 2)
        return silenced(gated.to(query.dtype), prepared)
