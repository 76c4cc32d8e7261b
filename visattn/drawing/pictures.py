"""Whole pictures: one for each map, and one of all maps of a model."""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image

from visattn.drawing.bars import bars, top_bars
from visattn.drawing.figure import canvas, show
from visattn.drawing.grid import Grid
from visattn.drawing.overlay import overlay
from visattn.drawing.photo import as_photo
from visattn.drawing.reading import Channels, Heat, Query, Warp, read_maps
from visattn.drawing.warp import draw_lattice, draw_warp

PANELS = 19  # and the image: four rows of five


def picture(image: Image.Image | ndarray, drawn: Channels | Heat | Warp) -> Figure:
    """Draw one map beside the image it belongs to, a warp as :func:`draw_warp` does.

    Args:
        image: What the model saw.
        drawn: One of :func:`read_maps`.
    """
    if isinstance(drawn, Warp):
        return draw_warp(image, drawn)
    photo = as_photo(image)
    side = 3.6
    wide = side * min(max(photo.shape[1] / photo.shape[0], 0.5), 2.5)
    if isinstance(drawn, Heat):
        figure = canvas(2 * wide + 0.9, side + 0.8)
        left, right = figure.subplots(1, 2)
        overlay(right, photo, drawn.values, query=drawn.query)
    else:
        figure = canvas(wide + 5.4, side + 0.8)
        panels = figure.subplot_mosaic(
            [["photo", "order", "order"], ["photo", "sorted", "top"]], width_ratios=[wide, 2.5, 2.5]
        )
        left = panels["photo"]
        bars(panels["order"], drawn.values)
        panels["order"].set_title("in order", fontsize="medium")
        bars(panels["sorted"], drawn.values, order=False)
        panels["sorted"].set_title("sorted", fontsize="medium")
        top_bars(panels["top"], drawn.values)
        panels["top"].set_title("greatest, by number", fontsize="medium")
    show(left, photo)
    figure.suptitle(f"{drawn.name}\n{drawn.note}", fontsize="large")
    return figure


def draw_maps(
    image: Image.Image | ndarray,
    maps: Mapping[str, Any],
    folder: str | Path,
    *,
    query: Query | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> list[Path]:
    """Write a PNG for each recorded map, for each field where a map has several, and return the files.

    Args:
        image: What the model saw (the cropped view, see :func:`denormalise`): a PIL image or uint8 of (h, w, 3).
        maps: What :func:`visattn.record` yields, for a batch of one (see :func:`of_image`).
        folder: Where the files go; made if need be.
        query: See :func:`read_maps`.
        grids: See :func:`read_maps`.
    """
    photo = as_photo(image)
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for drawn in read_maps(maps, photo.shape[:2], query=query, grids=grids):
        paths.append(Path(folder) / f"{drawn.name.replace('/', '-')}.png")
        picture(photo, drawn).savefig(paths[-1])
    return paths


def overview(
    image: Image.Image | ndarray,
    maps: Mapping[str, Any],
    *,
    title: str = "",
    query: Query | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> Figure:
    """Draw the image and all maps of a model in one figure; of more than 19, as many evenly chosen.

    Args:
        image: What the model saw.
        maps: What :func:`visattn.record` yields, for a batch of one.
        title: A line above it all.
        query: See :func:`read_maps`.
        grids: See :func:`read_maps`.
    """
    photo = as_photo(image)
    drawn = read_maps(maps, photo.shape[:2], query=query, grids=grids)
    chosen = [drawn[i] for i in np.linspace(0, len(drawn) - 1, min(len(drawn), PANELS)).round().astype(int)]
    columns = min(len(chosen) + 1, 5 if len(chosen) > 7 else 4)
    rows = math.ceil((len(chosen) + 1) / columns)
    high = 2.2
    wide = high * min(max(photo.shape[1] / photo.shape[0], 0.7), 2.0)
    figure = canvas(columns * (wide + 0.9) + 0.1, rows * (high + 0.95) + 0.45, layout=None)

    def panel(place: int) -> Axes:  # every panel of one size, whatever stands around it
        row, column = divmod(place, columns)
        inches = (0.15 + column * (wide + 0.9), 0.25 + (rows - 1 - row) * (high + 0.95), wide, high)
        return figure.add_axes((*(inches / np.tile(figure.get_size_inches(), 2)),))

    show(panel(0), photo)
    for place, one in enumerate(chosen, 1):
        axes = panel(place)
        if isinstance(one, Heat):
            overlay(axes, photo, one.values, query=one.query)
        elif isinstance(one, Warp):
            draw_lattice(axes, photo, one.grid)
        else:
            bars(axes, one.values)
            axes.yaxis.tick_right()
            axes.spines[["left", "right"]].set_visible(False)
        site, _, module = one.name.rpartition("/")
        note = textwrap.wrap(one.note, int(14 * (wide + 0.5)))
        axes.set_title("\n".join(filter(None, (site, module, *note))), fontsize=8, loc="left")
    rest = len(drawn) - len(chosen)
    heading = (title, f"{len(chosen)} of {len(drawn)} maps, {rest} left out" if rest else "")
    left, top = 0.15 / figure.get_figwidth(), 1 - 0.3 / figure.get_figheight()
    figure.text(left, top, "   ".join(filter(None, heading)), fontsize="large")
    return figure
