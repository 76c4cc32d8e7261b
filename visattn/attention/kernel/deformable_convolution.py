"""Dai, Qi, Xiong, Li, Zhang, Hu, Wei: Deformable Convolutional Networks (ICCV 2017); Zhu et al.: v2 (CVPR 2019)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from visattn.attention.base import Attention
from visattn.attention.kernel.core import check_groups, check_kernel_size


class Sampling(NamedTuple):
    """Where each tap of a kernel of :class:`DeformableConvolution` looks, and how much of it counts."""

    offset: Float[Tensor, "b g k k 2 h2 w2"]
    """Pixels down and to the right of where the tap of a plain convolution looks."""
    mask: Float[Tensor, "b g k k h2 w2"]
    """One, unless the convolution is modulated."""


class DeformableConvolution(Attention):
    r"""Convolve with taps that every position moves to where it wants to look.

    .. math:: y_i = \sum_j m_{ij}\, W_j\, x(i + j + o_{ij}), \quad o = V * x, \quad m = \sigma(U * x)

    Between the pixels, :math:`x` is interpolated linearly; beyond them it is zero. The masks :math:`m` came with the
    second version (arXiv:1811.11168), without them the module is the first. :math:`V` and :math:`U` start at zero: a
    fresh module is the plain convolution, one half of it with masks. Both papers train them at a tenth of the
    learning rate. Positions are reckoned in at least float32.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels to return; None: ``channels``.
        stride: Stride of the convolution.
        groups: Groups of the convolution.
        kernel_size: Height and width of the kernel in pixels.
        dilation: Distance in pixels between taps that have not moved.
        offset_groups: Groups of channels whose taps move apart from those of the others.
        modulated: Whether every tap also has a mask.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive, ``groups`` does not divide both numbers of channels,
            ``offset_groups`` does not divide ``channels``, or ``dilation`` is not positive.

    Example:
        >>> DeformableConvolution(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1703.06211"
    place = "convolutions"
    replaces = "convolution"
    locations = True

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        groups: int = 1,
        kernel_size: int = 3,
        dilation: int = 1,
        offset_groups: int = 1,
        modulated: bool = False,
    ):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        check_kernel_size(kernel_size)
        check_groups(groups, channels, out_channels)
        if offset_groups < 1 or channels % offset_groups:
            raise ValueError(f"offset_groups must divide channels={channels}, got {offset_groups}")
        if dilation < 1:
            raise ValueError(f"dilation must be positive, got {dilation}")
        self.offset_groups, self.modulated = offset_groups, modulated
        taps, padding = offset_groups * kernel_size**2, dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.move = nn.Conv2d(channels, (3 if modulated else 2) * taps, kernel_size, stride, padding, dilation)
        for parameter in self.move.parameters():
            nn.init.zeros_(parameter)

    def adopt(self, convolution: nn.Conv2d) -> bool:
        """Take over the kernel of the convolution this stands in for; False if there is no such kernel here."""
        if convolution.weight.shape != self.conv.weight.shape or convolution.bias is not None:
            return False
        self.conv.load_state_dict(convolution.state_dict())
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Sampling:
        moved, shape = self.move(x), (self.offset_groups, *self.conv.kernel_size)
        taps = self.offset_groups * self.conv.kernel_size[0] ** 2
        offset = moved[:, : 2 * taps].unflatten(1, (*shape, 2))
        if self.modulated:
            return Sampling(offset, moved[:, 2 * taps :].sigmoid().unflatten(1, shape))
        return Sampling(offset, offset.new_ones(()).expand_as(offset.select(4, 0)))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Sampling) -> Float[Tensor, "b d h2 w2"]:
        return self._sample(x, weights.offset, weights.mask)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        offset, mask = self.attend(x)
        return self._sample(x, offset, mask if self.modulated else None)

    def _sample(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Float[Tensor, "b d h2 w2"]:
        wide, conv = torch.promote_types(x.dtype, torch.float32), self.conv
        y = deform_conv2d(
            x.to(wide),
            offset.flatten(1, 4).to(wide),
            conv.weight.to(wide),
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            None if mask is None else mask.flatten(1, 3).to(wide),
        )
        return y.to(x.dtype)
