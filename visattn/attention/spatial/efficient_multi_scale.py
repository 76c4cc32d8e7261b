"""Ouyang, He, Zhang, Luo, Guo, Zhan, Huang: Efficient Multi-Scale Attention Module with Cross-Spatial Learning (ICASSP
2023)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import softmax
from visattn.attention.spatial.coordinate import strips, weigh


class EfficientMultiScaleAttention(Attention):
    r"""Weigh every position of each group of channels by two views of it, one of strips and one of 3×3 windows.

    .. math::
        y = x \odot \sigma\bigl(\operatorname{softmax}_c(\mathrm{mean}_{hw}(u))^\top v +
        \operatorname{softmax}_c(\mathrm{mean}_{hw}(v))^\top u\bigr), \quad
        u = \mathrm{IN}\bigl(x \odot \sigma(W\, \mathrm{mean}_w(x) + b) \odot \sigma(W\, \mathrm{mean}_h(x) + b)\bigr),
        \quad v = \mathrm{conv}_{3 \times 3}(x)

    within each group; all groups share their parameters. Two things follow from the equation and save most of the work,
    with the same result. The mean of what an instance norm returns is its bias, so the first softmax is the same for
    all images, and one filter does for :math:`v`. The mean of a convolution follows from the sums of the map and of its
    borders, so no other filter is needed for the second. Multiply-adds per pixel and group channel are 10 where the
    equation read word by word takes :math:`9 c + 2`.

    Args:
        channels: Channels of the feature map.
        groups: Groups of channels, 8 in many ports; None: the 32 of the released code, or as many of them as divide
            ``channels``.

    Raises:
        ValueError: If ``groups`` does not divide ``channels``.

    Example:
        >>> EfficientMultiScaleAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2305.13563"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int, *, groups: int | None = None):
        super().__init__()
        groups = math.gcd(32, channels) if groups is None else groups
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must divide channels={channels}, got {groups}")
        self.groups = groups
        width = channels // groups
        self.strips = nn.Conv1d(width, width, 1)
        self.norm = nn.GroupNorm(width, width)
        self.windows = nn.Conv2d(width, width, 3, padding=1)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        x = x.unflatten(1, (self.groups, -1))
        batch, x = x.shape[:2], x.flatten(0, 1)
        rows, columns, x = strips(x)
        height, width = self.strips(torch.cat([rows, columns], 2)).sigmoid().split(x.shape[2:], 2)
        weighed = weigh(x, height[..., None], width[:, :, None])
        means, bias = self._mean_of_windows(x, columns), self.norm.bias
        of_strips, of_windows = softmax(means).to(means.dtype), softmax(bias).to(bias.dtype)
        from_strips = torch.bmm(of_strips[:, None], self.norm(weighed).flatten(2))
        kernel, bias = (torch.tensordot(of_windows, each, 1)[None] for each in self.windows.parameters())
        from_windows = F.conv2d(x, kernel, bias, padding=1)
        return (from_strips.view_as(from_windows) + from_windows).sigmoid().view(*batch, *x.shape[2:])

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        return (x.unflatten(1, (self.groups, -1)) * weights[:, :, None].to(x.dtype)).flatten(1, 2)

    def _mean_of_windows(self, x: Float[Tensor, "b c h w"], columns: Float[Tensor, "b c w"]) -> Float[Tensor, "b c"]:
        """The mean of ``self.windows(x)``: each tap sees all of the map but a row or a column at its far end."""
        h, w = x.shape[2:]
        sums = torch.stack([columns - x[:, :, -1] / h, columns, columns - x[:, :, 0] / h], 2)
        mean = sums.mean(3)
        sums = torch.stack([mean - sums[..., -1] / w, mean, mean - sums[..., 0] / w], 3)
        return F.linear(sums.flatten(1), self.windows.weight.flatten(1), self.windows.bias)
