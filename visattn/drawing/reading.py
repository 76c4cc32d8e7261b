"""What recorded weights say about an image: bars over channels, heat over positions, a warp where they sample it.

The signature of a module of ours, which the name of the map tells, says what its weights are; else shapes decide. (1,
c, 1, 1) are channels; (1, 1, h, w) a map; (1, c, h, w) a map for each channel, of which the mean is shown; (1, n, m),
and (1, heads, n, m) whose rows sum to one or are no rows of a map, say what each of n queries reads from m keys, of
which one query is shown. (1, k, c, 1, 1) weigh k items: branches, kernels, experts or channels; (1, g, k, k, h, w)
are a kernel at each position, whose size is shown; (1, g, k, k, 2, h, w) are how far down and to the right each tap
of one moves, whose length is shown. (1, k, h, w, 2) are k grids, of where each point of an output comes from. Weights
over channels or items have no place in the image, and none is made up.
"""

import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from visattn import attention
from visattn.attention.sampling.grids import folded, identity, jacobian
from visattn.drawing.grid import Grid, grid_of, key_grid_of, same_stride, usual_grids
from visattn.drawing.overlay import constant

Query = tuple[int, int]
OF_CHANNELS = ("XCA", "CrossCovarianceAttn", "ChannelAttention", "ChannelAttentionV2")  # of timm: each reads all others


class Channels(NamedTuple):
    """A weight for each channel, or for each of a few items."""

    name: str
    note: str
    values: Float[ndarray, " c"]


class Heat(NamedTuple):
    """A weight for each position, and the position that asked for them: as row and column of pixels, where one did."""

    name: str
    note: str
    values: Float[ndarray, "h w"]
    query: tuple[float, float] | None


class Warp(NamedTuple):
    """Where each point of an output comes from, (x, y) with the outer edges of the image at -1 and 1, for each head."""

    name: str
    note: str
    grid: Float[ndarray, "k h w 2"]


def fields(maps: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of recorded maps by its name: a field of a tuple behind a dot."""
    for name, weights in maps.items():
        if isinstance(weights, Tensor):
            yield name, weights
        elif isinstance(weights, tuple):
            names = getattr(weights, "_fields", range(len(weights)))
            yield from fields({f"{name}.{field}": part for field, part in zip(names, weights, strict=True)})


def of_image(maps: Mapping[str, Any], index: int) -> dict[str, Tensor]:
    """Return the maps of one image of a batch.

    Example:
        >>> of_image({"layer1/SqueezeExcitation": torch.ones(4, 64, 1, 1)}, 2)["layer1/SqueezeExcitation"].shape
        torch.Size([1, 64, 1, 1])
    """
    return {name: weights[index : index + 1] for name, weights in fields(maps)}


def _read(name: str, weights: Tensor, image: Grid, query: Query, grid: Grid | None) -> Channels | Heat | Warp:
    shape = tuple(weights.shape)
    known = (
        weights.ndim in (3, 4)
        or (weights.ndim == 5 and (shape[3:] == (1, 1) or shape[4] == 2))
        or (weights.ndim == 6 and shape[2] == shape[3])
        or (weights.ndim == 7 and shape[2] == shape[3] and shape[4] == 2)
    )
    if not known or not weights.numel():
        raise ValueError(
            f"{name}: weights must be (1, c, 1, 1), (1, c, h, w), (1, n, m), (1, heads, n, m), (1, k, c, 1, 1), "
            f"(1, g, k, k, h, w), (1, g, k, k, 2, h, w) or (1, k, h, w, 2), got {shape}"
        )
    if shape[0] != 1:
        raise ValueError(
            f"{name}: weights must be of one image, got {shape[0]} images or windows; of_image(maps, index) chooses"
        )
    values = weights.detach().float().cpu()[0]
    if not values.isfinite().all():
        raise ValueError(f"{name}: weights must be finite, got NaN or infinity")
    if values.ndim == 3 and values.shape[1:] == (1, 1):
        return Channels(name, _note(values, f"{len(values)} channels, bars from their mean"), values.flatten().numpy())
    if values.ndim == 4 and shape[4] == 2:
        heads = f"{len(values)} heads" if len(values) > 1 else ""
        note = ", ".join(filter(None, (f"{shape[2]}×{shape[3]}", heads, effect(values))))
        return Warp(name, note, values.numpy())
    if values.ndim == 4:
        items, mean = f"{len(values)} weighed items, bars from their mean", values.mean((1, 2, 3))
        return Channels(name, _note(mean, items, _mean_of(values.shape[1], "channels")), mean.numpy())
    if values.ndim > 4:
        return _read_kernels(name, values, image)
    if _class_of(name)[0] in OF_CHANNELS:
        raise ValueError(f"{name}: weights are of pairs of channels, which have no place in the image")
    if values.ndim == 2 or (values.shape[-1] > 1 and _pairs(name, values, image)):
        try:
            return _read_query(name, values, image, query, grid)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return _read_map(name, values.mean(0), image, _mean_of(len(values), "channels"))


def effect(grids: Float[Tensor, "k h w 2"]) -> str:
    """Say what warps do: how much of them is folded over and lies outside of the image, and how far they magnify it.

    Example:
        >>> effect(identity((8, 8))), effect(0.5 * identity((8, 8)).flip(2)), effect(identity((8, 8)) + 0.3)
        ('nothing moves', 'mirrored, magnified 2×', '0% folded over, 23.4% outside')
    """
    if torch.allclose(grids, identity((grids.shape[1], grids.shape[2]), dtype=grids.dtype), rtol=0, atol=1e-5):
        return "nothing moves"
    share, outside = float(folded(grids).mean()), float((grids.abs() > 1).any(-1).double().mean())
    said = ["mirrored" if share == 1 else f"{100 * share:.3g}% folded over"]
    if outside:
        said.append(f"{100 * outside:.3g}% outside")
    areas = jacobian(grids).abs()
    magnified = f"{float(areas.median() ** -0.5):.3g}" if areas.numel() else "1"
    return ", ".join([*said, f"magnified {magnified}×"] if magnified != "1" else said)


def _class_of(name: str) -> tuple[str, list[str]]:
    """The class that weights of this name are of, and which of its weights they are, where it has several."""
    cls, *field = name.rpartition("/")[2].split(".")
    return cls, field


def _axes(name: str) -> str | None:
    """The axes of weights of a module of ours, as its signature states them."""
    cls, field = _class_of(name)
    if cls == "Attention" or cls not in attention.__all__:
        return None
    kind = typing.get_type_hints(getattr(attention, cls).attend)["return"]
    kind = typing.get_type_hints(kind).get(field[-1] if field else "") if issubclass(kind, tuple) else kind
    return getattr(kind, "dim_str", None)


def stated_pairs(name: str) -> bool | None:
    """Does the signature of their module, if it is ours, say that weights of this name are of pairs of positions?"""
    axes = _axes(name)
    return axes.endswith(("n m", "1 m")) if axes else None


def _pairs(name: str, values: Tensor, image: Grid) -> bool:
    """Are these weights of pairs of positions? Their module says so, their rows sum to one, or only so do they fit."""
    if (stated := stated_pairs(name)) is not None:
        return stated
    if torch.allclose(values.sum(-1), torch.ones(()), atol=1e-2):
        return True
    usual = usual_grids(image)
    return tuple(values.shape[1:]) not in usual and values.shape[1] in {h * w for h, w in usual if h * w > 1}


def _read_kernels(name: str, values: Tensor, image: Grid) -> Heat:
    groups, size = len(values), f"{values.shape[1]}×{values.shape[2]}"
    if values.ndim == 5:
        drawn, what = values.abs().sum((1, 2)), f"sum of the absolute weights of the {size} kernel there"
    else:
        drawn, what = values.norm(dim=3).mean((1, 2)), f"mean length of the offsets of the {size} taps there"
    return _read_map(name, drawn.mean(0), image, what, _mean_of(groups, "groups"))


def _read_map(name: str, drawn: Tensor, image: Grid, *parts: str) -> Heat:
    height, width = drawn.shape
    if min(height, width) > 1 and not same_stride((height, width), image):
        raise ValueError(f"{name}: a map of {height}×{width} does not lie on an image of {image[0]}×{image[1]}")
    return Heat(name, _note(drawn, f"{height}×{width}", *parts), drawn.numpy(), None)


def _mean_of(count: int, what: str) -> str:
    return f"mean of {count} {what}" if count > 1 else ""


def _read_query(name: str, values: Tensor, image: Grid, query: Query, grid: Grid | None) -> Heat:
    rows = values if values.ndim == 2 else values.mean(0)
    n, m = rows.shape
    heads = _mean_of(len(values), "heads") if values.ndim == 3 else ""
    if n == 1:  # one query that stands nowhere in the image, as that of a pool
        keys, prefix = _grid(m, grid, image)
        row, cross, asked = rows[0], None, f"{keys[0]}×{keys[1]}"
    else:
        (height, width), lead = _grid(n, grid, image)
        keys, prefix = key_grid_of(m, (height, width), lead, image)
        y, x = (int((at + 0.5) / side * cells) for at, side, cells in zip(query, image, (height, width), strict=True))
        row, asked = rows[lead + y * width + x], f"what ({y}, {x}) of {height}×{width} reads"
        cross = ((y + 0.5) * image[0] / height, (x + 0.5) * image[1] / width)
    heat = row[prefix:].reshape(keys)
    left_out = f"{prefix} prefix token{'s' * (prefix > 1)} left out" if prefix else ""
    return Heat(name, _note(heat, asked, heads, left_out), heat.numpy(), cross)


def _grid(positions: int, given: Grid | None, image: Grid) -> tuple[Grid, int]:
    if given is None:
        return grid_of(positions, image)
    if (prefix := positions - given[0] * given[1]) < 0:
        raise ValueError(f"grids must name a grid of at most {positions} positions, got {given[0]}×{given[1]}")
    return given, prefix


def _note(values: Tensor, *parts: str) -> str:
    same = "all the same" if constant(float(values.min()), float(values.max())) else ""
    return ", ".join(filter(None, (*parts, same)))


def _centre(image: Grid, query: Query | None) -> Query:
    chosen = (image[0] // 2, image[1] // 2) if query is None else query
    if not all(0 <= at < side for at, side in zip(chosen, image, strict=True)):
        raise ValueError(f"query must lie inside the image of {image[0]}×{image[1]}, got {chosen}")
    return chosen


def read_maps(
    maps: Mapping[str, Any], image: Grid, *, query: Query | None = None, grids: Mapping[str, Grid] | None = None
) -> list[Channels | Heat | Warp]:
    """Return what there is to draw of the maps of one image, in their order.

    Args:
        maps: What :func:`visattn.record` yields, for a batch of one.
        image: Height and width of the image that the model saw.
        query: Row and column of the pixel whose reading is shown where every position reads; None: the centre.
        grids: Height and width of the queries' grid by name of the map, where the image's aspect does not tell.

    Raises:
        ValueError: If ``query`` lies outside the image, a shape is none that can be drawn, or no grid fits.
    """
    chosen = _centre(image, query)
    return [_read(name, weights, image, chosen, (grids or {}).get(name)) for name, weights in fields(maps)]


def drawable(maps: Mapping[str, Any], image: Grid) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the maps that can be drawn, and by name why each of the others cannot."""
    good, bad = {}, {}
    for name, weights in fields(maps):
        try:
            read_maps({name: weights}, image)
            good[name] = weights
        except ValueError as error:
            bad[name] = str(error)
    return good, bad
