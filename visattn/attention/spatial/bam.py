"""Park, Woo, Lee, Kweon: BAM: Bottleneck Attention Module (BMVC 2018)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class BAM(Attention):
    r"""Stress what two branches, one over channels and one over positions, find together.

    .. math:: y = x \odot (1 + M), \quad M = \sigma(M_c(x) + M_s(x))

    :math:`M_c` is a perceptron on the mean of every channel, :math:`M_s` narrows the map, widens what it sees by two
    dilated convolutions and ends in one channel. As in the released code, all layers have biases and the last of each
    branch is not followed by a batch norm. The released code multiplies the branches where the paper adds them.

    Args:
        channels: Channels of the feature map.
        reduction: Ratio by which the layers inside both branches are narrower than ``channels``.
        dilation: Distance in pixels between the taps of the dilated convolutions.
        combine: How the branches meet: ``"sum"`` as in the paper, ``"product"`` as in the released code.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``, ``dilation`` is not positive, or
            ``combine`` is neither of the two; in training, if the batch is one image: the channel branch normalises
            over the batch.

    Example:
        >>> BAM(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1807.06514"
    place = "stages[:3]"
    neutral = 0.0

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        dilation: int = 4,
        combine: Literal["sum", "product"] = "sum",
    ):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if dilation < 1:
            raise ValueError(f"dilation must be positive, got {dilation}")
        if combine not in ("sum", "product"):
            raise ValueError(f"combine must be 'sum' or 'product', got {combine!r}")
        self.combine = combine
        width = channels // reduction
        self.channel = nn.Sequential(
            nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, channels)
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 1),
        )

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        channel, spatial = self.channel(x.mean((2, 3)))[:, :, None, None], self.spatial(x)
        return (channel + spatial if self.combine == "sum" else channel * spatial).sigmoid_()

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if torch.is_grad_enabled():
            return x * (1 + weights)
        return torch.addcmul(x, x, weights.to(x.dtype))  # one pass; its gradient takes more than those of two
