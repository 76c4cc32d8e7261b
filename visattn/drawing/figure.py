"""An empty figure that needs no display, and a photo in it."""

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


def show(axes: Axes, photo: UInt8[ndarray, "h w 3"]) -> None:
    """Draw a photo, coordinates being those of its pixels' edges."""
    axes.imshow(photo, extent=(0, photo.shape[1], photo.shape[0], 0))
    axes.set_axis_off()
