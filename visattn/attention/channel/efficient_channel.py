"""Wang, Wu, Zhu, Li, Zuo, Hu: ECA-Net: Efficient Channel Attention for Deep CNNs (CVPR 2020)."""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale


class EfficientChannelAttention(Attention):
    r"""Weigh every channel by what the map holds of it and of the few channels beside it.

    .. math:: y = x \odot \sigma\bigl(\mathrm{conv}_k(\mathrm{mean}_{hw}(x))\bigr)

    The convolution runs along the channels, with zeros beyond the first and the last; or around a ring of them, which
    is not the paper's. Its width follows from their number, :math:`k = \lfloor (\log_2 c + 1) / 2 \rfloor`, or one more
    where that is even: the rule of the released code with the paper's :math:`\gamma = 2, b = 1`. The paper rounds to
    the nearest odd number, and its released models set the width of each stage by hand: use ``kernel_size`` for those.

    Args:
        channels: Channels :math:`c` of the feature map.
        kernel_size: Width :math:`k` of the convolution in channels; None: it follows from ``channels``.
        padding: What lies beyond the first and the last channel: ``"zeros"``, or, ``"circular"``, the other end.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive, or goes around a ring more than once, or ``padding`` is
            neither of the two.

    Example:
        >>> EfficientChannelAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1910.03151"
    place = "residual"
    neutral = 1.0

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None = None,
        padding: Literal["zeros", "circular"] = "zeros",
    ):
        super().__init__()
        if kernel_size is None:
            kernel_size = int((math.log2(channels) + 1) / 2) | 1
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if padding not in ("zeros", "circular"):
            raise ValueError(f"padding must be 'zeros' or 'circular', got {padding!r}")
        if padding == "circular" and kernel_size // 2 > channels:
            most = 2 * channels + 1
            raise ValueError(f"kernel_size must be at most {most} around {channels} channels, got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, padding_mode=padding, bias=False)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)
