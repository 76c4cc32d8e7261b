"""Roy, Navab, Wachinger: Recalibrating Fully Convolutional Networks with Spatial and Channel 'Squeeze & Excitation'
Blocks (IEEE TMI 2019); before, Concurrent Spatial and Channel 'Squeeze & Excitation' (MICCAI 2018)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class Weights(NamedTuple):
    """Where :class:`SpatialChannelSqueezeExcitation` looks."""

    channel: Float[Tensor, "b c 1 1"]
    spatial: Float[Tensor, "b 1 h w"]


class SpatialChannelSqueezeExcitation(Attention):
    r"""Weigh every channel by the whole map, every position by all channels, and keep what either stresses more.

    .. math::
        y = \max(x \odot s_c,\, x \odot s_s), \quad
        s_c = \sigma\bigl(W_2\, \mathrm{ReLU}(W_1\, \mathrm{mean}_{hw}(x) + b_1) + b_2\bigr), \quad
        s_s = \sigma(w^\top x + b)

    Our squeeze and excite are the paper's :math:`W_1` and :math:`W_2`.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio by which the layer inside the channel branch is narrower than ``channels``.
        combine: How the branches meet: ``"max"`` as in the journal's version, ``"sum"`` as in the conference's (arXiv:
            1803.02579) and in most ports.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels`` or ``combine`` is neither of the two.

    Example:
        >>> SpatialChannelSqueezeExcitation(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1808.08127"
    place = "stages"

    def __init__(self, channels: int, *, reduction: int = 2, combine: Literal["max", "sum"] = "max"):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if combine not in ("max", "sum"):
            raise ValueError(f"combine must be 'max' or 'sum', got {combine!r}")
        self.combine = combine
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)
        self.spatial = nn.Linear(channels, 1)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        channel = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        weight = self.spatial.weight.expand(x.shape[0], -1, -1)
        spatial = torch.baddbmm(self.spatial.bias, weight, x.flatten(2)).sigmoid()  # faster than a convolution
        return Weights(channel[:, :, None, None], spatial.unflatten(2, x.shape[2:]))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        channel, spatial = (each.to(x.dtype) for each in weights)
        return x * (channel + spatial) if self.combine == "sum" else torch.maximum(x * channel, x * spatial)
