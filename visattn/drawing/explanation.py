"""How far a map explains: what it is taken to say, and what is left of that."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from visattn.drawing.figure import canvas, panel, show
from visattn.drawing.overlay import overlay

STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#c43c4e", "linewidth": 2.0},
    {"color": "#3b528b", "linestyle": "--"},
    {"color": "#777777", "linestyle": ":"},
)
HIGH, HEAD, SCALE = 2.4, 0.85, 0.75  # a panel, what stands above it, and the scale beside a map, in inches
Line = tuple[Float[ndarray, " s"], Float[ndarray, " s"]]


def draw_explanation(
    photo: UInt8[ndarray, "H W 3"],
    maps: Mapping[str, Float[ndarray, "h w"]],
    curves: Mapping[str, Mapping[str, Line]],
    *,
    title: str = "",
    boxes: Sequence[Sequence[float]] = (),
) -> Figure:
    """Draw a picture, maps over it, and curves of a probability as more and more goes or comes.

    Args:
        photo: The picture.
        maps: The maps by what stands above them: the one that was read by, and others that say the same.
        curves: By what stands above each: its lines, the map's first, as shares and probabilities.
        title: A line above it all.
        boxes: What is named lies there: first column and row, and those behind the last, in pixels of the picture.

    Raises:
        ValueError: If there is neither a map nor a curve, or there are more lines than can be told apart.
    """
    if not maps and not curves:
        raise ValueError("maps or curves must be some, got none")
    if any(len(lines) > len(STYLES) for lines in curves.values()):
        raise ValueError(f"curves must have at most {len(STYLES)} lines, got {max(map(len, curves.values()))}")
    wide = HIGH * min(max(photo.shape[1] / photo.shape[0], 0.5), 2.0)
    widths = [wide] + [wide] * len(maps) + [HIGH] * len(curves)
    gaps = [0.3] + [SCALE] * len(maps) + [0.8] * len(curves)
    figure = canvas(sum(widths) + sum(gaps) + 0.2 + 0.3 * bool(curves), HIGH + HEAD + 0.55, layout=None)
    panels, left = [], 0.1
    for number, (width, gap) in enumerate(zip(widths, gaps, strict=True)):
        left += 0.6 * (number == 1 + len(maps))  # for the name of what curves show
        panels.append(panel(figure, left, HEAD, width, HIGH))
        left += width + gap
    show(panels[0], photo)
    for left, top, right, bottom in boxes:
        panels[0].plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="#f2820d", linewidth=2)
    for axes, (name, values) in zip(panels[1:], maps.items(), strict=False):
        overlay(axes, photo, values)
        axes.set_title(name, fontsize="medium")
    for axes, (name, lines) in zip(panels[1 + len(maps) :], curves.items(), strict=True):
        _curves(axes, lines)
        axes.set_title(name, fontsize="medium")
    inches = figure.get_size_inches()
    figure.text(0.1 / inches[0], 1 - 0.22 / inches[1], title, fontsize="large", va="center")
    return figure


def _curves(axes: Axes, lines: Mapping[str, Line]) -> None:
    for style, (name, (shares, scores)) in zip(STYLES, lines.items(), strict=False):
        area = float(((scores[1:] + scores[:-1]) / 2 * (shares[1:] - shares[:-1])).sum())
        axes.plot(shares, scores, label=f"{name}: {area:.2f}", **style)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("share", fontsize="small")
    axes.set_ylabel("probability", fontsize="small")
    axes.tick_params(labelsize="small", length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, title="mean", title_fontsize="small")
