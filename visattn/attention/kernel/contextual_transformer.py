"""Li, Yao, Pan, Mei: Contextual Transformer Networks for Visual Recognition (TPAMI 2022)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import softmax
from visattn.attention.kernel.core import aggregate, check_kernel_size, mix

SHARE = 8
"""Channels of the values that one kernel serves."""


class Weights(NamedTuple):
    """Where :class:`ContextualTransformer` looks: a kernel at every position, and two contexts for every channel."""

    kernel: Float[Tensor, "b g k k h2 w2"]
    context: Float[Tensor, "b s e 1 1"]


class ContextualTransformer(Attention):
    r"""Read a neighbourhood by a kernel that a convolution of it asks for, and fuse what is read with the convolution.

    .. math:: y = a_1 \odot d + a_2 \odot k, \quad
        d_i = \mathrm{SiLU}\bigl(\mathrm{BN}(\textstyle\sum_{j \in N(i)} w_{i,\,j-i}\, v_j)\bigr), \quad
        w = \mathrm{GN}(W_2\, \mathrm{ReLU}(\mathrm{BN}(W_1 [x; k])))

    :math:`k = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}(x)))` is the static context and the key, :math:`d` the dynamic
    one, :math:`v = \mathrm{BN}(W_v x)`. No softmax bounds the kernels :math:`w`; each serves a channel of every eighth
    of :math:`v`, as in the released code. The :math:`a = \operatorname{softmax}(F_2\, \mathrm{ReLU}(\mathrm{BN}(F_1\,
    \mathrm{mean}_{hw}(d + k))))` weigh the two contexts, the dynamic and the static.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels of the result; None: ``channels``, as they always are in the paper.
        stride: Stride of a :math:`3 \times 3` mean before all else.
        kernel_size: Width of the neighbourhood.
        cardinality: Groups of the convolution that makes the key.

    Raises:
        ValueError: If ``out_channels`` is not a multiple of 8, ``kernel_size`` is even or not positive, or
            ``cardinality`` does not divide the channels of both maps; in training, if the batch is one image: the
            fusion normalises over the batch.

    Example:
        >>> ContextualTransformer(64, stride=2)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 4, 4])
    """

    paper = "arXiv:2107.12292"
    place = "convolutions"
    replaces = "convolution"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        kernel_size: int = 3,
        cardinality: int = 4,
    ):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if out_channels % SHARE:
            raise ValueError(f"out_channels must be a multiple of {SHARE}, got {out_channels}")
        check_kernel_size(kernel_size)
        if cardinality < 1 or channels % cardinality or out_channels % cardinality:
            rule = f"channels={channels} and out_channels={out_channels}"
            raise ValueError(f"cardinality must divide {rule}, got {cardinality}")
        self.kernel_size = kernel_size
        kernels, width = out_channels // SHARE, max(out_channels // 2, 32)
        self.reduce = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()
        self.key = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, groups=cardinality, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )
        self.value = nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.kernel = nn.Sequential(
            nn.Conv2d(channels + out_channels, out_channels // 2, 1, bias=False),
            nn.BatchNorm2d(out_channels // 2),
            nn.ReLU(),
            nn.Conv2d(out_channels // 2, kernel_size**2 * kernels, 1),
            nn.GroupNorm(kernels, kernel_size**2 * kernels),
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.fuse = nn.Sequential(
            nn.Linear(out_channels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2 * out_channels)
        )

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        return self._look(x)[0]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b e h2 w2"]:
        x = self.reduce(x)
        return mix((self._dynamic(x, weights.kernel), self.key(x)), weights.context).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        weights, *contexts = self._look(x)
        return mix(contexts, weights.context).to(x.dtype)

    def _look(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Weights, Float[Tensor, "b e h2 w2"], Float[Tensor, "b e h2 w2"]]:
        """Return the weights, and the dynamic and the static context, which they depend on."""
        x = self.reduce(x)
        static, side = self.key(x), self.kernel_size
        kernel = self.kernel(torch.cat((x, static), 1)).unflatten(1, (-1, side, side))
        dynamic = self._dynamic(x, kernel)
        logits = self.fuse((dynamic + static).mean((2, 3))).unflatten(1, (-1, 2))
        context = softmax(logits.mT, 1)[..., None, None].to(dynamic.dtype)
        return Weights(kernel, context), dynamic, static

    def _dynamic(
        self, x: Float[Tensor, "b c h2 w2"], kernel: Float[Tensor, "b g k k h2 w2"]
    ) -> Float[Tensor, "b e h2 w2"]:
        groups = self.value(x).unflatten(1, (SHARE, -1)).transpose(1, 2)
        return F.silu(self.norm(aggregate(groups, kernel).transpose(1, 2).flatten(1, 2)))
