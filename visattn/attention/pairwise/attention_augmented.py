"""Bello, Zoph, Vaswani, Shlens, Le: Attention Augmented Convolutional Networks (ICCV 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.pairwise.relative import _RelativeSelfAttention


class AttentionAugmentedConvolution(_RelativeSelfAttention):
    r"""A convolution of which some channels come from attention between all positions instead.

    .. math::
        y = \bigl[K * x;\; W_o\, [o^a]_a\bigr], \quad o_i^a = \sum_j \operatorname{softmax}_j\bigl((q_i^{a\top} k_j^a
        + q_i^{a\top} (r^h_{\Delta y} + r^w_{\Delta x})) / \sqrt{d}\bigr)\, v_j^a

    The heads :math:`a` share the vectors :math:`r` of the distances between rows and between columns. No layer has a
    bias. With a stride, what attention gives is averaged, and the convolution has the stride itself.

    Args:
        channels: Channels of the feature map.
        size: Height and width of the feature map.
        out_channels: Channels :math:`c` of the result; None: as many as ``channels``.
        stride: Positions of the map for one of the result, along each axis.
        kernel_size: Rows and columns of the convolution.
        heads: How many heads there are.
        key_ratio: Share :math:`\kappa` of the ``out_channels`` for queries and for keys of all heads, rounded down to
            whole features of a head, but no fewer than 20 for each.
        value_ratio: Share :math:`\upsilon` of the ``out_channels`` that comes from attention, rounded down likewise,
            but no fewer than one for each head.

    Raises:
        ValueError: If ``size`` is missing or a map is of another, ``kernel_size`` is even, ``heads`` or ``stride`` is
            not positive, or ``value_ratio`` leaves no channel to one of the two.

    Example:
        >>> AttentionAugmentedConvolution(64, size=(8, 8))(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1904.09925"
    place = "stages[1:].convolutions"

    def __init__(
        self,
        channels: int,
        *,
        size: tuple[int, int] | None = None,
        out_channels: int | None = None,
        stride: int = 1,
        kernel_size: int = 3,
        heads: int = 8,
        key_ratio: float = 0.2,
        value_ratio: float = 0.1,
    ):
        out_channels = channels if out_channels is None else out_channels
        if heads < 1:
            raise ValueError(f"heads must be positive, got {heads}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        width = max(int(key_ratio * out_channels) // heads, 20)
        values = heads * max(int(value_ratio * out_channels) // heads, 1)
        if not 0 < value_ratio < 1 or values >= out_channels:
            raise ValueError(
                f"value_ratio must leave some of out_channels={out_channels} to {heads} heads and some to the "
                f"convolution, got {value_ratio}"
            )
        super().__init__(channels, size=size, stride=stride, heads=heads, width=width, values=values)
        self.convolution = nn.Conv2d(
            channels, out_channels - values, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.out = nn.Conv2d(values, values, 1, bias=False)

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "bh n d"]) -> Float[Tensor, "b o h2 w2"]:
        return torch.cat((self.convolution(x), self.out(super()._write(x, y))), 1).to(x.dtype)
