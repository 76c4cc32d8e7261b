"""Chen, Kalantidis, Li, Yan, Feng: A²-Nets: Double Attention Networks (NeurIPS 2018)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.pairwise.efficient import gather_and_mix


class DoubleWeights(NamedTuple):
    """Where each of k descriptors is gathered from, and how each position mixes them."""

    gather: Float[Tensor, "b k h w"]
    distribute: Float[Tensor, "b k h w"]


class DoubleAttention(Attention):
    r"""Gather a few descriptors from the whole map, and give every position its own mixture of them.

    .. math:: y_i = x_i + W_z \sum_k D_{ki} \sum_j G_{kj}\, W_a x_j, \quad
        G = \operatorname{softmax}_j(W_g x), \quad D = \operatorname{softmax}_k(W_d x)

    Our value, gather, distribute and out are the paper's :math:`\phi, \theta, \rho` and its last convolution; all have
    biases. No batch norm is inside, and the sum with the input is part of the module. This is efficient attention with
    the roles of its query and key.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio by which the values are narrower than ``channels``.
        maps: How many descriptors :math:`k` are gathered; None: as many as a value has features.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels`` or ``maps`` is not positive.

    Example:
        >>> DoubleAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1810.11579"
    place = ("stages[1].blocks[1::2]", "stages[2].blocks[1::2]")
    queried = True

    def __init__(self, channels: int, *, reduction: int = 4, maps: int | None = None):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        width = channels // reduction
        maps = width if maps is None else maps
        if maps < 1:
            raise ValueError(f"maps must be positive, got {maps}")
        self.value = nn.Linear(channels, width)
        self.gather = nn.Conv2d(channels, maps, 1)
        self.distribute = nn.Conv2d(channels, maps, 1)
        self.out = nn.Linear(width, channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> DoubleWeights:
        dtype = torch.promote_types(x.dtype, torch.float32)
        gather = self.gather(x).flatten(2).softmax(2, dtype=dtype).view(x.shape[0], -1, *x.shape[2:])
        return DoubleWeights(gather.to(x.dtype), self.distribute(x).softmax(1, dtype=dtype).to(x.dtype))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: DoubleWeights) -> Float[Tensor, "b c h w"]:
        y = gather_and_mix(x.flatten(2), weights.distribute.flatten(2), weights.gather.flatten(2), self.value, self.out)
        return x + y.view(x.shape).to(x.dtype)
