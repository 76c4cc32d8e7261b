"""Where each word of a sentence was read in a picture."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from visattn.drawing.figure import canvas, panel, show
from visattn.drawing.overlay import COLOURS, OPACITY, upsample

SIDE, GAP, HEAD = 1.5, 0.1, 0.28  # of a panel that is square, between panels, and of its title, in inches
CELL = 0.09  # of the matrix, in inches


def draw_words(
    photo: UInt8[ndarray, "H W 3"],
    words: Sequence[str],
    weights: Float[ndarray, "t l"],
    size: tuple[int, int],
    *,
    title: str = "",
    columns: int = 7,
) -> Figure:
    """Draw a heat map for each word of a sentence over the picture, and below, how much each read from each region.

    All heat maps have one scale, from zero to the greatest weight of any word. What is read beside the map, such as a
    sentinel, is said in per cent behind the word.

    Args:
        photo: The picture.
        words: The words, with what ends the sentence if it was said.
        weights: How much each read from each region: the positions of the map row by row, and what else there is.
        size: Height and width of the map.
        title: A line above it all.
        columns: How many words are side by side; the others follow below.

    Raises:
        ValueError: If there is no word, or there are not weights for each, or fewer than the map has positions.
    """
    if not words or len(words) != len(weights):
        raise ValueError(f"words must be some, with weights for each, got {len(words)} with {len(weights)}")
    places = size[0] * size[1]
    if weights.shape[1] < places:
        raise ValueError(f"weights must be of at least the {places} positions of the map, got {weights.shape[1]}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    weights = np.asarray(weights, np.float32)
    beside = weights[:, places:].sum(1)
    aspect = min(max(photo.shape[1] / photo.shape[0], 0.4), 2.5)
    wide, high = SIDE * math.sqrt(aspect), SIDE / math.sqrt(aspect)
    count = len(words) + 1  # with the picture itself
    across = min(columns, count)
    down = math.ceil(count / across)
    above = 0.34 if title else 0.04
    names = 0.3 + 0.085 * max(map(len, words))
    below = CELL * 1.9 * len(words) + 0.45
    width = max(GAP + across * (wide + GAP), names + 4.2)
    figure = canvas(width, above + down * (HEAD + high + GAP) + HEAD + below, layout=None)
    greatest = max(float(weights[:, :places].max()), 1e-12)
    for k in range(count):
        row, column = divmod(k, across)
        x, y = GAP + column * (wide + GAP), above + row * (HEAD + high + GAP) + HEAD
        axes = panel(figure, x, y, wide, high)
        if k:
            heat(axes, photo, weights[k - 1, :places].reshape(size), greatest)
            more = f"  {100 * beside[k - 1]:.0f} % beside" if weights.shape[1] > places else ""
            axes.set_title(f"{words[k - 1]}{more}", fontsize="medium", pad=4)
        else:
            show(axes, photo)
    y = above + down * (HEAD + high + GAP) + HEAD
    matrix(panel(figure, names, y, width - names - GAP, below - 0.4), words, weights)
    figure.text(
        GAP / figure.get_size_inches()[0], 1 - 0.2 / figure.get_size_inches()[1], title, fontsize="large", va="center"
    )
    return figure


def heat(axes: Axes, photo: UInt8[ndarray, "H W 3"], values: Float[ndarray, "h w"], greatest: float) -> None:
    """Draw a map over the picture in grey, on a scale from zero."""
    height, width = photo.shape[:2]
    whole = (0, width, height, 0)
    axes.imshow(photo.mean(2), cmap="gray", vmin=-80, vmax=255, extent=whole)  # shadows lifted: heat darkens them
    smooth = upsample(values, (height, width))
    axes.imshow(smooth, cmap=COLOURS, vmin=0, vmax=greatest, alpha=OPACITY, extent=whole)
    axes.set_axis_off()


def matrix(axes: Axes, words: Sequence[str], weights: Float[ndarray, "t l"]) -> None:
    """Draw how much each word, a row, read from each region, a column."""
    axes.imshow(weights, cmap=COLOURS, vmin=0, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(words)), words, fontsize="small")
    axes.tick_params(length=0, labelsize="small")
    axes.set_xlabel("regions, row by row", fontsize="small")
    axes.spines[:].set_visible(False)
