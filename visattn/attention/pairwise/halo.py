"""Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens: Scaling Local Self-Attention (HaloNet, CVPR 2021)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.pairwise.positions import relative_logits
from visattn.attention.pairwise.sparse import Groups
from visattn.attention.pairwise.windowed import _WindowedSelfAttention


class HaloAttention(_WindowedSelfAttention):
    r"""Let every block of positions read from itself and a halo around it, in place of a convolution.

    .. math:: y_i = \sum_{j \in \Omega_i} \operatorname{softmax}_{j \in \Omega_i}
        \bigl((q_i^\top k_j + q_i^\top (r^h_{\Delta y} + r^w_{\Delta x})) / \sqrt d\bigr)\, v_j

    in each head of :math:`d` features, where :math:`\Omega_i` is the block of :math:`i` with its halo and the heads
    share the vectors :math:`r` of distances. No layer has a bias, and none follows the heads. Where blocks do not
    divide the map, the last ones are short: what only fills them up is never read.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels of the result; None: as many as ``channels``.
        stride: Positions of the map for one of the result, along each axis; their mean is taken.
        block: Rows and columns of a block.
        halo: Rows and columns around it on each side.
        heads: How many heads share the channels of the result.
        border: What the halo finds beyond the border: ``"zero"``, as in timm, keys and values of zero that take part
            in the softmax, by which the weights on the map sum to less than one there; ``"mask"``, nothing.
        scale_positions: Whether :math:`\sqrt d` divides the products with the vectors of distances as well. The
            default of timm does not.

    Raises:
        ValueError: If ``block`` is not positive, ``halo`` is negative, ``heads`` does not divide the channels of the
            result, ``stride`` is not positive or ``border`` is unknown.

    Example:
        >>> HaloAttention(64, stride=2)(torch.randn(2, 64, 16, 16)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2103.12731"

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        block: int = 8,
        halo: int = 3,
        heads: int = 8,
        border: Literal["zero", "mask"] = "zero",
        scale_positions: bool = True,
    ):
        if block < 1:
            raise ValueError(f"block must be positive, got {block}")
        if halo < 0:
            raise ValueError(f"halo must not be negative, got {halo}")
        super().__init__(channels, out_channels=out_channels, stride=stride, heads=heads, halo=halo, border=border)
        self.block = block
        width = self.query.out_features // heads
        self.scale, self.scale_positions = width**-0.5, scale_positions
        self.rows, self.columns = (nn.Parameter(torch.empty(2 * (block + 2 * halo) - 1, width)) for _ in range(2))
        for table in (self.rows, self.columns):
            nn.init.normal_(table, std=self.scale)

    def _block(self, length: int) -> int:
        return self.block

    def _reached(self, line: Groups) -> Bool[Tensor, "g 1 m"]:
        ring = self.halo if self.border == "zero" else 0
        return ((line.keys >= -ring) & (line.keys < line.back.shape[0] + ring))[:, None]

    def _parts(
        self, query: Float[Tensor, "g z y x d"]
    ) -> tuple[Float[Tensor, "g z y x k"], Float[Tensor, "g z y x k"]]:
        seen = query * self.scale if self.scale_positions else query
        return relative_logits(seen, self.rows.to(query.dtype), self.columns.to(query.dtype))
