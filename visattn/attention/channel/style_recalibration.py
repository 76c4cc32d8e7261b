"""Lee, Kim, Nam: SRM: A Style-based Recalibration Module for Convolutional Neural Networks (ICCV 2019)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import quick, scale
from visattn.attention.core import differentiable


class StyleRecalibration(Attention):
    r"""Weigh every channel by its style: its mean and its standard deviation over the map.

    .. math::
        y_c = x_c\, \sigma\bigl(\mathrm{BN}(w_{c1}\, \mathrm{mean}_{hw}(x_c) + w_{c2}\, \mathrm{std}_{hw}(x_c))\bigr)

    No channel sees another. The weights :math:`w` start at zero, so a fresh module halves the map in eval. The variance
    is divided by one less than the number of positions, and :math:`10^{-5}` is added to it.

    Args:
        channels: Channels of the feature map.

    Raises:
        ValueError: In training, if the batch is one image: the batch norm takes its statistics over the batch.

    Example:
        >>> StyleRecalibration(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1903.10829"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 2))
        self.norm = nn.BatchNorm1d(channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self._weigh(*plain_moments(x), x.shape[2] * x.shape[3])

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mean, variance, x = moments(x)
        return scale(x, self._weigh(mean, variance, x.shape[2] * x.shape[3]))

    def _weigh(self, mean: Float[Tensor, "b c"], variance: Float[Tensor, "b c"], n: int) -> Float[Tensor, "b c 1 1"]:
        others: Any = torch.sym_max(n - 1, 1)  # of one position the variance is zero
        deviation = (variance * n / others + 1e-5).sqrt()
        return self.norm(mean * self.weight[:, 0] + deviation * self.weight[:, 1]).sigmoid()[:, :, None, None]


def moments(x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"], Float[Tensor, "b c h w"]]:
    """Return mean and variance of every channel, and ``x``, to be given to :func:`scale` in its place and to nothing
    else: what comes back from there as its gradient is written to.
    """
    if not quick(x):
        return *plain_moments(x), x
    mean, variance, again = Moments.apply(x)
    return mean, variance, again if x.requires_grad else x


def plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((2, 3), keepdim=True)
    return mean.flatten(1), (x - mean).square().mean((2, 3))


class Moments(torch.autograd.Function):
    """Several times as fast as ``torch.var_mean``."""

    @staticmethod
    def forward(ctx, x):
        mean, variance, apart = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2]), None
        for image, middle, spread in zip(x, mean, variance, strict=True):
            torch.mean(image, (1, 2), out=middle)
            apart = torch.sub(image, middle[:, None, None], out=torch.empty_like(image) if apart is None else apart)
            torch.linalg.vector_norm(apart, dim=(1, 2), out=spread)
        variance.square_().div_(x.shape[2] * x.shape[3])
        ctx.save_for_backward(x, mean)
        return mean, variance, x

    @staticmethod
    def backward(ctx, g_mean, g_variance, g_x):
        x, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            return g_x + differentiable(plain_moments, (x,), (g_mean, g_variance))[0]
        n = x.shape[2] * x.shape[3]
        slope = g_variance * (2 / n)
        shift = g_mean / n - slope * mean
        for image, a, b, out in zip(x, slope[:, :, None, None], shift[:, :, None, None], g_x, strict=True):
            out.addcmul_(image, a).add_(b)
        return g_x
