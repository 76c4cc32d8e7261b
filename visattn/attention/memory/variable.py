"""Ling et al.: Not All Contexts Are Created Equal: Better Word Representations with Variable Attention (EMNLP 2015)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import uncast, wide
from visattn.attention.memory.core import MemoryAttention, Prepared, places


class VariableAttention(MemoryAttention):
    r"""Weigh regions by their kind and by where they lie around the middle, whoever asks.

    .. math:: z = \sum_i a_i v_i, \quad a = \operatorname{softmax}_i(K_{c_i, o_i} + s_{o_i}), \quad
        c_i = \operatorname{argmax}_c (W v_i)_c

    where :math:`o_i` is how far region :math:`i` lies from the middle, at most a radius along every axis. Nothing is
    asked: all queries read the same, which is weighed once for a memory. Fresh, it reads the mean.

    Differs from the paper: the middle is that of the memory, where the paper has the word to predict; and a word is of
    a kind by itself, where a region becomes of one of some by :math:`W`, which learns as if the choice had been a
    softmax. Our :math:`v, K, s` are their :math:`w, K, s`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        kinds: How many kinds of regions there are.
        radius: Regions from the middle up to which places differ.
        axes: 1 for words; 2 for a map, which is to have a size.

    Raises:
        ValueError: If a number is less than 1, or ``axes`` is unknown.

    Example:
        >>> attention = VariableAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "doi:10.18653/v1/D15-1161"
    queried = False

    def __init__(self, query: int, memory: int, *, kinds: int = 64, radius: int = 5, axes: Literal[1, 2] = 2):
        super().__init__(query, memory)
        for name, number in {"kinds": kinds, "radius": radius}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if axes not in (1, 2):
            raise ValueError(f"axes must be 1 or 2, got {axes}")
        self.radius, self.axes = radius, axes
        self.kind = nn.Linear(memory, kinds, bias=False)
        offsets = (2 * radius + 1) ** axes
        self.table = nn.Parameter(torch.zeros(kinds, offsets))
        self.shift = nn.Parameter(torch.zeros(offsets))

    @property
    def needs_size(self) -> bool:  # type: ignore[override]
        return self.axes == 2

    def extra_repr(self) -> str:
        return f"radius={self.radius}, axes={self.axes}"

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        prepared = super().prepare(memory, mask, size)
        offsets = self._offsets(memory, mask, size)
        with uncast(memory.device):
            likely = F.linear(wide(memory), wide(self.kind.weight)).softmax(2)
        kinds = F.one_hot(likely.argmax(2), likely.shape[2]).to(likely.dtype)
        if self.training:
            kinds = kinds + (likely - likely.detach())
        scores = (kinds * wide(self.table).mT[offsets]).sum(2) + wide(self.shift)[offsets]
        return prepared._replace(keys=scores)

    def compare(self, asked: Float[Tensor, "b r q"], keys: Float[Tensor, "b l"]) -> Float[Tensor, "b r l"]:
        return keys[:, None].expand(-1, asked.shape[1], -1)

    def _offsets(
        self, memory: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None, size: tuple[int, int] | None
    ) -> Int[Tensor, "#b l"]:
        """Where regions lie around the middle, numbered."""
        where = places(wide(memory[:1, :, 0]), size if self.axes == 2 else None)[None].long()
        middle = where.new_tensor([side // 2 for side in (memory.shape[1:2] if self.axes == 1 else size or ())])
        if self.axes == 1 and mask is not None:
            middle = (mask.sum(1) // 2)[:, None, None]
        away = (where - middle).clamp(-self.radius, self.radius) + self.radius
        return away[..., 0] if self.axes == 1 else away[..., 0] * (2 * self.radius + 1) + away[..., 1]
