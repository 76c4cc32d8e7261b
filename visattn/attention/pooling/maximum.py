"""Oquab, Bottou, Laptev, Sivic: Is Object Localization for Free? Weakly-supervised Learning with CNNs (CVPR 2015)."""

import torch
from jaxtyping import Float
from torch import Tensor

from visattn.attention.base import Attention


class MaxPool(Attention):
    r"""Pick the largest value of every channel: hard attention, whose arg-max is its map.

    .. math:: y = \sum_i a_i x_i, \quad a_i = \begin{cases} 1 & i = \arg\max_j x_j \\ 0 & \text{else} \end{cases}

    Of several equal values the first one is picked, row by row.

    Args:
        channels: Channels of the map.

    Example:
        >>> MaxPool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    paper = "doi:10.1109/CVPR.2015.7298668"
    place = "pool"
    replaces = "pool"
    hard = True

    def __init__(self, channels: int):
        super().__init__()

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        first = x.flatten(2).argmax(2, keepdim=True)
        return torch.zeros_like(x).flatten(2).scatter(2, first, 1.0).view(x.shape)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return (x * weights).sum((2, 3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return x.flatten(2).max(2).values  # its gradient goes to one position, as the map says
