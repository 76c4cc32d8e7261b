"""Srinivas, Lin, Parmar, Shlens, Abbeel, Vaswani: Bottleneck Transformers for Visual Recognition (CVPR 2021)."""

from torch import nn

from visattn.attention.pairwise.relative import _RelativeSelfAttention


class BottleneckSelfAttention(_RelativeSelfAttention):
    r"""Multi-head attention between all positions and their distances, in place of the 3×3 of a bottleneck.

    .. math:: y_i = \Bigl[\sum_j \operatorname{softmax}_j\bigl((q_i^{a\top} k_j^a
        + q_i^{a\top} (r^h_{\Delta y} + r^w_{\Delta x})) / \sqrt d\bigr)\, v_j^a\Bigr]_a

    The heads :math:`a` share the vectors :math:`r` of the distances between rows and between columns. No layer has a
    bias and none follows the heads: the 1×1 of the bottleneck does.

    Args:
        channels: Channels of the feature map.
        size: Height and width of the feature map.
        out_channels: Channels :math:`c` of the result; None: as many as ``channels``.
        stride: Positions of the map for one of the result, along each axis; their mean is taken.
        heads: How many heads share the channels, :math:`d = c / \text{heads}` each.
        scale_positions: Whether :math:`\sqrt d` divides the products with the vectors of distances as well, as in the
            released code. The default of timm does not.

    Raises:
        ValueError: If ``size`` is missing or a map is of another, ``heads`` does not divide the channels of the result,
            or ``stride`` is not positive.

    Example:
        >>> BottleneckSelfAttention(64, size=(8, 8))(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2101.11605"
    place = "stages[-1].convolutions"

    def __init__(
        self,
        channels: int,
        *,
        size: tuple[int, int] | None = None,
        out_channels: int | None = None,
        stride: int = 1,
        heads: int = 4,
        scale_positions: bool = True,
    ):
        out_channels = channels if out_channels is None else out_channels
        if heads < 1 or out_channels % heads:
            raise ValueError(f"heads must divide out_channels={out_channels}, got {heads}")
        super().__init__(
            channels,
            size=size,
            stride=stride,
            heads=heads,
            width=out_channels // heads,
            values=out_channels,
            scale_positions=scale_positions,
        )
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=channels**-0.5)
