"""An empty figure that needs no display, axes at a place in it, and a photo in them."""

from typing import Literal

from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy import ndarray


class Plain(Figure):
    """A figure whose words stay as they are: of two dollars in the name of a photo a formula would be made."""

    def draw(self, renderer: RendererBase) -> None:
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)


def canvas(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty figure, measured in inches, that needs no display."""
    figure = Plain(figsize=(width, height), dpi=120, layout=layout)
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
