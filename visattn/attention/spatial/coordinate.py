"""Hou, Zhou, Feng: Coordinate Attention for Efficient Mobile Network Design (CVPR 2021)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import differentiable, plain, tiles


class Weights(NamedTuple):
    """Where :class:`CoordinateAttention` looks: the weight of a position is the product of both."""

    height: Float[Tensor, "b c h 1"]
    width: Float[Tensor, "b c 1 w"]


class CoordinateAttention(Attention):
    r"""Weigh every row and every column of each channel by the means of all rows and columns.

    .. math::
        y = x \odot g^h \odot g^w, \quad g^h = \sigma(W_h f^h + b_h), \quad g^w = \sigma(W_w f^w + b_w), \quad
        [f^h; f^w] = \mathrm{hswish}\bigl(\mathrm{BN}(W [\mathrm{mean}_w(x); \mathrm{mean}_h(x)] + b)\bigr)

    As in the released code, all layers have biases, one batch norm serves rows and columns together, and the layer
    between has :math:`\max(8, c / r)` channels. Our squeeze, height and width are the paper's :math:`F_1, F_h, F_w`.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio :math:`r` by which the layer between is narrower than ``channels``.
        min_width: Channels which that layer has at least.

    Raises:
        ValueError: If ``reduction`` or ``min_width`` is not positive.

    Example:
        >>> CoordinateAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2103.02907"
    place = "expanded"
    neutral = 1.0

    def __init__(self, channels: int, *, reduction: int = 32, min_width: int = 8):
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction must be positive, got {reduction}")
        if min_width < 1:
            raise ValueError(f"min_width must be positive, got {min_width}")
        inner = max(min_width, channels // reduction)
        self.squeeze = nn.Conv1d(channels, inner, 1)
        self.norm = nn.BatchNorm1d(inner)
        self.height = nn.Conv1d(inner, channels, 1)
        self.width = nn.Conv1d(inner, channels, 1)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        return self._look(x)[0]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        return weigh(x, *weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        weights, x = self._look(x)
        return weigh(x, *weights)

    def _look(self, x: Tensor) -> tuple[Weights, Tensor]:
        """Return the weights, and ``x`` to be used in its place."""
        rows, columns, x = strips(x)
        both = F.hardswish(self.norm(self.squeeze(torch.cat([rows, columns], 2))))
        height, width = both.split(x.shape[2:], 2)
        return Weights(self.height(height).sigmoid()[..., None], self.width(width).sigmoid()[:, :, None]), x


# From here on: the means of rows and columns and the product with their weights, as functions that save time and memory
# the way those of CBAM do, with plain operations for compilers and the like.


def strips(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of every row, that of every column, and ``x``, to be used in its place."""
    return (*plain_strips(x), x) if plain(x) else Strips.apply(x)


def plain_strips(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(3), x.mean(2)


def weigh(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply a map with a weight for every row and one for every column of each channel."""
    rows, columns = rows.to(x.dtype), columns.to(x.dtype)
    return plain_weigh(x, rows, columns) if plain(x) else Weigh.apply(x, rows, columns)


def plain_weigh(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x * (rows * columns)


class Strips(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rows, columns = x.new_empty(x.shape[:3]), x.new_empty(*x.shape[:2], x.shape[3])
        for part, row, column in tiles(x, rows, columns):
            torch.mean(part, 3, out=row)
            torch.mean(part, 2, out=column)
        ctx.size = x.shape[2:]
        ctx.set_materialize_grads(False)
        return rows, columns, x

    @staticmethod
    def backward(ctx, g_rows, g_columns, g_x):
        if g_rows is None:  # g_columns as well: a gate takes both
            return g_x
        height, width = ctx.size
        g_rows, g_columns = (g_rows / width)[..., None], (g_columns / height)[:, :, None]
        if g_x is None or torch.is_grad_enabled():
            return g_rows + g_columns if g_x is None else g_x + g_rows + g_columns
        for into, row, column in tiles(g_x, g_rows, g_columns):  # a map that only Weigh knows
            into.add_(row).add_(column)
        return g_x


class Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, columns):
        ctx.save_for_backward(x, rows, columns)
        y = torch.empty_like(x)
        for part, row, column, into in tiles(x, rows, columns, y):
            torch.mul(row, column, out=into).mul_(part)
        return y

    @staticmethod
    def backward(ctx, g):
        x, rows, columns = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(differentiable(plain_weigh, (x, rows, columns), (g,)))
        g_x, g_rows, g_columns = (torch.empty_like(each) for each in (x, rows, columns))
        for part, row, column, g_part, into, into_row, into_column in tiles(
            x, rows, columns, g, g_x, g_rows, g_columns
        ):
            torch.mul(part, g_part, out=into)
            torch.matmul(into, column.mT, out=into_row)
            torch.matmul(row.mT, into, out=into_column)
            torch.mul(row, column, out=into).mul_(g_part)
        return g_x, g_rows, g_columns
