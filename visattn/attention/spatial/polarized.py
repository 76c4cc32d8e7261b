"""Liu, Liu, Fan, Huang: Polarized Self-Attention: Towards High-quality Pixel-wise Regression (2021)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax
from visattn.attention.spatial.cbam import multiply


class Weights(NamedTuple):
    """Where :class:`PolarizedSelfAttention` looks."""

    channel: Float[Tensor, "b c 1 1"]
    spatial: Float[Tensor, "b 1 h w"]


class PolarizedSelfAttention(Attention):
    r"""Weigh channels by what chosen positions hold, and positions by chosen features.

    .. math::
        A^c = \sigma\bigl(\mathrm{LN}(W_z \sum_i \operatorname{softmax}_i(q^\top x_i)\, V x_i)\bigr), \quad
        A^s_i = \sigma\bigl(\operatorname{softmax}_d(Q'\, \mathrm{mean}_{hw}(x))^\top V' x_i\bigr)

    In parallel, :math:`y = x \odot (A^c + A^s)`; in sequence, :math:`x' = x \odot A^c` and
    :math:`y = x' \odot A^s(x')`. Every projection is linear, so it is applied to sums of the map instead of the map
    where the order does not matter; it seldom does. The forms differ in:

    ==================== ======================== ================================== ===============================
    ``form``             paper                    released, parallel                 released, sequential
    ==================== ======================== ================================== ===============================
    before :math:`A^c`   layer norm               nothing                            two layers around a layer norm
                                                                                     and ReLU, four times as narrow
    softmax of spatial   over features, of        over positions, of the product,    over positions, of
                         :math:`Q'`'s             before :math:`\sigma`              :math:`V'`'s
    ==================== ======================== ================================== ===============================

    Args:
        channels: Channels :math:`c` of the feature map; projections have :math:`c / 2` features.
        arrangement: Whether both look at the map, or positions at the map whose channels are weighed.
        form: Whether to build what the paper writes or what its released code does.

    Raises:
        ValueError: If ``arrangement`` or ``form`` is unknown, or there are too few ``channels`` to divide by 2, or by 8
            in the released sequential form.

    Example:
        >>> PolarizedSelfAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2107.00782"
    place = "residual"

    def __init__(
        self,
        channels: int,
        *,
        arrangement: Literal["parallel", "sequential"] = "parallel",
        form: Literal["paper", "released"] = "paper",
    ):
        super().__init__()
        if arrangement not in ("parallel", "sequential"):
            raise ValueError(f"arrangement must be 'parallel' or 'sequential', got {arrangement!r}")
        if form not in ("paper", "released"):
            raise ValueError(f"form must be 'paper' or 'released', got {form!r}")
        least = 8 if (arrangement, form) == ("sequential", "released") else 2
        if channels < least:
            raise ValueError(f"channels must be at least {least}, got {channels}")
        self.arrangement, self.form = arrangement, form
        width = channels // 2
        self.channel_query = nn.Linear(channels, 1, bias=False)
        self.channel_value = nn.Linear(channels, width, bias=False)
        if form == "paper":
            self.channel_out = nn.Sequential(nn.Linear(width, channels, bias=False), nn.LayerNorm(channels))
        elif arrangement == "parallel":
            self.channel_out = nn.Sequential(nn.Linear(width, channels, bias=False))
        else:
            self.channel_out = nn.Sequential(
                nn.Linear(width, width // 4), nn.LayerNorm(width // 4), nn.ReLU(), nn.Linear(width // 4, channels)
            )
        self.spatial_query = nn.Linear(channels, width, bias=False)
        self.spatial_value = nn.Linear(channels, width, bias=False)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        positions = x.flatten(2)
        asked = softmax(torch.bmm(self.channel_query.weight.expand(x.shape[0], -1, -1), positions)).to(x.dtype)
        held = torch.matmul(positions, asked.mT)[..., 0]
        channel = self.channel_out(self.channel_value(held)).sigmoid()
        mean, value = x.mean((2, 3)), self.spatial_value.weight
        if self.arrangement == "sequential":
            mean, value = mean * channel, value * channel[:, None]
        query = self.spatial_query(mean)[:, None]
        if self.form == "paper":
            logits = torch.matmul(torch.matmul(softmax(query).to(value.dtype), value), positions)
        elif self.arrangement == "parallel":
            logits = softmax(torch.matmul(torch.matmul(query, value), positions))
        else:
            logits = torch.matmul(query, softmax(torch.matmul(value, positions)).to(query.dtype))
        return Weights(channel[:, :, None, None], logits.sigmoid().unflatten(2, x.shape[2:]))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        channel, spatial = (each.to(x.dtype) for each in weights)
        return multiply(x, channel, spatial) if self.arrangement == "sequential" else x * (channel + spatial)
