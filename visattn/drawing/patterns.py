"""Who reads whom: the weights of all pairs as a matrix, and one query's reach on the map."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy import ndarray
from torch import Tensor

from visattn.drawing.bars import COLOUR
from visattn.drawing.figure import canvas
from visattn.drawing.grid import Grid

READ = LinearSegmentedColormap.from_list("read", ["#b9c4e0", COLOUR], N=64)
UNREAD = "#f2f2f2"
ASKS = "#f2820d"
LINES = 40  # cells a side up to which a map is drawn in cells


def draw_patterns(
    patterns: Mapping[str, Float[Tensor, "b n n"] | Float[Tensor, "b heads n n"]],
    grid: Grid,
    *,
    query: tuple[int, int] | None = None,
) -> Figure:
    """Draw the weights of all pairs of positions, several modules side by side.

    Above: a row for each query, a column for each key, a line wherever a row of the map ends. Below: what one query, in
    the midst of the frame, reads on the map. The darker, the greater beside what that query reads most; what is not
    read stays light. Both are the mean over heads.

    Args:
        patterns: Weights of one image, positions counted row by row, by what stands above them.
        grid: Height and width of the map.
        query: Row and column of the query on the map; None: the centre.

    Raises:
        ValueError: If there is no pattern, weights are of more than one image or of another map, or ``query`` lies
            outside the map.

    Example:
        >>> figure = draw_patterns({"itself": torch.eye(12)[None], "all": torch.ones(1, 12, 12)}, (3, 4))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['itself', 'all']
    """
    height, width = grid
    row, column = (height // 2, width // 2) if query is None else query
    if not patterns:
        raise ValueError("patterns must name at least one, got none")
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"query must lie inside the map of {height}×{width}, got {query}")
    for name, weights in patterns.items():
        if weights.shape[0] != 1 or weights.shape[-1] != height * width:
            shape = tuple(weights.shape)
            raise ValueError(f"{name}: weights must be of one image of {height}×{width} positions, got {shape}")
    side = 2.3
    figure = canvas(side * len(patterns) + 0.4, side * (1 + height / width) + 1.1)
    panels = figure.subplots(2, len(patterns), squeeze=False, height_ratios=(width, height))
    for (name, weights), above, below in zip(patterns.items(), *panels, strict=True):
        values = weights.detach().double().flatten(0, -3).mean(0).cpu().numpy()
        matrix(above, values, row * width + column, width)
        above.set_title(name, fontsize="medium")
        reach(below, values[row * width + column].reshape(grid), (row, column))
    panels[0, 0].set_ylabel("queries")
    panels[0, 0].set_xlabel("keys", labelpad=2)
    panels[1, 0].set_ylabel("map")
    return figure


def matrix(axes: Axes, values: Float[ndarray, "n n"], query: int, width: int) -> None:
    """Draw weights with a row for each query, each against its greatest: one in the midst of a frame."""
    greatest = values.max(1, keepdims=True)
    _cells(axes, np.divide(values, greatest, out=np.zeros_like(values), where=greatest > 0), width)
    corner, n = (-0.5, query - 1.5), values.shape[1]
    axes.add_patch(Rectangle(corner, n, 3, fill=False, edgecolor=ASKS, linewidth=1.2, zorder=3, clip_on=False))


def reach(axes: Axes, values: Float[ndarray, "h w"], query: tuple[int, int]) -> None:
    """Draw what a query reads on the map, with a frame around itself and the count below."""
    (row, column), longer = query, max(values.shape)
    _cells(axes, values / max(values.max(), np.finfo(values.dtype).tiny), 1 if longer <= LINES else longer)
    corner = (column - 0.5, row - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ASKS, linewidth=2, zorder=3, clip_on=False))
    axes.set_xlabel(f"reads {(values > 0).sum()} of {values.size}", fontsize="small", labelpad=4)


def _cells(axes: Axes, values: Float[ndarray, "h w"], every: int) -> None:
    """Draw cells between nothing, which stays light, and one, with a line at every so many."""
    axes.imshow(np.ma.masked_equal(values, 0), cmap=READ, vmin=0, vmax=1, interpolation="none")
    axes.set_facecolor(UNREAD)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    for side, line in zip(values.shape, (axes.axhline, axes.axvline), strict=True):
        for at in range(every, side, every):
            line(at - 0.5, color="white", linewidth=1)
