"""Ruan, Wang, Wang, Zheng, Zheng: Gaussian Context Transformer (CVPR 2021)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale


class GaussianContextTransform(Attention):
    r"""Weigh every channel the less, the further its mean lies from the mean of all channels.

    .. math:: y_c = x_c\, e^{-\hat z_c^2 / 2 \sigma^2}, \quad
        \hat z = \frac{z - \mathrm{mean}_c(z)}{\mathrm{std}_c(z)}, \quad z = \mathrm{mean}_{hw}(x)

    Our :math:`\sigma` is the paper's :math:`c`. Fixed at 2 it is GCT-B0, which has no parameter; learned within bounds,
    which it nears as :math:`\sigma = l + (h - l)\, \mathrm{sigmoid}(\theta)` and starts from their middle, GCT-B1,
    which has one. :math:`10^{-5}` is added to the variance of the channels, so that channels of one mean have a
    gradient.

    Args:
        channels: Channels of the feature map. The module has no parameter that depends on them.
        sigma: Standard deviation of the Gaussian, or the bounds :math:`(l, h)` within which it is learned.

    Raises:
        ValueError: If ``sigma`` is not positive, or its bounds are not positive and ascending.

    Example:
        >>> GaussianContextTransform(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "https://openaccess.thecvf.com/content/CVPR2021/html/Ruan_Gaussian_Context_Transformer_CVPR_2021_paper.html"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int, *, sigma: float | tuple[float, float] = 2.0):
        super().__init__()
        fixed = isinstance(sigma, (int, float))
        self.low, self.high = (sigma, sigma) if isinstance(sigma, (int, float)) else sigma
        if self.low <= 0 or (not fixed and self.low >= self.high):
            raise ValueError(f"sigma must be positive, or two ascending positive bounds, got {sigma}")
        self.theta = None if fixed else nn.Parameter(torch.zeros(1))

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        sigma = self.low if self.theta is None else self.low + (self.high - self.low) * self.theta.sigmoid()
        z = F.layer_norm(x.mean((2, 3)), x.shape[1:2])
        return (-0.5 * (z / sigma).square()).exp()[:, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)
