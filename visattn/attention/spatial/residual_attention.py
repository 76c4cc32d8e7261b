"""Wang, Jiang, Qian, Yang, Li, Zhang, Wang, Tang: Residual Attention Network for Image Classification (CVPR 2017)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention


class ResidualAttention(Attention):
    r"""Stress, at every channel and position of a trunk, what an hourglass beside it finds.

    .. math:: y = P_2\bigl(T(u) \odot (1 + M(u))\bigr), \quad u = P_1(x)

    All are made of pre-activation bottleneck units: one before (:math:`P_1`), one after, two in the trunk :math:`T`.
    The hourglass pools the map ``depth`` times by 2 with one unit each, interpolates it back with one unit each, and
    has one more on every skip between its two sides; two :math:`1 \times 1` convolutions and a sigmoid make the mask
    :math:`M`. In the released networks a hyperbolic tangent stands for the sigmoid, and corners are aligned.

    Args:
        channels: Channels of the feature map.
        depth: Times the hourglass halves the map, rounding up. The paper's three stages, of 56, 28 and 14 pixels, have
            3, 2 and 1, so that each ends at 7.
        reduction: Ratio by which the :math:`3 \times 3` convolution of a unit is narrower than ``channels``.
        activation: What bounds the mask: ``"sigmoid"`` as in the paper, ``"tanh"`` as in the released networks.

    Raises:
        ValueError: If ``depth`` is not positive, ``reduction`` does not lie between 1 and ``channels``, or
            ``activation`` is neither of the two; in training, if one position is left of the batch.

    Example:
        >>> ResidualAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1704.06904"
    place = "stages[:3]"

    def __init__(
        self,
        channels: int,
        *,
        depth: int = 2,
        reduction: int = 4,
        activation: Literal["sigmoid", "tanh"] = "sigmoid",
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if activation not in ("sigmoid", "tanh"):
            raise ValueError(f"activation must be 'sigmoid' or 'tanh', got {activation!r}")
        self.activation = activation
        width = channels // reduction
        self.before, self.after = Unit(channels, width), Unit(channels, width)
        self.trunk = nn.Sequential(Unit(channels, width), Unit(channels, width))
        self.down = nn.ModuleList(Unit(channels, width) for _ in range(depth))
        self.skip = nn.ModuleList(Unit(channels, width) for _ in range(depth - 1))
        self.up = nn.ModuleList(Unit(channels, width) for _ in range(depth))
        self.mask = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
        )

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self._look(self.before(x))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self._write(self.before(x), weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        entered = self.before(x)
        return self._write(entered, self._look(entered))

    def _look(self, entered: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        logits = self.mask(self._hourglass(entered, 0))
        return logits.sigmoid() if self.activation == "sigmoid" else logits.tanh()

    def _hourglass(self, x: Float[Tensor, "b c h w"], level: int) -> Float[Tensor, "b c h w"]:
        y = self.down[level](F.max_pool2d(x, 3, 2, 1))
        if level + 1 < len(self.down):
            y = self.skip[level](y) + self._hourglass(y, level + 1)
        return F.interpolate(self.up[level](y), x.shape[2:], mode="bilinear", align_corners=False)

    def _write(self, entered: Float[Tensor, "b c h w"], mask: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        trunk = self.trunk(entered)
        return self.after(torch.addcmul(trunk, trunk, mask.to(trunk.dtype)))


class Unit(nn.Sequential):
    """A bottleneck whose norms and ReLUs come before its convolutions, and the sum around it."""

    def __init__(self, channels: int, width: int):
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1, bias=False),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + super().forward(x).to(x.dtype)
