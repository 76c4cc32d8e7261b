"""Weights of channels as bars."""

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from numpy import ndarray

from visattn.drawing.overlay import ticks

COLOUR = "#3b528b"


def bars(axes: Axes, values: Float[ndarray, " c"], *, order: bool = True) -> None:
    """Draw weights as bars that stand on their mean, from 64 channels to 2048 alike.

    Args:
        axes: Where to draw.
        values: A weight for each channel.
        order: Whether channels stand in their own order; otherwise the greatest comes first.
    """
    drawn = values if order else np.sort(values)[::-1]
    edges = np.arange(len(drawn) + 1) - 0.5
    axes.stairs(drawn, edges, baseline=values.mean(), fill=True, facecolor=COLOUR, edgecolor=COLOUR, linewidth=0.4)
    axes.set_xlim(-0.5, len(drawn) - 0.5)
    axes.set_xticks([0, len(drawn) - 1] if order else [])
    _scale(axes, values)


def top_bars(axes: Axes, values: Float[ndarray, " c"], count: int = 16) -> None:
    """Draw the greatest weights as bars that stand on the mean of all, each with the number of its channel."""
    chosen = np.argsort(-values, kind="stable")[:count]
    axes.bar(np.arange(len(chosen)), values[chosen] - values.mean(), bottom=values.mean(), color=COLOUR, width=0.7)
    axes.set_xticks(np.arange(len(chosen)), [str(channel) for channel in chosen], rotation=90)
    _scale(axes, values)


def _scale(axes: Axes, values: Float[ndarray, " c"]) -> None:
    low, mean, high = float(values.min()), float(values.mean()), float(values.max())
    marks, labels = ticks(low, mean, high)
    room = 0.06 * (high - low) if len(marks) > 1 else 1.0
    axes.axhline(mean, color=COLOUR, linewidth=0.8)
    axes.set_ylim(low - room, high + room)
    axes.set_yticks(marks, labels)
    axes.tick_params(labelsize="small", length=2)
    axes.spines[["top", "right"]].set_visible(False)
