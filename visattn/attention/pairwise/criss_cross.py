"""Huang, Wang, Wei, Huang, Shi, Liu, Huang: CCNet: Criss-Cross Attention for Semantic Segmentation (ICCV 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import uncast
from visattn.attention.pairwise.core import read


class CrissCrossAttention(Attention):
    r"""Let every position read from its row and its column, and then once more, by which it has read from all.

    .. math:: y_i = x_i + \gamma \sum_j \operatorname{softmax}_j(q_i^\top k_j)\, v_j, \quad
        j \in \text{row of } i \cup \text{column of } i

    One softmax over both, in which the position itself counts once. All steps have the same parameters and each reads
    the map that the one before has written. The weights have one matrix a step, zero beyond row and column.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio by which query and key are narrower than ``channels``.
        recurrence: Number of steps; from two on, every position reaches every other.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels`` or ``recurrence`` is not positive.

    Example:
        >>> CrissCrossAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1811.11721"
    place = "head"
    queried = True

    def __init__(self, channels: int, *, reduction: int = 8, recurrence: int = 2):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if recurrence < 1:
            raise ValueError(f"recurrence must be positive, got {recurrence}")
        self.recurrence = recurrence
        self.query = nn.Conv2d(channels, channels // reduction, 1)
        self.key = nn.Conv2d(channels, channels // reduction, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b r n m"]:
        same_row, same_column = (torch.eye(side, dtype=x.dtype, device=x.device) for side in x.shape[2:])
        steps = []
        for _ in range(self.recurrence):
            cross = self._weights(x)
            column, row = cross.split(x.shape[2:], 3)
            dense = row[:, :, :, None] * same_row[:, None, :, None] + column[..., None] * same_column[:, None]
            steps.append(dense.flatten(3).flatten(1, 2))
            x = self._step(x, cross)
        return torch.stack(steps, 1)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b r n m"]) -> Float[Tensor, "b c h w"]:
        for step in weights.unbind(1):
            x = x + read(self._value(x).flatten(2).mT, step).mT.view(x.shape).to(x.dtype)
        return x

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        for _ in range(self.recurrence):
            x = self._step(x, self._weights(x))
        return x

    def _weights(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w cross"]:
        """What each position reads from its column, and from its row."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        query, key = self.query(x).to(dtype), self.key(x).to(dtype)
        with uncast(x.device):
            column = torch.einsum("bdhw,bdgw->bhwg", query, key)
            row = torch.einsum("bdhw,bdhv->bhwv", query, key)
        itself = torch.eye(x.shape[2], dtype=torch.bool, device=x.device)[:, None]  # it is in the row
        column = column.masked_fill(itself, torch.finfo(dtype).min)  # finite: a row is never empty, a column may be
        return torch.cat((column, row), 3).softmax(3).to(x.dtype)

    def _step(self, x: Float[Tensor, "b c h w"], weights: Float[Tensor, "b h w cross"]) -> Float[Tensor, "b c h w"]:
        column, row = weights.split(x.shape[2:], 3)
        value = self._value(x)
        y = torch.einsum("bhwg,bcgw->bchw", column, value) + torch.einsum("bhwv,bchv->bchw", row, value)
        return x + y.to(x.dtype)

    def _value(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        weight, bias = self.gamma * self.value.weight, self.gamma * self.value.bias  # type: ignore[operator]
        return F.conv2d(x, weight, bias)  # the gain where it is small
