"""Where things are, told to attention that would not know: absolute, relative and rotary positions."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import SMALL
from visattn.attention.pairwise.core import Softmax, read


def sinusoid(
    positions: Float[Tensor, "n"],
    features: int,
    *,
    layout: Literal["interleaved", "concatenated", "tensor2tensor"] = "interleaved",
    temperature: float = 10_000.0,
) -> Float[Tensor, "n d"]:
    r"""Sines and cosines of positions :math:`p` on a line, at angles :math:`p\,\tau^{-2i/d}`.

    Args:
        positions: Positions :math:`p`, whole numbers or not.
        features: Features :math:`d` of a position.
        layout: ``"interleaved"`` as in the paper of the transformer (arXiv:1706.03762): sine, cosine, sine, cosine.
            ``"concatenated"``: all sines, then all cosines. ``"tensor2tensor"``: the same order, as in the released
            code, where the last angle is :math:`p / \tau` and the steps between are wider for it.
        temperature: The longest wavelength :math:`\tau`, over :math:`2\pi`.

    Raises:
        ValueError: If ``features`` is odd or ``layout`` is unknown.
    """
    if features % 2:
        raise ValueError(f"features must be even, got {features}")
    if layout not in ("interleaved", "concatenated", "tensor2tensor"):
        raise ValueError(f"layout must be interleaved, concatenated or tensor2tensor, got {layout!r}")
    half = features // 2
    steps = max(half - 1, 1) if layout == "tensor2tensor" else half
    order = torch.arange(half, device=positions.device, dtype=positions.dtype)
    angle = positions[:, None] * temperature ** (order / -steps)
    pair = angle.sin(), angle.cos()
    return torch.stack(pair, -1).flatten(1) if layout == "interleaved" else torch.cat(pair, 1)


def sinusoid_2d(
    height: int,
    width: int,
    channels: int,
    *,
    layout: Literal["interleaved", "timm", "mae", "detr"] = "interleaved",
    temperature: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "c h w"]:
    r"""Sines and cosines of rows and columns, half of the channels each. Trained weights want their own layout.

    ================ ================================================ ==========================================
    ``layout``       order of the channels                            positions
    ================ ================================================ ==========================================
    interleaved      sine, cosine, … of the row, then of the column   0, 1, 2, …
    timm             sines of row, of column, cosines of row, column  0, 1, 2, …
    mae              sines of column, cosines of it, both of row      0, 1, 2, …
    detr             as interleaved                                   1, 2, 3, … over the last, times :math:`2\pi`
    ================ ================================================ ==========================================

    Args:
        height: Rows of the map.
        width: Columns of the map.
        channels: Channels :math:`c` of the map.
        layout: One of the above.
        temperature: As in :func:`sinusoid`.
        dtype: Type of the result.
        device: Where it is made.

    Raises:
        ValueError: If ``channels`` is not divisible by 4 or ``layout`` is unknown.
    """
    if channels % 4:
        raise ValueError(f"channels must be divisible by 4, got {channels}")
    if layout not in ("interleaved", "timm", "mae", "detr"):
        raise ValueError(f"layout must be interleaved, timm, mae or detr, got {layout!r}")
    exact = torch.promote_types(dtype, torch.float32)
    rows, columns = (torch.arange(n, dtype=exact, device=device) for n in (height, width))
    if layout == "detr":
        rows, columns = (2 * math.pi / (n + 1e-6) * (p + 1) for n, p in ((height, rows), (width, columns)))
    inner: Literal["concatenated", "interleaved"] = "concatenated" if layout in ("timm", "mae") else "interleaved"
    y, x = (sinusoid(p, channels // 2, layout=inner, temperature=temperature) for p in (rows, columns))
    y, x = y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)
    if layout == "timm":
        parts = [half for both in zip(y.chunk(2, 2), x.chunk(2, 2), strict=True) for half in both]
    else:
        parts = [x, y] if layout == "mae" else [y, x]
    return torch.cat(parts, 2).permute(2, 0, 1).to(dtype)


class LearnedPositions(nn.Module):
    """One learned vector for every position of a map; other sizes get it resized, bicubically and without aliases.

    Args:
        channels: Channels of the map.
        size: Height and width of the map.
    """

    def __init__(self, channels: int, size: tuple[int, int]):
        super().__init__()
        self.table = nn.Parameter(torch.empty(channels, *size))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        if not torch.compiler.is_compiling() and (height, width) == self.table.shape[1:]:
            return self.table  # a compiled graph is the same for all sizes
        exact = self.table.to(torch.promote_types(self.table.dtype, torch.float32))[None]
        resized = F.interpolate(exact, (height, width), mode="bicubic", align_corners=False, antialias=True)
        return resized[0].to(self.table.dtype)


def near(table: Float[Tensor, "t d"], queries: int) -> Float[Tensor, "n d m"]:
    r"""The vectors of the distances from every query on a line to every key on it.

    A table of :math:`2m - 1` holds the distances from :math:`1 - m` to :math:`m - 1`, key minus query, so query
    :math:`i` and key :math:`j` of :math:`m` meet at entry :math:`j - i + m - 1`. There may be fewer queries than keys;
    both count from 0.

    Raises:
        ValueError: If there are more queries than keys.
    """
    keys = (table.shape[0] + 1) // 2
    if queries > keys:
        raise ValueError(f"queries must be at most as many as the {keys} keys of the table on a line, got {queries}")
    return table.unfold(0, keys, 1)[keys - queries :].flip(0)


def relative_logits(
    query: Float[Tensor, "*batch h w d"], rows: Float[Tensor, "th d"], columns: Float[Tensor, "tw d"]
) -> tuple[Float[Tensor, "*batch h w kh"], Float[Tensor, "*batch h w kw"]]:
    r"""What relative positions add to the logits, :math:`q^\top (r^h_{\Delta y} + r^w_{\Delta x})`, in its two parts.

    The logit of query :math:`(y, x)` and key :math:`(y', x')` gets ``down[…, y, x, y'] + across[…, y, x, x']``;
    :func:`both` is their sum for all pairs.

    Args:
        query: Queries on a grid, with anything before it (samples, heads, windows).
        rows: Vectors of the distances between rows as :func:`near` wants them: :math:`2 k_h - 1` for keys in
            :math:`k_h` rows.
        columns: The same between columns.

    Returns:
        ``down`` and ``across``.

    Raises:
        ValueError: If there are more rows or columns of queries than of keys.
    """
    height, width = query.shape[-3:-1]
    down = torch.einsum("...yxd,ydk->...yxk", query, near(rows, height))
    return down, torch.einsum("...yxd,xdk->...yxk", query, near(columns, width))


def both(down: Float[Tensor, "*batch h w kh"], across: Float[Tensor, "*batch h w kw"]) -> Float[Tensor, "*batch n m"]:
    """The sum of the parts of :func:`relative_logits` for all pairs: ``h·w`` queries, ``kh·kw`` keys, row by row."""
    return (down[..., :, None] + across[..., None, :]).flatten(-2).flatten(-3, -2)


def widen(
    query: Float[Tensor, "*batch n d"],
    key: Float[Tensor, "*batch m d"],
    down: Float[Tensor, "*batch h w kh"],
    across: Float[Tensor, "*batch h w kw"],
) -> tuple[Float[Tensor, "*batch n e"], Float[Tensor, "*batch m e"]]:
    """Queries and keys whose products are those of ``query`` and ``key`` plus :func:`both`, without that matrix.

    The parts are more features of a query; where a key is, a one in its row and in its column, are more of a key.
    """
    kh, kw = down.shape[-1], across.shape[-1]
    row = torch.eye(kh, dtype=key.dtype, device=key.device).repeat_interleave(kw, 0)
    column = torch.eye(kw, dtype=key.dtype, device=key.device).repeat(kh, 1)
    place = torch.cat((row, column), 1).expand(*key.shape[:-2], -1, -1)
    parts = (part.flatten(-3, -2).to(query.dtype) for part in (down, across))
    return torch.cat((query, *parts), -1), torch.cat((key, place), -1)


class RelativeSoftmax(Softmax):
    r"""Weights :math:`\operatorname{softmax}_j(s\, q_i^\top k_j + s'\, q_i^\top (r^h_{\Delta y} + r^w_{\Delta x}))`.

    Args:
        features: Features :math:`d` of a query; the factor :math:`s` is :math:`1 / \sqrt d`.
        size: Rows and columns of the map.
        scale_positions: Whether :math:`s' = s`; else it is one.
        causal: Whether a query reads the keys up to its own place only.
    """

    def __init__(self, features: int, size: tuple[int, int], *, scale_positions: bool = True, causal: bool = False):
        super().__init__(features**-0.5, causal=causal)
        self.size, self.scale_positions = size, scale_positions
        self.rows, self.columns = (nn.Parameter(torch.empty(2 * side - 1, features)) for side in size)
        self.widened = Softmax(causal=causal)
        for table in (self.rows, self.columns):
            nn.init.normal_(table, std=self.scale)

    def logits(self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b n d"]) -> Float[Tensor, "b n n"]:
        scaled, parts = self._parts(query)
        return torch.baddbmm(both(*parts), scaled, key.mT)

    def read(
        self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b n d"], value: Float[Tensor, "b n e"]
    ) -> Float[Tensor, "b n e"]:
        """Equal ``weights(query, key) @ value``, without the matrix where it is large or the device is no CPU."""
        cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
        if cpu and query.shape[0] * query.shape[1] ** 2 <= SMALL:
            return read(value, self.weights(query, key))
        scaled, parts = self._parts(query)
        return self.widened.read(*widen(scaled, key, *parts), value)

    def _parts(
        self, query: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b n d"], tuple[Float[Tensor, "b h w h"], Float[Tensor, "b h w w"]]]:
        scaled = query * self.scale
        seen = (scaled if self.scale_positions else query).unflatten(1, self.size)
        return scaled, relative_logits(seen, self.rows.to(query.dtype), self.columns.to(query.dtype))


def rotate(x: Float[Tensor, "*batch h w d"], *, temperature: float = 100.0) -> Float[Tensor, "*batch h w d"]:
    r"""Turn pairs of features by their position: the first half by the row, the second by the column.

    Pair :math:`i` of a half turns by :math:`p\,\tau^{-4i/d}`. So the product of a query and a key, both turned,
    depends on their distance alone (rotary positions, arXiv:2104.09864, along two axes as in arXiv:2403.13298).

    Args:
        x: Queries or keys on a grid.
        temperature: The longest wavelength :math:`\tau`, over :math:`2\pi`.

    Raises:
        ValueError: If the features are not divisible by 4.
    """
    height, width, features = x.shape[-3:]
    if features % 4:
        raise ValueError(f"features must be divisible by 4, got {features}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    order = torch.arange(features // 4, dtype=dtype, device=x.device)
    rows, columns = (
        torch.arange(n, dtype=dtype, device=x.device)[:, None] * temperature ** (order * -4 / features)
        for n in (height, width)
    )
    angle = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), 2)
    a, b = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
