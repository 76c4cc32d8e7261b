"""Zhang, Yang: SA-Net: Shuffle Attention for Deep Convolutional Neural Networks (ICASSP 2021)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class Weights(NamedTuple):
    """Where :class:`ShuffleAttention` looks: in the first half of the channels of every group, and in the second."""

    channel: Float[Tensor, "b d 1 1"]
    spatial: Float[Tensor, "b d h w"]


class ShuffleAttention(Attention):
    r"""Weigh half of the channels of every group as channels, the other half as maps, and shuffle the channels.

    .. math::
        y = \mathrm{shuffle}\bigl([x_1 \odot \sigma(w_1\, \mathrm{mean}_{hw}(x_1) + b_1);\;
        x_2 \odot \sigma(w_2\, \mathrm{GN}(x_2) + b_2)]_\mathrm{groups}\bigr)

    All groups share :math:`w_1, b_1, w_2, b_2` and the norm, which have one entry for each channel of half a group; the
    norm takes its statistics over the positions of one channel. The shuffle deals the first half of all channels and
    the second out in turns. Weights start as :math:`\sigma(1)` everywhere, as in the released code.

    Args:
        channels: Channels :math:`c` of the feature map.
        groups: Groups of channels; None: the paper's 64, or as many of them as divide half of ``channels``.

    Raises:
        ValueError: If ``groups`` is not positive, or ``channels`` is not a multiple of twice as many.

    Example:
        >>> ShuffleAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2102.00240"
    place = "residual"

    def __init__(self, channels: int, *, groups: int | None = None):
        super().__init__()
        groups = math.gcd(64, channels // 2) if groups is None else groups
        if groups < 1:
            raise ValueError(f"groups must be positive, got {groups}")
        if channels % (2 * groups):
            raise ValueError(f"channels must be a multiple of 2 * groups={2 * groups}, got {channels}")
        self.groups = groups
        width = channels // (2 * groups)
        self.channel_weight = nn.Parameter(torch.zeros(width))
        self.channel_bias = nn.Parameter(torch.ones(width))
        self.spatial_weight = nn.Parameter(torch.zeros(width))
        self.spatial_bias = nn.Parameter(torch.ones(width))
        self.norm = nn.GroupNorm(width, width)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        first, second = self._halves(x)
        channel = torch.addcmul(self.channel_bias, self.channel_weight, first.mean((3, 4))).sigmoid()
        scale = self.spatial_weight * self.norm.weight  # the norm does what comes after it as well
        shift = torch.addcmul(self.spatial_bias, self.spatial_weight, self.norm.bias)
        spatial = torch.group_norm(second.flatten(0, 1), len(scale), scale, shift, self.norm.eps).sigmoid_()
        return Weights(channel.flatten(1)[..., None, None], spatial.view(x.shape[0], -1, *x.shape[2:]))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        halves = [
            half * each.unflatten(1, (self.groups, -1)).to(x.dtype)
            for half, each in zip(self._halves(x), weights, strict=True)
        ]
        if self.groups % 2:  # the middle of all channels lies within a group
            return torch.stack(halves, 2).flatten(1, 3).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.stack([half.unflatten(1, (2, -1)).movedim(1, 3) for half in halves], 2).flatten(1, 4)

    def _halves(self, x: Tensor) -> tuple[Tensor, ...]:
        """Both halves of all groups: (b, groups, d / groups, h, w)."""
        return x.unflatten(1, (self.groups, 2, -1)).unbind(2)
