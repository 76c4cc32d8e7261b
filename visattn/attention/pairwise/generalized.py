"""Zhu, Cheng, Zhang, Lin, Dai: An Empirical Study of Spatial Attention Mechanisms in Deep Networks (ICCV 2019)."""

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.pairwise.core import Softmax, read

FAR = -3e4
"""Energy of a key out of range on one side of the map: nothing after a softmax, and still a number in float16."""


class Side(nn.Module):
    r"""Energies of the distance from a query to a key, along one side of a map.

    Args:
        axis: 0 for the height, 1 for the width.
        positions: Features of a distance, half sines and half cosines; 0: distances have no energy.
        width: Features of a query, over all heads.
        query_stride: Distance between queries.
        key_stride: Distance between keys.
        spatial_range: Largest distance from a query to a key; None: any.
    """

    def __init__(
        self, axis: int, positions: int, width: int, query_stride: int, key_stride: int, spatial_range: int | None
    ):
        super().__init__()
        self.axis = axis
        self.query_stride = query_stride
        self.key_stride = key_stride
        self.spatial_range = spatial_range
        self.project = nn.Linear(positions, width, bias=False) if positions else None

    def energies(
        self, asked: Float[Tensor, "#b heads #q #p d"], grid: Sequence[int], keys: int
    ) -> Float[Tensor, "#b heads n k"]:
        queries = grid[self.axis]
        at = torch.arange(queries, device=asked.device)[:, None] * self.query_stride
        distance = (torch.arange(keys, device=asked.device) * self.key_stride - at).unsqueeze(1 - self.axis)
        energy = asked
        if self.project is not None:  # each distance once
            least, step = (1 - queries) * self.query_stride, math.gcd(self.query_stride, self.key_stride)
            distances = torch.arange(least, (keys - 1) * self.key_stride + 1, step, device=asked.device)
            features = self.project(self._waves(distances))[(distance - least) // step]
            energy = torch.einsum("baqpd,qpkad->baqpk", asked, features.unflatten(3, (asked.shape[1], -1)))
        energy = energy.expand(-1, -1, *grid, keys).flatten(2, 3)
        if self.spatial_range is not None:
            far = distance.abs() > self.spatial_range
            energy = energy.masked_fill(far.expand(*grid, keys).flatten(0, 1), FAR)
        return energy

    def _waves(self, distances: Tensor) -> Float[Tensor, "k positions"]:
        weight = self.project.weight  # type: ignore[union-attr]
        dtype, count = torch.promote_types(weight.dtype, torch.float32), weight.shape[1] // 2
        lengths = 1000 ** (torch.arange(count, dtype=dtype, device=distances.device) / count)
        angles = distances[:, None] / lengths
        return (torch.cat((angles.sin(), angles.cos()), 1) / math.sqrt(2)).to(weight.dtype)


class GeneralizedAttention(Attention):
    r"""Let every position read from every other by four reasons: what is asked, what is there, how far, and where.

    .. math:: y_q = x_q + \gamma\, W \Big[\sum_k \operatorname{softmax}_k(E^1 + E^2 + E^3 + E^4)\, v_k\Big]_\text{heads}

    ======== ====================================== ===================
    term     what it compares                       energy
    ======== ====================================== ===================
    ``1...`` content of query and of key            :math:`z_q^\top c_k`
    ``.1..`` content of query and relative position :math:`z_q^\top p_{k-q}`
    ``..1.`` content of key alone: saliency         :math:`u^\top c_k`
    ``...1`` relative position alone: prior         :math:`v^\top p_{k-q}`
    ======== ====================================== ===================

    Query :math:`z`, key :math:`c` and value are projections of the map. The positions :math:`p` are
    :math:`(W_y R_y + W_x R_x) / \sqrt 2`, with the sines and cosines :math:`R` of the distance along each side of the
    map, at wavelengths from :math:`2\pi` up towards :math:`2000\pi` pixels. As in the released code, nothing is divided
    by :math:`\sqrt d` and only :math:`W` has a bias. That code measures from key to query, has nine heads and
    ``key_stride=2`` unless told otherwise, and mistakes rows for columns where the second term is without the fourth.

    Energies of positions are one for the row of a key plus one for its column. So they are features of a query, while
    features of a key say its row and column, and no matrix is made where it would be large. With ``terms="0010"`` all
    queries read the same, one softmax a head over the map and then vectors instead of maps; the weights then have one
    query, ``b heads 1 m``.

    Args:
        channels: Channels :math:`c` of the feature map.
        terms: Which of the four terms count: four digits, each 1 or 0.
        heads: Into how many parts the features are split; channels beyond a multiple of it are left out.
        query_stride: Distance in pixels between queries. What they read is then enlarged, bilinearly.
        key_stride: Distance in pixels between keys. Those between are left out, not averaged.
        spatial_range: How many pixels away, along each side, a key may be; None: anywhere.

    Raises:
        ValueError: If ``terms`` is not four digits of which one is 1, ``heads`` does not lie between 1 and
            ``channels``, a stride is not positive, ``spatial_range`` leaves a query without a key, or ``channels`` is
            no multiple of 4 where a term has positions.

    Example:
        >>> GeneralizedAttention(64, terms="0010")(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1904.05873"
    place = "stages[2:].inner"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        terms: str = "1111",
        heads: int = 8,
        query_stride: int = 1,
        key_stride: int = 1,
        spatial_range: int | None = None,
    ):
        super().__init__()
        if not re.fullmatch("(?!0000)[01]{4}", terms):
            raise ValueError(f"terms must be four digits 0 or 1 and not all 0, got {terms!r}")
        if not 1 <= heads <= channels:
            raise ValueError(f"heads must lie between 1 and channels={channels}, got {heads}")
        for name, stride in ("query_stride", query_stride), ("key_stride", key_stride):
            if stride < 1:
                raise ValueError(f"{name} must be positive, got {stride}")
        if spatial_range is not None and spatial_range < key_stride - 1:
            raise ValueError(
                f"spatial_range must be at least key_stride - 1 = {key_stride - 1}, or a query has no key, "
                f"got {spatial_range}"
            )
        content, relative, salient, prior = (digit == "1" for digit in terms)
        positions = channels // 2 if relative or prior else 0
        if positions and channels % 4:
            raise ValueError(f"channels must be a multiple of 4 for terms={terms!r}, got {channels}")
        self.terms = terms
        self.heads = heads
        self.query_stride = query_stride
        self.key_stride = key_stride
        self.same_for_all = terms == "0010" and spatial_range is None
        width, features = channels // heads * heads, channels // heads
        self.query = nn.Conv1d(channels, width, 1, bias=False) if content or relative else None
        self.key = nn.Conv1d(channels, width, 1, bias=False) if content or salient else None
        self.value = nn.Conv1d(channels, width, 1, bias=False)
        self.saliency = nn.Parameter(torch.empty(heads, features)) if salient else None
        self.prior = nn.Parameter(torch.empty(heads, features)) if prior else None
        placed = bool(positions) or spatial_range is not None
        self.rows, self.columns = (
            Side(axis, positions, width, query_stride, key_stride, spatial_range) if placed else None for axis in (0, 1)
        )
        self.affinity = Softmax()
        self.out = nn.Conv1d(width, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        for vectors in (self.saliency, self.prior):
            if vectors is not None:
                nn.init.uniform_(vectors, -((2 * features) ** -0.5), (2 * features) ** -0.5)

    def extra_repr(self) -> str:
        return f"terms={self.terms}"

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        query, key = self._compared(x)
        return self.affinity.weights(query.flatten(0, 1), key.flatten(0, 1)).unflatten(0, (-1, self.heads))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b c h w"]:
        if not self.same_for_all:
            return self._write(x, read(self._value(x).flatten(0, 1), weights.flatten(0, 1)))
        sums = torch.bmm(weights.squeeze(2), self._keys(x).flatten(2).mT)  # of the map, which are then projected
        project = self.value.weight.view(self.heads, -1, x.shape[1])
        return self._write(x, torch.einsum("bac,adc->bad", sums, project).flatten(0, 1)[:, None])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.same_for_all:
            return super().forward(x)
        query, key, value = (each.flatten(0, 1) for each in (*self._compared(x), self._value(x)))
        if torch.compiler.is_compiling():  # wider than a value, whatever the size of the map: one graph for all
            query, key = (F.pad(each, (0, value.shape[2])) for each in (query, key))
        return self._write(x, self.affinity.read(query, key, value))

    def _queries(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c q p"]:
        return x[:, :, :: self.query_stride, :: self.query_stride]

    def _keys(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c g v"]:
        return x[:, :, :: self.key_stride, :: self.key_stride]

    def _value(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads m d"]:
        return self.value(self._keys(x).flatten(2)).unflatten(1, (self.heads, -1)).mT

    def _compared(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b heads n f"], Float[Tensor, "b heads m f"]]:
        """Features of queries and of keys whose products are the energies."""
        queries, keys = self._queries(x), self._keys(x)
        batch, grid, key_grid = (x.shape[0], self.heads), queries.shape[2:], keys.shape[2:]
        asked: list[Tensor] = []  # what is asked of positions
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        if self.query is not None:
            query = self.query(queries.flatten(2)).unflatten(1, (self.heads, -1)).mT
            if self.terms[1] == "1":
                asked.append(query.unflatten(2, grid))
            if self.terms[0] == "1" and self.key is not None:
                ours.append(query if self.saliency is None else query + self.saliency[:, None])
                theirs.append(self.key(keys.flatten(2)).unflatten(1, (self.heads, -1)).mT)
        if self.saliency is not None and self.key is not None and self.terms[0] == "0":
            weight = self.saliency[:, None] @ self.key.weight.view(self.heads, -1, x.shape[1])
            ours.append(x.new_ones(1).expand(*batch, 1 if self.same_for_all else grid[0] * grid[1], 1))
            theirs.append(F.conv1d(keys.flatten(2), weight.mT)[..., None])
        if self.prior is not None:
            asked.append(self.prior[None, :, None, None])
        vectors = sum(asked[1:], asked[0]) if asked else x.new_zeros(1, self.heads, 1, 1, 1)
        for axis, side in enumerate((self.rows, self.columns)):
            if side is None:
                continue
            ours.append(side.energies(vectors, grid, key_grid[axis]).expand(*batch, -1, -1))
            which = torch.eye(key_grid[axis], dtype=x.dtype, device=x.device).unsqueeze(1 - axis)
            theirs.append(which.expand(*key_grid, -1).flatten(0, 1).expand(*batch, -1, -1))
        return torch.cat(ours, 3), torch.cat(theirs, 3)

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "heads n d"]) -> Float[Tensor, "b c h w"]:
        y = y.mT.reshape(x.shape[0], -1, y.shape[1])
        y = F.conv1d(y, self.gamma * self.out.weight, self.gamma * self.out.bias)  # type: ignore[operator]
        if self.same_for_all:
            return x + y[..., None].to(x.dtype)
        y = y.view(x.shape[0], -1, *self._queries(x).shape[2:]).to(x.dtype)
        return x + (y if self.query_stride == 1 else F.interpolate(y, x.shape[2:], mode="bilinear"))
