"""A map as heat over the image."""

import math

import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.path import Path as MarkerPath
from numpy import ndarray
from torch.nn import functional as F

COLOURS = "inferno"  # perceptually uniform
OPACITY = 0.55
ARMS = [(-1, 0), (-0.4, 0), (0.4, 0), (1, 0), (0, -1), (0, -0.4), (0, 0.4), (0, 1)]
CROSS = MarkerPath(ARMS, [MarkerPath.MOVETO, MarkerPath.LINETO] * 4)  # open, to show what is under it


def upsample(values: Float[ndarray, "h w"], size: tuple[int, int]) -> Float[ndarray, "H W"]:
    """Return a map at the size of the image it lies on, smoothly, and within its own range.

    The map covers the image: cell (i, j) is centred on pixel ((i + ½) H/h − ½, (j + ½) W/w − ½).

    Args:
        values: The map.
        size: Height and width of the image.

    Example:
        >>> import numpy as np
        >>> upsample(np.eye(2, dtype=np.float32), (64, 96)).shape
        (64, 96)
    """
    grid = torch.as_tensor(values)[None, None]
    smooth = F.interpolate(grid, size, mode="bicubic", align_corners=False, antialias=True)
    return smooth.clamp(grid.min(), grid.max())[0, 0].numpy()


def ticks(low: float, middle: float, high: float) -> tuple[list[float], list[str]]:
    """Return where a scale is marked, and with what: once where all values are the same.

    Example:
        >>> ticks(0.42, 0.5, 0.59), ticks(0.5, 0.5, 0.5)
        (([0.42, 0.5, 0.59], ['0.420', '0.500', '0.590']), ([0.5], ['0.5']))
    """
    if constant(low, high):
        return [low], [f"{low:.3g}"]
    crowded = min(middle - low, high - middle) < 0.1 * (high - low)
    marks = [low, high] if crowded else [low, middle, high]
    if not 1e-4 <= max(abs(low), abs(high)) < 1e5:
        return marks, [f"{mark:.2e}" for mark in marks]
    decimals = max(0, 2 - math.floor(math.log10(high - low)))
    return marks, [f"{mark:.{decimals}f}" for mark in marks]


def constant(low: float, high: float) -> bool:
    """Is there nothing between two values but rounding?"""
    return high - low <= 1e-6 * max(abs(low), abs(high))


def overlay(
    axes: Axes,
    photo: UInt8[ndarray, "H W 3"],
    values: Float[ndarray, "h w"],
    *,
    query: tuple[float, float] | None = None,
) -> None:
    """Draw a map as heat over the image in grey, with a scale from its least to its greatest value.

    Args:
        axes: Where to draw.
        photo: The image.
        values: The map, of any size.
        query: Row and column of the image to mark with a cross.
    """
    height, width = photo.shape[:2]
    whole = (0, width, height, 0)
    low, high = float(values.min()), float(values.max())
    marks, labels = ticks(low, (low + high) / 2, high)
    if len(marks) == 1:
        low, high = low - 1, high + 1
    norm = Normalize(low, high)
    heat = upsample(values, (height, width))
    axes.imshow(photo.mean(2), cmap="gray", vmin=-80, vmax=255, extent=whole)  # shadows lifted: heat darkens them
    axes.imshow(heat, cmap=COLOURS, norm=norm, alpha=OPACITY, extent=whole)
    scale = axes.figure.colorbar(ScalarMappable(norm, COLOURS), cax=axes.inset_axes((1.025, 0, 0.04, 1)), ticks=marks)
    scale.set_ticklabels(labels)
    scale.ax.tick_params(labelsize="small", length=2)
    scale.outline.set_visible(False)
    if query is not None:
        for colour, thick in (("black", 4.5), ("white", 2)):
            axes.plot(query[1], query[0], marker=CROSS, color=colour, markersize=20 + thick, markeredgewidth=thick)
    axes.set_axis_off()
