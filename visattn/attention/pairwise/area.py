"""Li, Kaiser, Bengio, Si: Area Attention (ICML 2019)."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import uncast, wide
from visattn.attention.pairwise import core
from visattn.attention.pairwise.core import Softmax, read


def area_sums(x: Float[Tensor, "*b h w"], area: tuple[int, int]) -> Float[Tensor, "*b areas"]:
    """Sum every rectangle of a grid up to a height and a width: ordered by height, by width, then row by row.

    A rectangle is the one shorter by a row, or narrower by a column, plus what is new. That is one addition each, where
    an integral image takes three and loses digits by differences of large numbers.

    Example:
        >>> area_sums(torch.tensor([[1.0, 2.0, 4.0]]), (1, 2))
        tensor([1., 2., 4., 3., 6.])
    """
    height, width = _largest(x.shape[-2:], area)
    sums = [columns.flatten(-2) for rows in _windows(wide(x).mT, height) for columns in _windows(rows.mT, width)]
    return torch.cat(sums, -1).to(x.dtype)


def area_cover(x: Float[Tensor, "*b areas"], grid: Sequence[int], area: tuple[int, int]) -> Float[Tensor, "*b h w"]:
    """Sum at every position what the rectangles that contain it hold: the transpose of :func:`area_sums`.

    Example:
        >>> area_cover(torch.tensor([0.0, 0.0, 0.0, 5.0, 1.0]), (1, 3), (1, 2))
        tensor([[5., 6., 1.]])
    """
    shapes = _shapes(grid, area)
    parts = wide(x).split([rows * columns for rows, columns in shapes], -1)
    parts = [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]
    width = _largest(grid, area)[1]
    rows = [_cover(parts[first : first + width]).mT for first in range(0, len(parts), width)]
    return _cover(rows).mT.to(x.dtype)


def _largest(grid: Sequence[int], area: tuple[int, int]) -> list[int]:
    """The largest height and width of a rectangle that fit."""
    return [sum(side <= there for side in range(1, most + 1)) for there, most in zip(grid, area, strict=True)]


def _shapes(grid: Sequence[int], area: tuple[int, int]) -> list[tuple[int, int]]:
    """In how many rows and columns of the grid a rectangle of each size can begin."""
    height, width = _largest(grid, area)
    return [(grid[0] - rows, grid[1] - columns) for rows in range(height) for columns in range(width)]


def _windows(x: Float[Tensor, "*b n"], longest: int) -> list[Tensor]:
    """Sums of one, two, … neighbours along the last axis."""
    sums = [x]
    for length in range(1, longest):
        sums.append(sums[-1][..., :-1] + x[..., length:])
    return sums


def _cover(sums: list[Tensor]) -> Float[Tensor, "*b n"]:
    """The transpose of :func:`_windows`."""
    begin, last = sums[-1], len(sums) - 1
    total = F.pad(begin, (last, 0))
    for length in reversed(range(last)):
        begin = sums[length] + F.pad(begin, (0, 1))
        total = total + F.pad(begin, (length, 0))
    return total


class Areas(nn.Module):
    r"""Let queries read from all rectangles of a memory that lies on a grid.

    .. math:: y_i = \sum_a \operatorname{softmax}_a(q_i^\top k_a / \sqrt d)\, \sum_{j \in a} v_j

    The key :math:`k_a` of a rectangle is the mean :math:`\mu` of the keys in it, or
    :math:`W_2\, \mathrm{ReLU}(W_1 [\mu; \sigma; e])` with their standard deviation :math:`\sigma` and a learned
    :math:`e` for its height and width. A memory of one axis is a grid of height 1. Several heads are counted with the
    batch.

    Args:
        width: Features :math:`d` of queries and of keys.
        area: Largest height and width of a rectangle.
        key: What the key of a rectangle is made of: the ``"mean"`` of its keys, or all three ``"features"``.
    """

    def __init__(self, width: int, *, area: tuple[int, int] = (3, 3), key: Literal["mean", "features"] = "mean"):
        super().__init__()
        if min(area) < 1:
            raise ValueError(f"area must be a positive height and width, got {area}")
        if key not in ("mean", "features"):
            raise ValueError(f"key must be mean or features, got {key!r}")
        self.area = area
        self.affinity = Softmax(width**-0.5)
        self.hidden = nn.Linear(2 * width + width // 2 * 2, width) if key == "features" else None
        if self.hidden is not None:
            self.heights = nn.Parameter(torch.randn(area[0], width // 2))
            self.widths = nn.Parameter(torch.randn(area[1], width // 2))
            self.out = nn.Linear(width, width)

    def extra_repr(self) -> str:
        return f"area={self.area}"

    def keys(
        self, key: Float[Tensor, "b l d"], grid: Sequence[int], mask: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """What queries are compared with, made once for a memory: its keys if a mean is enough, else those of areas.

        Where the mask is False there is nothing to read, nor to count.
        """
        if mask is not None:
            key = key.masked_fill(~mask[..., None], 0.0)
        if self.hidden is None:
            return key
        count = self.count(grid, key, mask).clamp_min(1)[..., None]
        mean = self._sums(wide(key), grid) / count
        deviation = ((self._sums(wide(key).square(), grid) / count - mean.square()).abs() + 1e-6).sqrt()
        items, sizes = self.hidden.weight.tensor_split((2 * key.shape[2],), 1)
        height, width = _largest(grid, self.area)
        size = self.heights[:height, None].expand(-1, width, -1), self.widths[:width].expand(height, -1, -1)
        terms = F.linear(torch.cat(size, 2).flatten(0, 1), sizes, self.hidden.bias)  # one for all areas of a size
        term = torch.cat([each.expand(h * w, -1) for each, (h, w) in zip(terms, _shapes(grid, self.area), strict=True)])
        return self.out((F.linear(torch.cat((mean, deviation), 2).to(key.dtype), items) + term).relu())

    def count(
        self, grid: Sequence[int], like: Tensor, mask: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "*b areas"]:
        """How many positions each area has, of those where the mask is True."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        there = torch.ones(grid, dtype=dtype, device=like.device) if mask is None else mask.unflatten(1, grid).to(dtype)
        return area_sums(there, self.area)

    def weights(
        self, query: Float[Tensor, "b n d"], keys: Float[Tensor, "b m d"], grid: Sequence[int]
    ) -> Float[Tensor, "b n areas"]:
        """How much each query reads from each area, in the order of :func:`area_sums`; a query's weights sum to one."""
        return self.scores(query, keys, grid).softmax(2).to(query.dtype)

    def scores(
        self,
        query: Float[Tensor, "b n d"],
        keys: Float[Tensor, "b m d"],
        grid: Sequence[int],
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b n areas"]:
        """The logits of :meth:`weights`, in at least float32; of keys that were made with this mask."""
        with uncast(query.device):
            logits = self.affinity.logits(wide(query), wide(keys))
        if self.hidden is not None:
            return logits
        count = self.count(grid, query, mask).clamp_min(1)  # the product with a mean is the mean of products
        return area_sums(logits.unflatten(2, grid), self.area) / (count if mask is None else count[:, None])

    def dense(self, weights: Float[Tensor, "b n areas"], grid: Sequence[int]) -> Float[Tensor, "b n l"]:
        """What is read from each position: the sum over the areas that contain it. It sums to the mean area read."""
        return area_cover(weights, grid, self.area).flatten(2)

    def to_positions(self, weights: Float[Tensor, "b n areas"], grid: Sequence[int]) -> Float[Tensor, "b n l"]:
        """Where a query looks, for drawing: each area shares its weight among its positions, and all sum to one."""
        return self.dense((weights / self.count(grid, weights)).to(weights.dtype), grid)

    def read(
        self,
        query: Float[Tensor, "b n d"],
        keys: Float[Tensor, "b m d"],
        value: Float[Tensor, "b l e"],
        grid: Sequence[int],
    ) -> Float[Tensor, "b n e"]:
        """Equal ``dense(weights(query, keys, grid), grid) @ value``, from the sums of areas where that is faster.

        With features many and queries few, products with positions are summed instead of their features.
        """
        n, width = query.shape[1], query.shape[2] + value.shape[2]
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            areas = sum(h * w for h, w in _shapes(grid, self.area))
            if width * (n + 50) > 190 * n and query.shape[0] * n * areas <= core.SMALL:  # as measured
                return read(value, self.dense(self.weights(query, keys, grid), grid))
        if self.hidden is None:
            keys = (self._sums(keys, grid) / self.count(grid, keys)[:, None]).to(keys.dtype)
        return self.affinity.read(query, keys, self._sums(value, grid))

    def _sums(self, x: Float[Tensor, "b l d"], grid: Sequence[int]) -> Float[Tensor, "b areas d"]:
        return area_sums(x.mT.unflatten(2, grid), self.area).mT


class AreaAttention(Attention):
    r"""Let every position of a feature map read from all rectangles of it up to some size.

    .. math:: y_i = x_i + W_o \Big[\sum_a \operatorname{softmax}_a\bigl(q_i^\top k_a / \sqrt d\bigr)
        \sum_{j \in a} v_j\Big]_\text{heads}

    Keys of rectangles are as in :class:`Areas`, which does the same for any memory on a grid; the projections have no
    bias. The weights say what is read from each position: the sum over the rectangles that contain it. So their rows do
    not sum to one but to the mean number of positions in what is read.

    Args:
        channels: Channels of the feature map.
        heads: Into how many parts the features are split.
        area: Largest height and width of a rectangle, in pixels of the map.
        key: What the key of a rectangle is made of: the ``"mean"`` of the keys in it, or ``"features"``, a perceptron
            on their mean, their standard deviation and its size.

    Raises:
        ValueError: If ``heads`` does not divide ``channels``, ``area`` is not positive, or ``key`` is unknown.

    Example:
        >>> AreaAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1810.10126"
    place = "head"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 8,
        area: tuple[int, int] = (3, 3),
        key: Literal["mean", "features"] = "mean",
    ):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels={channels}, got {heads}")
        self.heads = heads
        self.query = nn.Conv1d(channels, channels, 1, bias=False)
        self.key = nn.Conv1d(channels, channels, 1, bias=False)
        self.value = nn.Conv1d(channels, channels, 1, bias=False)
        self.areas = Areas(channels // heads, area=area, key=key)
        self.out = nn.Conv1d(channels, channels, 1, bias=False)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        grid = x.shape[2:]
        weights = self.areas.weights(self._split(x, self.query), self.areas.keys(self._split(x, self.key), grid), grid)
        return self.areas.dense(weights, grid).unflatten(0, (-1, self.heads))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b c h w"]:
        return self._write(x, read(self._split(x, self.value), weights.flatten(0, 1)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        query, key, value = (self._split(x, project) for project in (self.query, self.key, self.value))
        return self._write(x, self.areas.read(query, self.areas.keys(key, x.shape[2:]), value, x.shape[2:]))

    def _split(self, x: Float[Tensor, "b c h w"], project: nn.Module) -> Float[Tensor, "heads n d"]:
        return project(x.flatten(2)).unflatten(1, (self.heads, -1)).flatten(0, 1).mT

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "heads n d"]) -> Float[Tensor, "b c h w"]:
        return x + self.out(y.mT.reshape(x.shape[0], -1, y.shape[1])).view(x.shape).to(x.dtype)
