"""What a grid samples: its lattice over the input, where its points come from, what it gives, and how areas change."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image

from visattn.attention.sampling.grids import jacobian
from visattn.attention.sampling.thin_plate import lattice
from visattn.attention.sampling.warp import sample
from visattn.drawing.figure import canvas, show
from visattn.drawing.photo import as_photo
from visattn.drawing.reading import Warp, effect

HEADS = ("#f2820d", "#1f9ed1", "#3fae5a", "#d6409f", "#b5a010", "#8a6be0")  # seen on black and on white
CELLS = 8  # of a lattice, along the longer side of the output
FAR = 100.0  # beyond it, as beyond the horizon of a homography, there are no lines
BEYOND = 0.5  # how much of the image's height and width is shown around it, at most
AREAS, FOLDED = "PuOr_r", "#d62728"


def read_off(grid: Float[ndarray, "h w 2"], points: Float[ndarray, "*n 2"]) -> Float[ndarray, "*n 2"]:
    """Return where points of an output come from: as its pixels' centres do, and linearly between and beyond them."""
    ends = []
    for axis, side in ((1, grid.shape[0]), (0, grid.shape[1])):
        place = ((points[..., axis] + 1) * side - 1) / 2
        before = place.astype(int).clip(0, max(0, side - 2))
        ends.append((before, (before + 1).clip(0, side - 1), (place - before)[..., None]))
    (top, bottom, down), (left, right, across) = ends
    upper, lower = (grid[row, left] + across * (grid[row, right] - grid[row, left]) for row in (top, bottom))
    return upper + down * (lower - upper)


def refined(grid: Float[ndarray, "h w 2"], size: tuple[int, int]) -> Float[ndarray, "h2 w2 2"]:
    """Return the grid of an output that is so many times larger, down and across, that it is at least of a size."""
    sides = [side * -(-least // side) for side, least in zip(grid.shape[:2], size, strict=True)]
    if sides == [*grid.shape[:2]]:
        return grid
    y, x = ((2 * np.arange(side) + 1) / side - 1 for side in sides)
    return read_off(grid, np.stack(np.meshgrid(x, y), -1))


def sampled(photo: UInt8[ndarray, "H W 3"], grid: Float[ndarray, "h w 2"]) -> UInt8[ndarray, "h2 w2 3"]:
    """Return what a grid takes from an image; outside of it is black.

    A grid that is coarser than the image, as one for a feature map is, is refined first.
    """
    image = torch.tensor(photo).permute(2, 0, 1)[None] / 255
    points = torch.from_numpy(refined(grid, (photo.shape[0], photo.shape[1]))).float()
    return (sample(image, points[None])[0].permute(1, 2, 0) * 255).round().byte().numpy()


def lines_of(grid: Float[ndarray, "h w 2"], cells: int = CELLS) -> tuple[list[ndarray], ndarray]:
    """Return the lines between the cells of a lattice on the output, and its outline, as they lie on the input.

    Cells are as good as square, and so many along the longer side.
    """
    height, width = grid.shape[:2]
    down, across = (max(1, round(cells * side / max(height, width))) for side in (height, width))
    y, x = (np.linspace(-1, 1, 2 * side + 1) for side in (height, width))

    def line(x: ndarray | float, y: ndarray | float) -> ndarray:
        return read_off(grid, np.stack(np.broadcast_arrays(x, y), -1))

    lines = [line(x, row) for row in np.linspace(-1, 1, down + 1)[1:-1]]
    lines += [line(column, y) for column in np.linspace(-1, 1, across + 1)[1:-1]]
    return lines, np.concatenate([line(x, -1.0), line(1.0, y), line(x[::-1], 1.0), line(-1.0, y[::-1])])


def pixels(points: Float[ndarray, "*n 2"], photo: UInt8[ndarray, "h w 3"]) -> Float[ndarray, "*n 2"]:
    """Return (x, y) in pixels of the image, from its upper left corner; nothing for what is far away."""
    near = (np.abs(points) < FAR).all(-1, keepdims=True)
    return np.where(near, (points + 1) / 2 * photo.shape[1::-1], np.nan)


def look_around(
    axes: Axes, photo: UInt8[ndarray, "h w 3"], points: Float[ndarray, "n 2"], around: float | None = None
) -> None:
    """Show so much around the image, as a share of its size; None: as far as points lie outside, up to a limit."""
    size = np.array(photo.shape[1::-1])
    if around is None:
        seen, room = np.nan_to_num(points), 0.02 * size.max()
        low = seen.min(0).clip(-BEYOND * size, 0) - room
        high = seen.max(0).clip(size, (1 + BEYOND) * size) + room
    else:
        low, high = -around * size, (1 + around) * size
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(high[1], low[1])


def draw_lattice(
    axes: Axes,
    photo: UInt8[ndarray, "H W 3"],
    grids: Float[ndarray, "k h w 2"],
    *,
    cells: int = CELLS,
    marks: float = 1.0,
    around: float | None = None,
) -> None:
    """Draw the lattice of an output where it comes from in the image, its outline bold, with a dot at its upper left.

    Args:
        axes: Where to draw.
        photo: The image.
        grids: Grids; each head has its own colour.
        cells: Cells of the lattice along the longer side of the output.
        marks: Size of dots and lines.
        around: How much around the image is shown, as a share of its size; None: as far as the outlines lie outside.
    """
    show(axes, photo)
    outlines = []
    for head, grid in enumerate(grids):
        colour = HEADS[head % len(HEADS)]
        lines, outline = lines_of(grid, cells)
        outlines.append(pixels(outline, photo))
        axes.add_collection(
            LineCollection([pixels(line, photo) for line in lines], colors=colour, linewidths=0.7 * marks)
        )
        axes.add_collection(LineCollection([outlines[-1]], colors=colour, linewidths=2.2 * marks))
        axes.plot(
            *outlines[-1][0],
            "o",
            color=colour,
            markersize=6 * marks,
            markeredgecolor="white",
            markeredgewidth=0.8 * marks,
        )
    look_around(axes, photo, np.concatenate(outlines), around)


def draw_arrows(
    axes: Axes,
    photo: UInt8[ndarray, "H W 3"],
    grid: Float[ndarray, "h w 2"],
    *,
    points: tuple[int, int] = (4, 4),
    span: float = 1.0,
    colour: str = HEADS[1],
) -> None:
    """Draw arrows over the image from where points lie in the output to where they come from.

    Args:
        axes: Where to draw.
        photo: The image.
        grid: The grid.
        points: How many points there are, down and across.
        span: How far from the centre the outermost lie; 1 is the edge of the output.
        colour: Colour of arrows and points.
    """
    show(axes, photo)
    starts = lattice(*points, span=span).numpy()
    first, last = pixels(starts, photo), pixels(read_off(grid, starts), photo)
    (x, y), (across, down) = first.T, (last - first).T
    axes.scatter(x, y, s=14, color=colour, edgecolor="white", linewidth=0.5, zorder=3)
    arrows = axes.quiver(x, y, across, down, angles="xy", scale_units="xy", scale=1, width=0.01, color=colour, zorder=4)
    arrows.set(edgecolor="white", linewidth=0.4)
    look_around(axes, photo, np.concatenate((last, pixels(lines_of(grid)[1], photo))))


def draw_areas(axes: Axes, grid: Float[ndarray, "h w 2"]) -> None:
    """Draw how many times its own area each cell of the output takes from the input, red where it is folded over."""
    areas = jacobian(torch.from_numpy(grid)[None])[0].numpy()
    kept = np.ma.masked_less_equal(areas, 0)
    ratios = np.abs(np.log(kept.compressed()))
    most = float(np.exp(ratios.max(initial=0).clip(np.log(2), np.log(100))))
    norm = LogNorm(1 / most, most)
    if kept.size:
        axes.imshow(kept, cmap=AREAS, norm=norm, interpolation="none")
    axes.set_facecolor(FOLDED)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    place = axes.inset_axes((1.025, 0, 0.04, 1))
    scale = axes.figure.colorbar(ScalarMappable(norm, AREAS), cax=place, ticks=[1 / most, 1, most])
    scale.minorticks_off()
    scale.set_ticklabels([f"{1 / most:.2g}", "1", f"{most:.3g}"])
    scale.ax.tick_params(labelsize="small", length=2)
    scale.outline.set_visible(False)


def draw_warp(
    image: Image.Image | ndarray,
    warp: Warp,
    *,
    points: tuple[int, int] = (4, 4),
    span: float = 1.0,
    areas: bool = False,
) -> Figure:
    """Draw a warp, a row for each head: its lattice over the image, where points come from, and what it gives.

    Args:
        image: What the model saw.
        warp: One of :func:`read_maps`.
        points: How many points have arrows, down and across.
        span: How far from the centre the outermost of them lie; 1 is the edge of the output.
        areas: Whether to draw how areas change, too: the determinant of the Jacobian, red where it is not positive.

    Example:
        >>> grid = torch.nn.functional.affine_grid(torch.eye(2, 3)[None] / 2, (1, 1, 8, 8), align_corners=False)
        >>> warp = Warp("conv1/AffineTransformer", "a crop", grid.numpy())
        >>> [axes.get_title() for axes in draw_warp(np.zeros((8, 8, 3), np.uint8), warp).axes]
        ['sampled lattice', 'where points come from', 'what is sampled']
    """
    photo = as_photo(image)
    heads, columns, side = len(warp.grid), 4 if areas else 3, 3.6 if len(warp.grid) == 1 else 2.6
    wide = side * min(max(photo.shape[1] / photo.shape[0], 0.5), 2.5)
    figure = canvas(columns * wide + 0.6, heads * (side + 0.2 * (heads > 1)) + 0.9)
    panels = figure.subplots(heads, columns, squeeze=False)
    for head, (row, grid) in enumerate(zip(panels, warp.grid, strict=True)):
        draw_lattice(row[0], photo, grid[None])
        draw_arrows(row[1], photo, grid, points=points, span=span)
        show(row[2], sampled(photo, grid))
        if areas:
            draw_areas(row[3], grid)
        if heads > 1:
            said = f"{head + 1}: {effect(torch.from_numpy(grid)[None])}"
            row[0].text(0, -0.02, said, fontsize="small", va="top", transform=row[0].transAxes)
    titles = ["sampled lattice", "where points come from", "what is sampled", "determinant (red: folded over)"]
    for axes, title in zip(panels[0], titles, strict=False):
        axes.set_title(title, fontsize="medium")
    figure.suptitle(f"{warp.name}\n{warp.note}", fontsize="large")
    return figure
