"""Dai, Cai, Zhang, Xia, Zhang: Second-order Attention Network for Single Image Super-Resolution (CVPR 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale
from visattn.attention.core import uncast


class SecondOrderChannelAttention(Attention):
    r"""Weigh every channel by how it varies together with all channels.

    .. math::
        y = x \odot \sigma\bigl(W_2\, \mathrm{ReLU}(W_1 z + b_1) + b_2\bigr), \quad
        z = \mathrm{mean}_c(\Sigma^{1/2}), \quad
        \Sigma = \tfrac{1}{n} \textstyle\sum_i (x_i - \bar x)(x_i - \bar x)^\top

    The square root is that of Newton and Schulz. Its cost grows with the cube of the channels: the paper's networks
    have 64 of them at the end of a residual branch, and in a bottleneck it is put where that is narrow. The released
    code leaves out what is beyond the middle 1000 by 1000 positions.

    Args:
        channels: Channels of the feature map.
        reduction: Ratio by which the layer between is narrower than ``channels``.
        iterations: Steps towards the square root.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``, or ``iterations`` is below two.

    Example:
        >>> SecondOrderChannelAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "doi:10.1109/CVPR.2019.01132"
    place = "inner"
    neutral = 1.0

    def __init__(self, channels: int, *, reduction: int = 16, iterations: int = 5):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if iterations < 2:
            raise ValueError(f"iterations must be two or more, got {iterations}")
        self.iterations = iterations
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        channels = x.shape[1]
        with uncast(x.device):
            apart = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
            apart = apart - apart.mean(2, keepdim=True)
            covariance = torch.bmm(apart, apart.mT) / apart.shape[2]
            ones = covariance.new_full((channels, 1), 1 / channels).expand(x.shape[0], -1, -1)
            z = root(covariance, ones, self.iterations)[:, :, 0].to(x.dtype)
        return self.excite(self.squeeze(z).relu()).sigmoid()[:, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)


def root(matrix: Float[Tensor, "b n n"], vectors: Float[Tensor, "b n k"], iterations: int) -> Float[Tensor, "b n k"]:
    r"""Apply the square root of a positive matrix to vectors.

    With :math:`Y_0 = A / \mathrm{tr} A` and :math:`Z_0 = I`, each step multiplies both by :math:`(3I - ZY) / 2`, and
    :math:`Y\sqrt{\mathrm{tr} A}` nears the root. The last step is done on the vectors alone.
    """
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-12)  # a flat map has none
    y = matrix / trace
    z = step = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device).mul(1.5) - y / 2
    y = torch.bmm(y, step)
    for _ in range(iterations - 2):
        step = torch.bmm(z, y)
        y, z = 1.5 * y - torch.bmm(y, step) / 2, 1.5 * z - torch.bmm(step, z) / 2
    vectors = torch.bmm(y, vectors)
    return (1.5 * vectors - torch.bmm(y, torch.bmm(z, vectors)) / 2) * trace.sqrt()
