"""Ramachandran, Parmar, Vaswani, Bello, Levskaya, Shlens: Stand-Alone Self-Attention in Vision Models (2019)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.pairwise.sparse import Groups, even
from visattn.attention.pairwise.windowed import _WindowedSelfAttention


class StandAloneSelfAttention(_WindowedSelfAttention):
    r"""Let every position read from the window around it, by what is there and how far off, in place of a convolution.

    .. math:: y_{ij} = \sum_{ab \in \Omega_{ij}} \operatorname{softmax}_{ab}
        \bigl(q_{ij}^\top k_{ab} + q_{ij}^\top r_{a-i,b-j}\bigr)\, v_{ab}

    in each head of :math:`d` features, where the first half of :math:`r` depends on the row and the second on the
    column. Nothing is divided by a :math:`\sqrt d`, no layer has a bias, and none follows the heads.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels of the result; None: as many as ``channels``.
        stride: Positions of the map for one of the result, along each axis; their mean is taken.
        window: Rows and columns of the window :math:`\Omega`.
        heads: How many heads share the channels of the result.
        border: What lies beyond the border: ``"zero"``, keys and values of zero that take part in the softmax, by
            which the weights on the map sum to less than one there; ``"mask"``, nothing.

    Raises:
        ValueError: If ``window`` is not odd, ``heads`` does not divide the channels of the result into even parts,
            ``stride`` is not positive or ``border`` is unknown.

    Example:
        >>> StandAloneSelfAttention(64, stride=2)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 4, 4])
    """

    paper = "arXiv:1906.05909"

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        window: int = 7,
        heads: int = 8,
        border: Literal["zero", "mask"] = "zero",
    ):
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        super().__init__(
            channels,
            out_channels=out_channels,
            stride=stride,
            heads=heads,
            halo=window // 2,
            border=border,
        )
        half, odd = divmod(self.query.out_features // heads, 2)
        if odd:
            raise ValueError(f"heads must divide out_channels={self.query.out_features} into even parts, got {heads}")
        self.window = window
        self.rows, self.columns = (nn.Parameter(torch.randn(heads, window, half)) for _ in range(2))

    def _block(self, length: int) -> int:
        return even(length, self.window + 1)

    def _reached(self, line: Groups) -> Bool[Tensor, "g t m"]:
        reached = (line.keys[:, None] - line.queries[:, :, None]).abs() <= self.halo
        if self.border == "mask":
            reached = reached & ((line.keys >= 0) & (line.keys < line.back.shape[0]))[:, None]
        return reached

    def _parts(
        self, query: Float[Tensor, "g z y x d"]
    ) -> tuple[Float[Tensor, "g z y x kh"], Float[Tensor, "g z y x kw"]]:
        upper, lower = query.unflatten(1, (-1, self.heads)).chunk(2, -1)
        down = torch.einsum("gbayxd,aydk->gbayxk", upper, self._shifted(self.rows, query.shape[2]))
        across = torch.einsum("gbayxd,axdk->gbayxk", lower, self._shifted(self.columns, query.shape[3]))
        return down.flatten(1, 2), across.flatten(1, 2)

    def _shifted(self, table: Float[Tensor, "heads k d"], block: int) -> Float[Tensor, "heads t d m"]:
        """The vector of each query of a block for each key of its window; zeros where that is not reached."""
        room = block - 1
        return F.pad(table, (0, 0, room, room)).unfold(1, room + self.window, 1).flip(1)
