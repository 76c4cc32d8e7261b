"""An empty figure that needs no display, axes at a place in it, and a photo in them."""

from typing import Literal

from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy import ndarray


def canvas(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty figure, measured in inches, that needs no display."""
    figure = Figure(figsize=(width, height), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes of this size, at a place that is measured from the upper left corner, in inches."""
    whole = figure.get_size_inches()
    return figure.add_axes(
        (left / whole[0], 1 - (top + height) / whole[1], width / whole[0], height / whole[1]),
    )


def show(axes: Axes, photo: UInt8[ndarray, "h w c"], size: tuple[int, int] | None = None) -> None:
    """Draw a photo, coordinates being those of its pixels' edges, or of an image of this height and width."""
    height, width = size or photo.shape[:2]
    axes.imshow(photo, extent=(0, width, height, 0))
    axes.set_axis_off()
