"""Srinivas, Lin, Parmar, Shlens, Abbeel, Vaswani: Bottleneck Transformers for Visual Recognition (CVPR 2021)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.pairwise.core import read
from visattn.attention.pairwise.positions import RelativeSoftmax


class BottleneckSelfAttention(Attention):
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
    replaces = "convolution"
    queried = True

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
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if size is None:
            raise ValueError("size must be the (height, width) of the feature map, got None")
        if heads < 1 or out_channels % heads:
            raise ValueError(f"heads must divide out_channels={out_channels}, got {heads}")
        if stride < 1:
            raise ValueError(f"stride must be positive, got {stride}")
        self.size, self.stride, self.heads = size, stride, heads
        self.query = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.key = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.value = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.affinity = RelativeSoftmax(out_channels // heads, size, scale_positions=scale_positions)
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=channels**-0.5)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        weights = self.affinity.weights(self._heads(x, self.query), self._heads(x, self.key))
        return weights.unflatten(0, (-1, self.heads))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b o h2 w2"]:
        return self._write(x, read(self._heads(x, self.value), weights.flatten(0, 1)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        query, key, value = (self._heads(x, layer) for layer in (self.query, self.key, self.value))
        return self._write(x, self.affinity.read(query, key, value))

    def _heads(self, x: Float[Tensor, "b c h w"], project: nn.Module) -> Float[Tensor, "bh n d"]:
        if x.shape[2:] != self.size:
            raise ValueError(f"size must be {self.size} as constructed, got {tuple(x.shape[2:])}")
        return project(x).flatten(2).unflatten(1, (self.heads, -1)).flatten(0, 1).mT

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "bh n d"]) -> Float[Tensor, "b o h2 w2"]:
        y = y.mT.unflatten(0, (-1, self.heads)).flatten(1, 2).contiguous().unflatten(2, x.shape[2:]).to(x.dtype)
        return y if self.stride == 1 else F.avg_pool2d(y, self.stride, ceil_mode=True)
