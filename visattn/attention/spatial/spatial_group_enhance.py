"""Li, Hu, Yang: Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks (2019)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class SpatialGroupEnhance(Attention):
    r"""Weigh every position of each group of channels by how much it resembles the group's mean.

    .. math::
        y = x \odot \sigma\Bigl(w_g \frac{s - \mathrm{mean}_{hw}(s)}{\mathrm{std}_{hw}(s) + \epsilon} + b_g\Bigr),
        \quad s_i = x_i^\top\, \mathrm{mean}_{hw}(x) \text{ in group } g

    As in the released code, :math:`\epsilon = 10^{-5}` is added to the standard deviation, which is that of a sample
    (:math:`n - 1`), and weights start as :math:`\sigma(1)` everywhere. On a map of one position it is zero.

    Args:
        channels: Channels of the feature map.
        groups: Groups of channels; None: the paper's 64, or as many of them as divide ``channels``.

    Raises:
        ValueError: If ``groups`` does not divide ``channels``.

    Example:
        >>> SpatialGroupEnhance(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1905.09646"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int, *, groups: int | None = None):
        super().__init__()
        groups = math.gcd(64, channels) if groups is None else groups
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must divide channels={channels}, got {groups}")
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(groups))
        self.bias = nn.Parameter(torch.ones(groups))

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        features = x.flatten(2).unflatten(1, (self.groups, -1))
        similarity = torch.matmul(features.mean(3)[:, :, None], features)[:, :, 0]
        std, mean = torch.std_mean(similarity, 2, correction=int(similarity.shape[2] > 1), keepdim=True)
        scale = self.weight[:, None] / (std + 1e-5)
        return torch.addcmul(self.bias[:, None] - mean * scale, similarity, scale).sigmoid_().unflatten(2, x.shape[2:])

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        return (x.unflatten(1, (self.groups, -1)) * weights[:, :, None].to(x.dtype)).flatten(1, 2)
