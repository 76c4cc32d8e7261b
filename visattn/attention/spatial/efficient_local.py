"""Xu, Wan: ELA: Efficient Local Attention for Deep Convolutional Neural Networks (2024)."""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.spatial.coordinate import strips, weigh


class Weights(NamedTuple):
    """Where :class:`EfficientLocalAttention` looks: the weight of a position is the product of both."""

    height: Float[Tensor, "b c h 1"]
    width: Float[Tensor, "b c 1 w"]


class EfficientLocalAttention(Attention):
    r"""Weigh every row and every column of each channel by the means of the rows and columns beside it.

    .. math::
        y = x \odot a^h \odot a^w, \quad a^h = \sigma\bigl(\mathrm{GN}(\mathrm{conv}_k(\mathrm{mean}_w(x)))\bigr), \quad
        a^w = \sigma\bigl(\mathrm{GN}(\mathrm{conv}_k(\mathrm{mean}_h(x)))\bigr)

    The convolutions have no bias. timm has a SiLU before the logistic function and a norm of one group.

    Args:
        channels: Channels :math:`c` of the feature map.
        kernel_size: Width :math:`k` of the convolutions in positions.
        group_width: Channels that a filter of the convolutions reads; 1: its own only.
        norm_groups: Groups of channels which the norms take their statistics over; None: 16, or as many of them as
            divide ``channels``.
        shared: Whether one convolution and one norm serve rows and columns, or each has its own, as in timm.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive, or ``group_width`` or ``norm_groups`` does not divide
            ``channels``.

    Example:
        >>> EfficientLocalAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2403.01123"
    place = "expanded"
    neutral = 1.0

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        group_width: int = 1,
        norm_groups: int | None = None,
        shared: bool = True,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        norm_groups = math.gcd(16, channels) if norm_groups is None else norm_groups
        for name, value in (("group_width", group_width), ("norm_groups", norm_groups)):
            if value < 1 or channels % value:
                raise ValueError(f"{name} must divide channels={channels}, got {value}")
        self.strips = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(
                    channels,
                    channels,
                    kernel_size,
                    padding=kernel_size // 2,
                    groups=channels // group_width,
                    bias=False,
                ),
                nn.GroupNorm(norm_groups, channels),
            )
            for _ in range(1 if shared else 2)
        )

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        return self._look(x)[0]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        return weigh(x, *weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        weights, x = self._look(x)
        return weigh(x, *weights)

    def _look(self, x: Tensor) -> tuple[Weights, Tensor]:
        """Return the weights, and ``x`` to be used in its place."""
        rows, columns, x = strips(x)
        height, width = self.strips[0](rows), self.strips[-1](columns)
        return Weights(height.sigmoid()[..., None], width.sigmoid()[:, :, None]), x
