"""What a spatial transformer makes of each class: means before and after, and examples."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from visattn.drawing.figure import canvas, show
from visattn.drawing.warp import draw_lattice

SIDE = 0.9  # of a panel, in inches
LEAST = 4.8  # width of a figure, in inches: room for a title


def mean(photos: UInt8[ndarray, "n h w 3"]) -> UInt8[ndarray, "h w 3"]:
    """Return the mean of photos."""
    return photos.mean(0).round().astype(np.uint8)


def draw_alignment(
    inputs: UInt8[ndarray, "b H W 3"],
    outputs: UInt8[ndarray, "b k h w 3"],
    grids: Float[ndarray, "b k h2 w2 2"],
    classes: Mapping[str, Sequence[int]],
    *,
    examples: int = 1,
    title: str = "",
) -> Figure:
    """Draw a column for each class: the means of its inputs and of what they become, then examples.

    Inputs of examples lie under the lattices that are sampled; panels are blank where there are too few. The better
    images are aligned, the sharper is the mean of what they become.

    Args:
        inputs: Images.
        outputs: What each head makes of each.
        grids: Where each head samples each.
        classes: The numbers of the images of each class, by its name.
        examples: How many images of each class are drawn.
        title: A line above it all.

    Example:
        >>> black = np.zeros((2, 8, 8, 3), np.uint8)
        >>> grids = np.zeros((2, 1, 8, 8, 2), np.float32)
        >>> figure = draw_alignment(black, black[:, None], grids, {"one": [0], "two": [1]})
        >>> [axes.get_title() for axes in figure.axes[::4]]
        ['one', 'two']
    """
    heads = [f"\nof head {head + 1}" for head in range(outputs.shape[1])] if outputs.shape[1] > 1 else [""]
    names = ["mean input", *(f"mean output{head}" for head in heads)]
    names += ["input", *(f"output{head}" for head in heads)] * examples
    size = np.array((SIDE * min(max(inputs.shape[2] / inputs.shape[1], 0.5), 2), SIDE))
    left, gap = 0.95, 0.06
    whole = (max(LEAST, left + len(classes) * (size[0] + gap) + gap), len(names) * (size[1] + gap) + 0.65)
    figure = canvas(*whole, layout=None)
    figure.text(gap / whole[0], 1 - 0.28 / whole[1], title, fontsize="large")

    def panel(row: int, column: int) -> Axes:
        corner = left + column * (size[0] + gap), gap + (len(names) - 1 - row) * (size[1] + gap)
        axes = figure.add_axes((*(np.concatenate((corner, size)) / np.tile(whole, 2)),))
        axes.set_axis_off()
        return axes

    for column, (name, members) in enumerate(classes.items()):
        chosen = np.array(members)
        photos = [mean(inputs[chosen]), *(mean(outputs[chosen, head]) for head in range(len(heads)))]
        panels = [panel(row, column) for row in range(len(names))]
        for axes, photo in zip(panels, photos, strict=False):
            show(axes, photo)
        panels[0].set_title(name if len(name) <= 12 else f"{name[:11]}…", fontsize="small")
        for number, image in enumerate(chosen[:examples]):
            first, *others = panels[(1 + number) * len(photos) :]
            draw_lattice(first, inputs[image], grids[image], cells=5, marks=0.5, around=0.25)
            for axes, photo in zip(others, outputs[image], strict=False):
                show(axes, photo)
    for row, name in enumerate(names):
        height = gap + (len(names) - 0.5 - row) * (size[1] + gap)
        figure.text((left - gap) / whole[0], height / whole[1], name, fontsize="small", ha="right", va="center")
    return figure
