"""Qin, Zhang, Wu, Li: FcaNet: Frequency Channel Attention Networks (ICCV 2021)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import quick, scale
from visattn.attention.core import differentiable

ALONG_HEIGHT = (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2, 4, 6, 3, 5, 5, 2, 6, 5, 5, 3, 3, 4, 2, 2, 6, 1)
ALONG_WIDTH = (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2, 6, 3, 3, 3, 5, 1, 1, 2, 4, 2, 1, 1, 3, 0, 5, 3)


class FrequencyChannelAttention(Attention):
    r"""Weigh every channel by how much of one wave of the cosine transform the map holds of it, for each channel.

    .. math::
        y = x \odot \sigma\bigl(W_2\, \mathrm{ReLU}(W_1 f)\bigr), \quad
        f_c = \sum_{ij} x_{cij}\, D_{ui} D_{vj}, \quad
        D_{ui} = \sqrt{\frac{2 - [u = 0]}{h}} \cos\frac{\pi u (i + \frac12)}{h}

    The channels are divided into as many groups as there are frequencies; each group has one pair :math:`(u, v)`. The
    pairs were chosen on 7 by 7 positions, in the order of how well each does alone, and are multiplied by how often 7
    goes into the map. On fewer than 7 rows or columns the highest fold back onto lower ones.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio by which the layer between is narrower than ``channels``.
        frequencies: How many of the best 32 frequencies; None: 16 as in the paper, or 8, 4, … if only these divide
            ``channels``.
        grid: Rows and columns over which the waves are laid; other maps are averaged into it, as in the released code.
            None: those of each map.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``, ``frequencies`` does not lie between 1 and
            32 or does not divide ``channels``, or a side of ``grid`` is not positive.

    Example:
        >>> FrequencyChannelAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2012.11879"
    place = "residual"
    neutral = 1.0
    frequencies: Tensor

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        frequencies: int | None = None,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if frequencies is None:
            frequencies = math.gcd(channels, 16)
        if not 1 <= frequencies <= 32 or channels % frequencies:
            raise ValueError(f"frequencies must lie between 1 and 32 and divide channels={channels}, got {frequencies}")
        if grid is not None and min(grid) < 1:
            raise ValueError(f"grid must be positive, got {grid}")
        self.grid = grid
        pairs = torch.tensor([ALONG_HEIGHT[:frequencies], ALONG_WIDTH[:frequencies]])
        self.register_buffer("frequencies", pairs, persistent=False)
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self._weigh(plain_project(x, self._waves(x)))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        f, x = project(x, self._waves(x))
        return scale(x, self._weigh(f))

    def _weigh(self, f: Float[Tensor, "b c"]) -> Float[Tensor, "b c 1 1"]:
        return self.excite(self.squeeze(f).relu()).sigmoid()[:, :, None, None]

    def _waves(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "n 1 positions"]:
        """Return the waves over a map, one a frequency."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, columns = (self._along(axis, x.shape[2 + axis], dtype) for axis in (0, 1))
        return (rows[:, :, None] * columns[:, None]).flatten(1)[:, None].to(x.dtype)

    def _along(self, axis: int, length: int, dtype: torch.dtype) -> Float[Tensor, "n length"]:
        """Return the waves along one axis of a map."""
        cells, frequency = length if self.grid is None else self.grid[axis], self.frequencies[axis, :, None]
        scale: Any = torch.sym_max(cells // 7, 1)
        odd = torch.arange(1, 2 * cells, 2, device=frequency.device)
        angle = (frequency * odd * scale % (4 * cells)).to(dtype) * (math.pi / 2 / cells)
        waves = angle.cos() * ((1 + (frequency > 0)).to(dtype) / cells).sqrt()
        return waves if self.grid is None else waves @ shares(cells, length, waves)


def shares(cells: int, length: int, like: Tensor) -> Float[Tensor, "cells length"]:
    """Which share of each cell every position has, where ``length`` positions are averaged into ``cells``."""
    cell, at = torch.arange(cells, device=like.device)[:, None], torch.arange(length, device=like.device)
    first, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    return ((first <= at) & (at < end)).to(like.dtype) / (end - first)


def project(
    x: Float[Tensor, "b c h w"], waves: Float[Tensor, "n 1 positions"]
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c h w"]]:
    """Return how much of its group's wave every channel holds, and ``x``, to be given to :func:`scale` in its place and
    to nothing else: what comes back from there as its gradient is written to.
    """
    if not quick(x):
        return plain_project(x, waves), x
    f, again = Project.apply(x, waves)
    return f, again if x.requires_grad else x


def plain_project(x: Tensor, waves: Tensor) -> Tensor:
    return torch.matmul(waves, x.flatten(2).unflatten(1, (len(waves), -1)).mT).flatten(1)


class Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, waves):
        ctx.save_for_backward(x, waves)
        return plain_project(x, waves), x

    @staticmethod
    def backward(ctx, g_f, g_x):
        x, waves = ctx.saved_tensors
        if torch.is_grad_enabled():
            return g_x + differentiable(plain_project, (x, waves), (g_f,))[0], None
        flat = g_x.flatten(2)
        groups = flat.unflatten(1, (len(waves), -1))
        for out, g in zip(groups, g_f.unflatten(1, groups.shape[1:3])[..., None], strict=True):
            out.addcmul_(waves, g)
        return flat.unflatten(2, x.shape[2:]), None
