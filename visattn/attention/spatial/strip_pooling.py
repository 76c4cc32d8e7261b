"""Hou, Zhang, Cheng, Feng: Strip Pooling: Rethinking Spatial Pooling for Scene Parsing (CVPR 2020)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention


class StripPooling(Attention):
    r"""Weigh every channel at every position by its whole row and its whole column.

    .. math:: y = x \odot \sigma\bigl(W\, \mathrm{ReLU}(r_i + s_j)\bigr), \quad
        r = \mathrm{BN}(\mathrm{conv}_{3 \times 1}(\mathrm{mean}_w(x))), \;
        s = \mathrm{BN}(\mathrm{conv}_{1 \times 3}(\mathrm{mean}_h(x)))

    The paper's strip pooling module. Its batch norms and its ReLU are those of the released code.

    Args:
        channels: Channels of the feature map.

    Raises:
        ValueError: In training, if the map is one image of one row or of one column: the strips are normalised alone.

    Example:
        >>> StripPooling(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2003.13328"
    place = ("stages[0].inner[-1]", "stages[1].inner[-1]", "stages[2].inner[-1]", "stages[-1].inner")
    neutral = 1.0

    def __init__(self, channels: int):
        super().__init__()
        self.rows = convolution(channels, channels, (3, 1))
        self.columns = convolution(channels, channels, (1, 3))
        self.mix = nn.Conv2d(channels, channels, 1)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        rows, columns = self.rows(x.mean(3, keepdim=True)), self.columns(x.mean(2, keepdim=True))
        return self.mix((rows + columns).relu_()).sigmoid_()

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x * weights.to(x.dtype)


class MixedPooling(Attention):
    r"""Add to every position what pools of many shapes say around it: two coarse grids, its row and its column.

    .. math:: y = \mathrm{ReLU}(x + M), \quad
        M = W [\mathrm{conv}(\mathrm{ReLU}(\textstyle\sum_g \mathrm{pool}_g(u)));\,
        \mathrm{conv}(\mathrm{ReLU}(r_i + s_j))]

    The paper's mixed pooling module, for the head of a network. :math:`u` is :math:`x` at a quarter of its channels;
    :math:`\mathrm{pool}_g` averages it to a grid, convolves and interpolates back, and leaves it as it is for one
    :math:`g`; :math:`r` and :math:`s` are as in :class:`StripPooling`, from another quarter. All convolutions are
    normalised. The weights are :math:`M`, of either sign. The released code interpolates with aligned corners.

    Args:
        channels: Channels of the feature map.
        sizes: Rows, and as many columns, of the coarse grids.

    Raises:
        ValueError: If there are fewer than 4 ``channels``, or one of the ``sizes`` is not positive; in training, if the
            map is one image of one row or of one column: the strips are normalised alone.

    Example:
        >>> MixedPooling(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2003.13328"
    place = "head"

    def __init__(self, channels: int, *, sizes: tuple[int, ...] = (20, 12)):
        super().__init__()
        if channels < 4:
            raise ValueError(f"channels must be at least 4, got {channels}")
        if min(sizes, default=1) < 1:
            raise ValueError(f"sizes must be positive, got {sizes}")
        self.sizes = tuple(sizes)
        width = channels // 4
        self.short = nn.Sequential(convolution(channels, width, (1, 1)), nn.ReLU())
        self.long = nn.Sequential(convolution(channels, width, (1, 1)), nn.ReLU())
        self.local = convolution(width, width, (3, 3))
        self.grids = nn.ModuleList(convolution(width, width, (3, 3)) for _ in self.sizes)
        self.rows = convolution(width, width, (3, 1))
        self.columns = convolution(width, width, (1, 3))
        self.join_short = nn.Sequential(nn.ReLU(), convolution(width, width, (3, 3)), nn.ReLU())
        self.join_long = nn.Sequential(nn.ReLU(), convolution(width, width, (3, 3)), nn.ReLU())
        self.out = convolution(2 * width, channels, (1, 1))

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        short, long, size = self.short(x), self.long(x), x.shape[2:]
        near = self.local(short)
        for side, grid in zip(self.sizes, self.grids, strict=True):
            coarse = grid(F.adaptive_avg_pool2d(short, side))
            near = near + F.interpolate(coarse, size, mode="bilinear", align_corners=False)
        far = self.rows(long.mean(3, keepdim=True)) + self.columns(long.mean(2, keepdim=True))
        return self.out(torch.cat((self.join_short(near), self.join_long(far)), 1))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (x + weights.to(x.dtype)).relu_()


def convolution(inputs: int, outputs: int, kernel: tuple[int, int]) -> nn.Sequential:
    """A convolution that keeps the size, and a batch norm."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False), nn.BatchNorm2d(outputs))
