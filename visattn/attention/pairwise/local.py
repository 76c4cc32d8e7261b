"""Hassani, Walton, Li, Li, Shi: Neighborhood Attention Transformer (CVPR 2023)."""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from visattn.attention.pairwise.sparse import (
    Groups,
    _SparseSelfAttention,
    even,
    pair_up,
    product,
    windows,
    within,
)


class LocalSelfAttention(_SparseSelfAttention):
    r"""Let every position read from the window around it.

    .. math:: y_i = W_o \sum_{j \in \Omega_i} \operatorname{softmax}_{j \in \Omega_i}(q_i^\top k_j / \sqrt d)\, v_j

    in each head of :math:`d` features. With ``border="clamp"``, the neighbourhood of the paper, a window that would
    cross the border is moved inside, so that every query has :math:`k^2` keys (on a map narrower than :math:`k`: its
    whole width). With ``border="mask"`` the window stays centred on its query and loses what lies outside. Differs
    from the paper: no bias for relative positions.

    Blocks of queries read the union of their windows, masked. So time and memory grow with the map, not its square.

    Args:
        channels: Channels of the feature map.
        window: Rows and columns :math:`k` of a window.
        border: What becomes of a window that crosses the border.
        heads: Heads, each of ``channels / heads`` features.

    Raises:
        ValueError: If ``window`` is not odd, ``border`` is unknown or ``heads`` does not divide ``channels``.

    Example:
        >>> LocalSelfAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2204.07143"

    def __init__(self, channels: int, *, window: int = 7, border: Literal["clamp", "mask"] = "clamp", heads: int = 4):
        super().__init__(channels, heads)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        if border not in ("clamp", "mask"):
            raise ValueError(f"border must be clamp or mask, got {border!r}")
        self.window, self.clamp = window, border == "clamp"

    def reach(self, height: int, width: int, device: torch.device | None = None) -> Bool[Tensor, "n n"]:
        lines = (torch.arange(length, device=device) for length in (height, width))
        rows, columns = (within(at[:, None], at, len(at), self.window, clamp=self.clamp) for at in lines)
        return pair_up(rows, columns)

    def _groups(self, height: int, width: int, device: torch.device) -> Groups:
        rows, columns = (
            windows(length, self._block(length), self.window, clamp=self.clamp, device=device)
            for length in (height, width)
        )
        return product(rows, columns)

    def _block(self, length: int) -> int:
        """One for a line of which several would read nearly all each: as measured, faster up to twice the window."""
        if not torch.compiler.is_compiling() and length <= 2 * self.window:
            return length
        return even(length, self.window + 1)
