"""Yuan, Hou, Jiang, Feng, Yan: VOLO: Vision Outlooker for Visual Recognition (2021)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import softmax


class OutlookAttention(Attention):
    r"""Let the centre of every window say what each of its positions reads from the others, without any key.

    .. math:: y_i = W_o \sum_{u : i \in \Omega_u} \sum_{j \in \Omega_u} a^u_{ij}\, v_j, \quad
        a^u_{i \cdot} = \operatorname{softmax}\bigl((W_a \bar x_u + b_a)_{i \cdot} / \sqrt d\bigr)

    in each head of :math:`d` features. Windows :math:`\Omega_u` stand at every ``stride``-th row and column and
    :math:`\bar x_u` is the mean of that many positions. A position reads once for each window it lies in, so its
    weights sum to their number, less what falls beyond the border, where values are zero.

    Args:
        channels: Channels :math:`c` of the feature map.
        window: Rows and columns of a window.
        stride: Rows and columns from one window to the next.
        heads: Heads, each of ``channels / heads`` features; None: one for every 32 channels, as in the paper's
            networks.

    Raises:
        ValueError: If ``window`` is not odd, ``stride`` does not lie between 1 and ``window``, or ``heads`` does not
            divide ``channels``.

    Example:
        >>> OutlookAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2106.13112"
    place = "stages[1]"

    def __init__(self, channels: int, *, window: int = 3, stride: int = 2, heads: int | None = None):
        super().__init__()
        heads = max(1, channels // 32) if heads is None else heads
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        if not 1 <= stride <= window:
            raise ValueError(f"stride must lie between 1 and window={window}, got {stride}")
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels={channels}, got {heads}")
        self.window, self.stride, self.heads, self.area = window, stride, heads, window**2
        self.scale = (channels // heads) ** -0.5
        self.value = nn.Conv1d(channels, channels, 1, bias=False)
        self.outlook = nn.Linear(channels, heads * self.area**2)
        self.out = nn.Conv1d(channels, channels, 1)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        weights, at = self._weights(x), self._places(x)
        n = x.shape[2] * x.shape[3]
        pairs = at[:, :, None] * (n + 1) + at[:, None]
        dense = weights.new_zeros(*weights.shape[:2], (n + 1) ** 2)
        dense = dense.index_add(2, pairs.flatten(), weights.flatten(2))
        return dense.unflatten(2, (n + 1, n + 1))[:, :, :n, :n]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b c h w"]:
        value = self.value(x.flatten(2)).unflatten(1, (self.heads, -1))
        return self._write(x, value @ weights.mT)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        options = {"kernel_size": self.window, "padding": self.window // 2, "stride": self.stride}
        value = F.unfold(self.value(x.flatten(2)).view(x.shape), **options)
        value = value.unflatten(1, (self.heads, -1, self.area)).permute(0, 1, 4, 3, 2)
        y = (self._weights(x) @ value).permute(0, 1, 4, 3, 2)
        return self._write(x, F.fold(y.flatten(1, 3), x.shape[2:], **options).flatten(2))

    def _weights(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads u area area"]:
        """What each position of each window reads from the others, in every head."""
        centres = F.avg_pool2d(x, self.stride, ceil_mode=True).flatten(2).mT
        logits = F.linear(centres, self.outlook.weight * self.scale, self.outlook.bias * self.scale)
        logits = logits.unflatten(2, (self.heads, self.area, self.area)).transpose(1, 2)
        return softmax(logits).to(logits.dtype)

    def _places(self, x: Float[Tensor, "b c h w"]) -> Int[Tensor, "u area"]:
        """The positions of each window; beyond the border, the position after the last."""
        height, width = x.shape[2:]
        offset = torch.arange(self.window, device=x.device) - self.window // 2
        rows, columns = (torch.arange(0, side, self.stride, device=x.device)[:, None] + offset for side in x.shape[2:])
        row, column = rows[:, None, :, None], columns[None, :, None]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return torch.where(inside, row * width + column, height * width).flatten(2).flatten(0, 1)

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b *features n"]) -> Float[Tensor, "b c h w"]:
        return self.out(y.reshape(x.flatten(2).shape)).view(x.shape).to(x.dtype)
