"""Self-attention in place of a convolution: blocks of queries read windows around them, and know distances."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import positions_first, scaled_dot_product, softmax
from visattn.attention.pairwise.positions import both
from visattn.attention.pairwise.sparse import Groups, cross, gather, product, scatter


def around(length: int, block: int, halo: int, device: torch.device) -> Groups:
    """Return the groups of a line in which a block of queries reads itself and ``halo`` more on each side.

    Keys may lie beyond the line. All are reached.
    """
    at, starts = torch.arange(length, device=device), torch.arange(0, length, block, device=device)
    queries = (starts[:, None] + torch.arange(block, device=device)).clamp(max=length - 1)
    keys = starts[:, None] - halo + torch.arange(block + 2 * halo, device=device)
    return Groups(queries, keys, torch.ones(1, 1, 1, dtype=torch.bool, device=device), at)


def spread(weights: Float[Tensor, "g z t m"], groups: Groups) -> Float[Tensor, "z n n"]:
    """Return weights in groups as a matrix of all pairs; what falls on keys beyond the map is left out."""
    rows = scatter(weights, groups)
    n, z, _ = rows.shape
    keys = groups.keys[groups.back // groups.queries.shape[1]]
    dense = rows.new_zeros(n, z, n + 1).scatter(2, keys[:, None].expand_as(rows), rows)
    return dense[:, :, :n].transpose(0, 1)


class _WindowedSelfAttention(Attention):
    """Multi-head self-attention of blocks to windows, with three bias-free projections and none at the end."""

    place = "convolutions"
    replaces = "convolution"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None,
        stride: int,
        heads: int,
        halo: int,
        border: Literal["zero", "mask"],
    ):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if heads < 1 or out_channels % heads:
            raise ValueError(f"heads must divide out_channels={out_channels}, got {heads}")
        if stride < 1:
            raise ValueError(f"stride must be positive, got {stride}")
        if border not in ("zero", "mask"):
            raise ValueError(f"border must be zero or mask, got {border!r}")
        self.stride, self.heads, self.halo, self.border = stride, heads, halo, border
        self.scale = 1.0
        self.query = nn.Linear(channels, out_channels, bias=False)
        self.key = nn.Linear(channels, out_channels, bias=False)
        self.value = nn.Linear(channels, out_channels, bias=False)
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=channels**-0.5)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        tokens, (rows, columns, groups) = self._tokens(x), self._groups(x)
        query = gather(self._split(self.query(tokens[:-1])), groups.queries)
        key = gather(self._split(self.key(tokens)), groups.keys)
        weights = self._weights(query, key, self._bias(query, rows, columns))
        return spread(weights, groups).unflatten(0, (-1, self.heads))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b d h2 w2"]:
        value = self._split(self.value(self._tokens(x)[:-1])).transpose(0, 1)
        return self._write(x, (weights.flatten(0, 1) @ value).transpose(0, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        tokens, (rows, columns, groups) = self._tokens(x), self._groups(x)
        query = gather(self._split(self.query(tokens[:-1])), groups.queries)
        key, value = (gather(self._split(layer(tokens)), groups.keys) for layer in (self.key, self.value))
        bias = self._bias(query, rows, columns).to(query.dtype)
        if bias.requires_grad and x.device.type == "cpu":  # for which its kernel has no gradient
            y = self._weights(query, key, bias) @ value
        else:
            y = scaled_dot_product(query, key, value, mask=bias, scale=self.scale)
        return self._write(x, scatter(y, groups))

    def _weights(
        self, query: Float[Tensor, "g z t d"], key: Float[Tensor, "g z m d"], bias: Float[Tensor, "g z t m"]
    ) -> Float[Tensor, "g z t m"]:
        logits = torch.baddbmm(bias.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).mT, alpha=self.scale)
        return softmax(logits).to(logits.dtype).unflatten(0, query.shape[:2])

    def _tokens(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "n_1 b c"]:
        """Positions first, and after the last one the zeros that stand beyond the map."""
        return F.pad(positions_first(x), (0, 0, 0, 0, 0, 1))

    def _split(self, tokens: Float[Tensor, "n b c"]) -> Float[Tensor, "n z d"]:
        return tokens.unflatten(2, (self.heads, -1)).flatten(1, 2)

    def _block(self, length: int) -> int:
        """How many queries of a line make a block."""
        raise NotImplementedError

    def _reached(self, line: Groups) -> Bool[Tensor, "g #t m"]:
        """Which rows, or columns, of the windows the queries of a block reach."""
        raise NotImplementedError

    def _parts(
        self, query: Float[Tensor, "g z y x d"]
    ) -> tuple[Float[Tensor, "g z y x kh"], Float[Tensor, "g z y x kw"]]:
        """What distances between rows, and between columns, add to the logits."""
        raise NotImplementedError

    def _groups(self, x: Float[Tensor, "b c h w"]) -> tuple[Groups, Groups, Groups]:
        """The groups of rows, of columns and of both, where a key beyond the map is the position after the last."""
        height, width = x.shape[2:]
        rows, columns = (around(side, self._block(side), self.halo, x.device) for side in (height, width))
        groups = product(rows, columns)
        beyond = cross((rows.keys < 0) | (rows.keys >= height), (columns.keys < 0) | (columns.keys >= width))
        return rows, columns, groups._replace(keys=groups.keys.masked_fill(beyond, height * width))

    def _bias(self, query: Float[Tensor, "g z t d"], rows: Groups, columns: Groups) -> Float[Tensor, "g z t m"]:
        """What distances add to the logits; minus infinity where a key is not reached."""
        down, across = self._parts(query.unflatten(2, (rows.queries.shape[1], columns.queries.shape[1])))
        count = rows.keys.shape[0], columns.keys.shape[0]
        row = self._reached(rows)[:, None].expand(*count, -1, -1).flatten(0, 1)
        column = self._reached(columns)[None].expand(*count, -1, -1).flatten(0, 1)
        down = down.masked_fill(~row[:, None, :, None], -torch.inf)
        return both(down, across.masked_fill(~column[:, None, None], -torch.inf))

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "n z e"]) -> Float[Tensor, "b d h2 w2"]:
        y = y.unflatten(1, (-1, self.heads)).flatten(2).permute(1, 2, 0).unflatten(2, x.shape[2:]).to(x.dtype)
        return y.contiguous() if self.stride == 1 else F.avg_pool2d(y, self.stride, ceil_mode=True)
