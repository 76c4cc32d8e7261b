"""Zhang, Zu, Lu, Zou, Meng: EPSANet: An Efficient Pyramid Squeeze Attention Block (ACCV 2022)."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax


class PyramidSqueezeAttention(Attention):
    r"""Convolve by kernels of several widths, and let those compete for every channel.

    .. math:: y = [a_1 \odot f_1; \dots; a_n \odot f_n], \quad f_i = \mathrm{conv}_{k_i}(x), \quad
        a = \operatorname{softmax}_i\bigl(\sigma(W_2\, \mathrm{ReLU}(W_1\, \mathrm{mean}_{hw}(f_i) + b_1) + b_2)\bigr)

    Every branch makes an equal share of the channels; :math:`W_1` and :math:`W_2` are the same for all. Channel
    :math:`j` of one branch competes with channel :math:`j` of the others.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels of the result; None: ``channels``.
        stride: Stride of the convolutions.
        kernel_sizes: Widths :math:`k_i` of the kernels.
        cardinalities: Groups of each convolution; where they do not divide the channels of the map and of a branch,
            their greatest common divisor with those.
        reduction: Ratio by which the layer between :math:`W_1` and :math:`W_2` is narrower than a branch.
        order: Whether the branches follow each other as in the paper, or from the last to the first as they do in the
            released code.

    Raises:
        ValueError: If ``kernel_sizes`` are not odd, ``cardinalities`` are not as many or not positive,
            ``out_channels`` is not a multiple of their number, ``reduction`` does not lie between 1 and the channels
            of a branch, or ``order`` is unknown.

    Example:
        >>> PyramidSqueezeAttention(64, stride=2)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 4, 4])
    """

    paper = "arXiv:2105.14447"
    place = "convolutions"
    replaces = "convolution"

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        kernel_sizes: tuple[int, ...] = (3, 5, 7, 9),
        cardinalities: tuple[int, ...] = (1, 4, 8, 16),
        reduction: int = 16,
        order: Literal["paper", "released"] = "paper",
    ):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        count = len(kernel_sizes)
        if not count or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd and positive, got {kernel_sizes}")
        if out_channels % count:
            raise ValueError(f"out_channels must be a multiple of the {count} branches, got {out_channels}")
        width = out_channels // count
        if len(cardinalities) != count or min(cardinalities) < 1:
            raise ValueError(f"cardinalities must be {count} positive numbers, got {cardinalities}")
        if not 1 <= reduction <= width:
            raise ValueError(f"reduction must lie between 1 and the {width} channels of a branch, got {reduction}")
        if order not in ("paper", "released"):
            raise ValueError(f"order must be 'paper' or 'released', got {order!r}")
        self.order = order
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, width, size, stride, size // 2, groups=math.gcd(groups, channels, width), bias=False)
            for size, groups in zip(kernel_sizes, cardinalities, strict=True)
        )
        self.squeeze = nn.Linear(width, width // reduction)
        self.excite = nn.Linear(width // reduction, width)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k d 1 1"]:
        return self._weigh(self._convolve(x))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k d 1 1"]) -> Float[Tensor, "b e h2 w2"]:
        return self._write(self._convolve(x), weights).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        maps = self._convolve(x)
        return self._write(maps, self._weigh(maps)).to(x.dtype)

    def _convolve(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d h2 w2"]]:
        return [branch(x) for branch in self.branches]

    def _weigh(self, maps: list[Float[Tensor, "b d h2 w2"]]) -> Float[Tensor, "b k d 1 1"]:
        means = torch.stack([each.mean((2, 3)) for each in maps], 1)
        return softmax(self.excite(self.squeeze(means).relu()).sigmoid(), 1)[..., None, None].to(maps[0].dtype)

    def _write(
        self, maps: list[Float[Tensor, "b d h2 w2"]], weights: Float[Tensor, "b k d 1 1"]
    ) -> Float[Tensor, "b e h2 w2"]:
        if self.order == "released":
            maps, weights = maps[::-1], weights.flip(1)
        return torch.cat(maps, 1) * weights.flatten(1, 2).to(maps[0].dtype)
