"""Bello: LambdaNetworks: Modeling Long-Range Interactions without Attention (ICLR 2021)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import softmax


class LambdaAttention(Attention):
    r"""Sum up a map in small matrices, one for its content and one for what lies around a position, and ask those.

    .. math:: y_n = \Bigl[(\lambda^c + \lambda^p_n)^\top q_n^a\Bigr]_a, \quad
        \lambda^c = \sum_m \operatorname{softmax}_m(k_m)\, v_m^\top, \quad \lambda^p_n = \sum_m e_{m-n}\, v_m^\top

    Keys and values are shared by the heads :math:`a`; queries and values are batch-normalised. The matrices are
    :math:`\kappa \times c / \text{heads}`, and no weight of one position for another is made, unless the map is so
    small that these are fewer numbers. ``attend`` makes the weights :math:`q_n^{a\top} (\operatorname{softmax}_m(k_m) +
    e_{m-n})` that the matrices amount to. They may be negative and their sum is not one. As one value goes with each
    key, the paper's intra-depth is 1. No layer has a bias; with one on :math:`e`, as in timm, it would not be a
    weighted sum any more.

    Args:
        channels: Channels of the feature map.
        size: Height and width of the feature map, where ``scope`` is None.
        out_channels: Channels :math:`c` of the result; None: as many as ``channels``.
        stride: Positions of the map for one of the result, along each axis; their mean is taken.
        heads: How many heads share the channels.
        width: Features :math:`\kappa` of a query and of a key.
        scope: Rows and columns around a position that :math:`e` reaches; None: the whole map.

    Raises:
        ValueError: If ``heads`` does not divide the channels of the result, ``scope`` is even, ``width`` or ``stride``
            is not positive, or the scope is the whole map and ``size`` is missing or a map is of another; in training,
            if the batch is one position.

    Example:
        >>> LambdaAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2102.08602"
    place = "convolutions"
    replaces = "convolution"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        size: tuple[int, int] | None = None,
        out_channels: int | None = None,
        stride: int = 1,
        heads: int = 4,
        width: int = 16,
        scope: int | None = 23,
    ):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if heads < 1 or out_channels % heads:
            raise ValueError(f"heads must divide out_channels={out_channels}, got {heads}")
        for name, number in (("width", width), ("stride", stride)):
            if number < 1:
                raise ValueError(f"{name} must be positive, got {number}")
        if scope is not None and (scope < 1 or scope % 2 == 0):
            raise ValueError(f"scope must be odd and positive or None, got {scope}")
        if scope is None and size is None:
            raise ValueError("size must be the (height, width) of the feature map, got None")
        self.heads, self.scope, self.stride = heads, scope, stride
        self.size = size if scope is None else None
        self.query = nn.Conv2d(channels, heads * width, 1, bias=False)
        self.key = nn.Conv2d(channels, width, 1, bias=False)
        self.value = nn.Conv2d(channels, out_channels // heads, 1, bias=False)
        self.query_norm = nn.BatchNorm2d(heads * width)
        self.value_norm = nn.BatchNorm2d(out_channels // heads)
        reach = (scope, scope) if scope else tuple(2 * n - 1 for n in size or ())
        self.positions = nn.Parameter(torch.empty(width, *reach))
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=channels**-0.5)
        nn.init.normal_(self.positions, std=width**-0.5 if scope else 0.02)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        query, around = self._query(x), self._around(x)
        return torch.einsum("bnak,bkm->banm", query, self._keys(x)) + torch.einsum("bnak,nkm->banm", query, around)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b o h2 w2"]:
        return self._write(x, torch.einsum("banm,bmv->bnav", weights, self._value(x).movedim(1, -1).flatten(1, 2)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        n, width, eager = x.shape[2] * x.shape[3], self.key.out_channels, not torch.compiler.is_compiling()
        if eager and self.heads * n <= width * self.value.out_channels:  # as measured: weights are no more numbers
            return super().forward(x)
        query, value = self._query(x), self._value(x)
        tokens = value.movedim(1, -1).flatten(1, 2)
        content = self._keys(x) @ tokens
        if self.scope is None or (eager and self._few(n, value)):
            around = self._around(x)
            position = (around.flatten(0, 1) @ tokens).unflatten(1, around.shape[:2])
        else:
            maps = F.conv2d(value.flatten(0, 1)[:, None], self.positions[:, None], padding=self.scope // 2)
            position = maps.unflatten(0, value.shape[:2]).flatten(3).permute(0, 3, 2, 1)
        return self._write(x, query @ (content[:, None] + position))

    def _query(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n heads k"]:
        if self.size and x.shape[2:] != self.size:
            raise ValueError(f"size must be {self.size} as constructed, got {tuple(x.shape[2:])}")
        # not flatten(2).mT: at batch 1 the CPU's batch norm misreads the strides of the gradient that comes back
        return self.query_norm(self.query(x)).movedim(1, -1).flatten(1, 2).unflatten(2, (self.heads, -1))

    def _keys(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k m"]:
        logits = self.key(x).flatten(2)
        return softmax(logits, 2).to(logits.dtype)

    def _value(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b v h w"]:
        return self.value_norm(self.value(x))

    def _few(self, n: int, value: Float[Tensor, "b v h w"]) -> bool:
        """Is one product over all positions faster than a convolution, whose gradient is slow? As measured."""
        assert self.scope
        maps = value.shape[0] * value.shape[1]
        return n * (maps + 64) * (1 if value.requires_grad else 4) <= 2 * self.scope**2 * maps

    def _around(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "n k m"]:
        """The vectors of the distances from every position to every other, zero beyond the scope."""
        h, w = x.shape[2:]
        down, across = (n - 1 - side // 2 for n, side in zip((h, w), self.positions.shape[1:], strict=True))
        table = F.pad(self.positions, (across, across, down, down))  # where negative, cut
        return table.unfold(1, h, 1).unfold(2, w, 1).flip(1, 2).permute(1, 2, 0, 3, 4).reshape(h * w, -1, h * w)

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b n heads v"]) -> Float[Tensor, "b o h2 w2"]:
        y = y.flatten(2).unflatten(1, x.shape[2:]).movedim(-1, 1).to(x.dtype)
        return y if self.stride == 1 else F.avg_pool2d(y, self.stride, ceil_mode=True)
