"""Where a network looks in an image, one glimpse after the other, what it has seen of it, and what it takes it for."""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy import ndarray
from torch import Tensor

from visattn.attention.sampling.glimpses import Sensor
from visattn.drawing.figure import canvas, panel, show
from visattn.drawing.film import film
from visattn.drawing.photo import denormalise

COLOURS, DARKEST = "plasma", 0.42  # of glimpses; lighter than what is around lines: one of both is seen on any picture
AROUND = "#1a1a1a"
UNSEEN, HATCH = "#9a9a9a", "#c4c4c4"
TRUE, LEADS, OTHER, SHARE = "#0072b2", "#4d4d4d", "#b8b8b8", "#d55e00"
SIDE = 1.35  # of a panel that is square, in inches; others have its area
GAP, HEAD, BAR = 0.08, 0.26, 0.17
LETTERS = 24  # of a name, at most
FINE = 240  # pixels, at least, of the longer side of what was seen
LEAST = 1e-6  # of a patch's pixel, that is of the image


class Scanpath(NamedTuple):
    """Where a network looked in an image, and what it made of it, glimpse by glimpse: t of k patches each."""

    photo: UInt8[ndarray, "h w 3"]
    """The image."""
    corners: Float[ndarray, "t k 4 2"]
    """What each patch covers: a parallelogram, (x, y) in pixels, from its upper left corner to its lower left one."""
    patches: UInt8[ndarray, "t k g g 4"]
    """What was seen there, opaque where it is of the image."""
    probabilities: Float[ndarray, "t c"]
    """Of each class, after each glimpse."""
    labels: Sequence[str]
    """What the classes are called."""
    truth: Sequence[int] | None
    """What was to be told at each glimpse, where it is known."""
    targets: int
    """How many classes were told, one after another, each after equally many glimpses."""
    weights: Float[ndarray, " t"] | None
    """Of each glimpse in the decision, where more than the last one counts."""
    halting: Float[ndarray, " t"] | None
    """Probability to stop after each glimpse, where the network halts by itself."""


# --- what there is to draw --------------------------------------------------------------------------------------------


def follow(
    network: Any,
    images: Float[Tensor, "b c h w"],
    *,
    rollouts: int = 1,
    policy: Literal["sample", "mean", "random", "centre"] = "mean",
    first: Float[Tensor, "m p"] | None = None,
    truth: Int[Tensor, "b *s"] | None = None,
) -> list[Scanpath]:
    """Look at images, and return where the network looked: with the defaults, as in its ``forward``.

    Names of classes, and what pixels were before they were normalised, are those the network was loaded with.

    Args:
        network: One of ``visattn.models`` that looks at one place after another, in eval mode.
        images: What it is given.
        rollouts: How often it looks at each.
        policy: How locations are chosen.
        first: The first locations; left out, the centre, or for another policy than ``"mean"`` what that chooses.
        truth: The class of each image, or its classes one after another, where they are known.

    Raises:
        ValueError: If the network does not look at one place after another, or is in training mode.

    Example:
        >>> from visattn.models import RecurrentAttention
        >>> (path,) = follow(RecurrentAttention(10, scales=3, glimpses=2).eval(), torch.rand(1, 1, 28, 28))
        >>> path.corners.shape, path.probabilities.shape
        ((2, 3, 4, 2), (2, 10))
        >>> [axes.get_title() for axes in draw_path(path).axes]
        ['', '1', '', '', '2', '', '']
    """
    if not (hasattr(network, "rollout") and hasattr(network, "sensor")):
        raise ValueError(f"network must look at one place after another, got {type(network).__name__}")
    if network.training:
        raise ValueError("network must be in eval mode to be followed: call network.eval()")
    if first is None and policy == "mean" and network.begins_anywhere:
        first = images.new_zeros(len(images) * rollouts, 2)
    with torch.no_grad():
        rollout = network.rollout(images, rollouts=rollouts, policy=policy, first=first)
    transform = getattr(network, "transform", None)
    known = {"mean": transform.mean, "std": transform.std} if transform else {}
    known |= {"labels": getattr(network, "labels", None), "targets": network.targets}
    return read_paths(rollout, network.sensor, images, truth=truth, **known)


@torch.no_grad()
def read_paths(
    rollout: Any,
    sensor: Sensor,
    images: Float[Tensor, "b c h w"],
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    labels: Sequence[str] | None = None,
    truth: Int[Tensor, "b *s"] | None = None,
    targets: int = 1,
) -> list[Scanpath]:
    """Return the path of each roll-out, as far as it was gone.

    What was seen is divided by what the sensor makes of a white image: a window's strength, or what part of a patch's
    pixel is in the image.

    Args:
        rollout: A ``visattn.models.looker.Rollout``; those of an image come one after the other.
        sensor: What took the glimpses.
        images: What it took them of.
        mean: What was taken from each channel.
        std: What each channel was divided by.
        labels: What the classes are called; left out, their numbers.
        truth: The class of each image, or its classes one after another, where they are known.
        targets: How many classes are told one after another.

    Raises:
        ValueError: If there are not equally many roll-outs of each image, or not as many classes as are said.
    """
    locations, size = rollout.locations, (images.shape[2], images.shape[3])
    count, steps, classes = rollout.logits.shape
    if not len(images) or count % len(images):
        raise ValueError(f"rollout must have equally many rows for each of {len(images)} images, got {count}")
    if truth is not None and truth.numel() != len(images) * targets:
        raise ValueError(f"truth must be {targets} for each of {len(images)} images, got {tuple(truth.shape)}")
    if labels is not None and len(labels) != classes:
        raise ValueError(f"labels must name each of the {classes} classes, got {len(labels)}")
    where = locations.flatten(0, 1)
    seen, white = (
        sensor(sensor.prepare(each), where).float().cpu() for each in (images.float(), torch.ones_like(images[:1, :1]))
    )
    shape = (count, steps, *seen.shape[1:2])
    seen = (seen / white.clamp_min(LEAST)).permute(2, 0, 1, 3, 4)
    shades = denormalise(seen.flatten(1, 3), mean, std).reshape(*shape, *seen.shape[3:], 3)
    opaque = np.where(white[:, :, 0, :, :, None] > LEAST, 255, 0).astype(np.uint8)
    patches = np.concatenate((shades, opaque.reshape(*shades.shape[:-1], 1)), -1)
    corners = sensor.corners(where, size).double().cpu().numpy().reshape(*shape, 4, 2)
    photos = [denormalise(image, mean, std) for image in images]
    probabilities = rollout.logits.float().softmax(-1).cpu().numpy()
    halting = None if rollout.halting is None else rollout.halting.float().cpu().numpy()
    weights, paths = rollout.weights.float().cpu().numpy(), []
    told = None if truth is None else truth.view(len(images), targets).repeat_interleave(steps // targets, 1).tolist()
    for row, taken in enumerate(rollout.glimpses.tolist()):
        image = row // (count // len(images))
        paths.append(
            Scanpath(
                photos[image],
                corners[row, :taken],
                patches[row, :taken],
                probabilities[row, :taken],
                labels or [*map(str, range(classes))],
                None if told is None else told[image][:taken],
                targets,
                weights[row] if taken == steps and weights[row, :-1].any() else None,
                None if halting is None else halting[row, :taken],
            )
        )
    return paths


def within(
    corners: Float[ndarray, "*n 4 2"], points: Float[ndarray, "p 2"]
) -> tuple[Float[ndarray, "*n p 2"], Bool[ndarray, "*n p"]]:
    """Return how far, across and down, points lie from the upper left corners of parallelograms, and if inside.

    Example:
        >>> square = np.array([[2.0, 2], [6, 2], [6, 6], [2, 6]])
        >>> place, inside = within(square, np.array([[3.0, 5.0], [7.0, 6.0]]))
        >>> place.tolist(), inside.tolist()
        ([[0.25, 0.75], [1.25, 1.0]], [True, False])
    """
    first, right, _, down = np.moveaxis(np.asarray(corners, np.float64)[..., None, :], -3, 0)
    x, y = np.moveaxis(points - first, -1, 0)
    (across_x, across_y), (down_x, down_y) = (np.moveaxis(end - first, -1, 0) for end in (right, down))
    with np.errstate(divide="ignore", invalid="ignore"):  # a parallelogram may be flat
        area = across_x * down_y - across_y * down_x
        place = np.stack(((x * down_y - y * down_x) / area, (across_x * y - across_y * x) / area), -1)
    return place, np.asarray(((place >= 0) & (place < 1)).all(-1))


def pixel_centres(size: tuple[int, int], shape: tuple[int, int]) -> Float[ndarray, "p 2"]:
    """Return the centres (x, y) of the cells into which an image is divided, row by row, in its pixels."""
    y, x = ((np.arange(cells) + 0.5) * side / cells for side, cells in zip(size, shape, strict=True))
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def reconstructed(path: Scanpath, glimpses: int, *, factor: int = 1) -> UInt8[ndarray, "h2 w2 4"]:
    """Return what was seen in the first so many glimpses, each pixel of a patch where it is from; else transparent.

    Finer ones lie on coarser ones, and of those as fine, later ones on earlier ones.

    Args:
        path: Where was looked.
        glimpses: How many glimpses there are.
        factor: How many times larger than the image this is.
    """
    height, width = (factor * side for side in path.photo.shape[:2])
    corners = path.corners[:glimpses].reshape(-1, 4, 2)
    patches = path.patches[:glimpses].reshape(-1, *path.patches.shape[2:])
    sides = corners[:, [1, 3]] - corners[:, :1]
    areas = np.abs(sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0])
    seen = np.zeros((height, width, 4), np.uint8)
    for number in np.argsort(-np.log(areas.clip(LEAST)).round(3), kind="stable"):
        left, top = np.floor(factor * corners[number].min(0)).clip(0, (width, height)).astype(int)
        right, bottom = np.ceil(factor * corners[number].max(0)).clip(0, (width, height)).astype(int)
        points = (np.mgrid[top:bottom, left:right].T + 0.5)[..., ::-1] / factor  # column by column
        place, inside = within(corners[number], points.reshape(-1, 2))
        column, row = (place[inside] * patches.shape[1]).astype(int).T
        found = patches[number][row, column]
        x, y = np.divmod(np.flatnonzero(inside)[found[:, 3] > 0], max(1, bottom - top))
        seen[top + y, left + x] = found[found[:, 3] > 0]
    return seen


def listed(path: Scanpath, top: int) -> list[int]:
    """Return the classes of which probabilities are drawn, the likeliest in the end first.

    They are what was decided and is true, where that is known, and what was at any time the likeliest.
    """
    each = len(path.probabilities) // path.targets
    decided = path.probabilities[each - 1 :: each]
    most, last = path.probabilities.max(0).astype(float), decided.max(0)
    kept = [*decided.argmax(1), *(path.truth or [])]
    most[kept] = 2
    chosen = np.argsort(-most, kind="stable")[: max(top, len(set(kept)))]
    return chosen[np.argsort(-last[chosen], kind="stable")].tolist()


# --- drawing ----------------------------------------------------------------------------------------------------------


def enlarged(photo: UInt8[ndarray, "h w c"]) -> UInt8[ndarray, "h2 w2 c"]:
    """Return a photo whose pixels are squares, if it is small."""
    factor = factor_of(photo)
    return photo.repeat(factor, 0).repeat(factor, 1)


def factor_of(photo: UInt8[ndarray, "h w c"]) -> int:
    """Return how many times a photo is enlarged to be drawn."""
    return math.ceil(FINE / max(photo.shape[:2]))


def colours(steps: int) -> list[str]:
    """Return the colour of each glimpse, from dark to light."""
    return [to_hex(each) for each in colormaps[COLOURS](np.linspace(DARKEST, 1, max(2, steps))[:steps])]


def draw_glimpses(axes: Axes, path: Scanpath, glimpses: int, *, numbers: bool = True) -> None:
    """Draw the first so many glimpses over the image, on a line from centre to centre, and boxes of what they cover.

    Args:
        axes: Where to draw.
        path: Where was looked.
        glimpses: How many glimpses there are.
        numbers: Whether all have their numbers and a box of their finest patch; otherwise the last one has boxes of all
            its patches.
    """
    height, width = path.photo.shape[:2]
    show(axes, enlarged(path.photo), (height, width))
    colour, image = colours(len(path.corners)), Bbox([[0, 0], [width, height]])

    def line(points: ndarray, step: int, wide: float) -> None:
        around = [withStroke(linewidth=wide + 1.5, foreground=AROUND)]
        (drawn,) = axes.plot(*points.T, color=colour[step], linewidth=wide, path_effects=around, clip_on=False)
        drawn.set_zorder(2 + wide / 10)  # bold ones above

    centres = path.corners[:glimpses, 0].mean(1)
    for step in range(1, glimpses):
        line(centres[step - 1 : step + 1], step, 1.7 if numbers else 0.8)
    for step in range(0 if numbers else glimpses - 1, glimpses):
        for scale, corners in enumerate(path.corners[step][:1] if numbers else path.corners[step]):
            for part in Outline([*corners, corners[0]], closed=True).clip_to_bbox(image).to_polygons():
                line(np.asarray(part), step, 1.0 if scale else 1.8)
    for step, (x, y) in enumerate(centres):
        size, above = 11.5 if numbers else 3.0, 3 + step / glimpses
        mark = axes.plot(x, y, "o", color=colour[step], markersize=size, markeredgecolor=AROUND, zorder=above)
        mark[0].set_clip_on(False)
        if numbers:
            axes.annotate(str(step + 1), (x, y), fontsize=7.5, ha="center", va="center_baseline", zorder=above)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def draw_seen(axes: Axes, path: Scanpath, glimpses: int) -> None:
    """Draw what was seen in the first so many glimpses, hatched where nothing was."""
    height, width = path.photo.shape[:2]
    axes.add_patch(Rectangle((0, 0), width, height, facecolor=UNSEEN, edgecolor=HATCH, hatch="////", lw=0, zorder=-1))
    show(axes, reconstructed(path, glimpses, factor=factor_of(path.photo)), (height, width))


def draw_probabilities(axes: Axes, path: Scanpath, step: int, *, top: int = 5, names: bool = True) -> None:
    """Draw bars of what the image was taken for after a glimpse, and how much that counts, where it is known.

    The true class is blue, where it is known, else the likeliest is dark.

    Args:
        axes: Where to draw.
        path: Where was looked.
        step: The glimpse, counted from 0.
        top: How many classes there are, at most, unless decision and truth are more.
        names: Whether to write what the bars are.
    """
    values, truth = path.probabilities[step], path.truth[step] if path.truth else None
    rows = rows_of(path, top)
    for _, row, what in rows:
        if isinstance(what, int):
            value = values[what]
            colour = TRUE if what == truth else LEADS if what == values.argmax() else OTHER
        else:
            value, colour = what[step], SHARE
        axes.barh(row, value, height=0.72, color=colour)
        inside = value > 0.6
        axes.text(
            value + (-0.03 if inside else 0.03),
            row,
            f"{value:.2f}",
            fontsize=6.5,
            color="white" if inside else "black",
            ha="right" if inside else "left",
            va="center_baseline",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(rows[-1][1] + 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([row for _, row, _ in rows], [name for name, *_ in rows] if names else [""] * len(rows))
    axes.tick_params(labelsize=8, length=0, pad=3)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    for text, (_, _, what) in zip(axes.get_yticklabels(), rows, strict=True):
        if path.targets == 1 and isinstance(what, int) and what == truth:
            text.set(color=TRUE, fontweight="bold")


def rows_of(path: Scanpath, top: int) -> list[tuple[str, float, Any]]:
    """Return the bars of a path: their names, where they are, counted from above, and of what class or shares."""
    rows: list[tuple[str, float, Any]] = []
    for k in listed(path, top):
        name = path.labels[k]
        name = name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"
        true = path.targets == 1 and path.truth is not None and path.truth[0] == k
        rows.append((f"{name} (true)" if true else name, float(len(rows)), k))
    for name, shares in (("weight", path.weights), ("stops here", path.halting)):
        if shares is not None:
            rows.append((name, len(rows) + 0.5, shares))
    return rows


def names_of(path: Scanpath, top: int) -> float:
    """Return how wide the names of the bars of a path are, in inches."""
    return 0.2 + 0.075 * max(len(name) for name, *_ in rows_of(path, top))


def draw_path(path: Scanpath, *, title: str = "", columns: int = 8, top: int = 5) -> Figure:
    """Draw where a network looked in an image: all of the path, then for each glimpse what was seen until then.

    A column for each glimpse has its boxes over the image, one for each patch; what was seen of the image until then,
    hatched where nothing was; and what it was taken for.

    Args:
        path: One of :func:`follow`.
        title: A line above it all.
        columns: How many glimpses are side by side; the others follow below.
        top: How many classes there are, at most, unless decision and truth are more.
    """
    if min(columns, top) < 1:
        raise ValueError(f"columns and top must be at least 1, got {columns} and {top}")
    steps, aspect = len(path.corners), min(max(path.photo.shape[1] / path.photo.shape[0], 0.4), 2.5)
    blocks = math.ceil(steps / columns)
    across = math.ceil(steps / blocks)
    wide, high = SIDE * math.sqrt(aspect), SIDE / math.sqrt(aspect)
    below = BAR * (rows_of(path, top)[-1][1] + 1)
    block = HEAD + 2 * (high + GAP) + below + GAP
    left = max(2 * wide + 3 * GAP, names_of(path, top)) + GAP
    above = 0.34 if title else 0.02
    figure = canvas(left + across * (wide + GAP), above + blocks * block + GAP / 2, layout=None)
    draw_glimpses(panel(figure, GAP, above + HEAD, 2 * wide + GAP, 2 * high + GAP), path, steps)
    for step in range(steps):
        row, column = divmod(step, across)
        x, y = left + column * (wide + GAP), above + row * block + HEAD
        panels = [panel(figure, x, y + part * (high + GAP), wide, high) for part in (0, 1)]
        panels.append(panel(figure, x, y + 2 * (high + GAP), wide, below))
        draw_glimpses(panels[0], path, step + 1, numbers=False)
        panels[0].set_title(str(step + 1), fontsize="medium", pad=4)
        draw_seen(panels[1], path, step + 1)
        draw_probabilities(panels[2], path, step, top=top, names=column == 0)
    size = figure.get_size_inches()
    figure.text(GAP / size[0], 1 - 0.19 / size[1], title, fontsize="large", va="center")
    return figure


def film_path(path: Scanpath, file: str | Path, *, title: str = "", seconds: float = 0.8, top: int = 5) -> Path:
    """Write where a network looked in an image as an endless film, a picture for each glimpse, and return its file.

    Args:
        path: One of :func:`follow`.
        file: Where to; the suffix is ``.gif``.
        title: A line above it all.
        seconds: How long a glimpse stays.
        top: How many classes there are, at most, unless decision and truth are more.
    """
    with TemporaryDirectory() as folder:
        pictures = []
        for step in range(len(path.corners)):
            pictures.append(Path(folder, f"{step:05d}.png"))
            draw_glimpse(path, step, title=title, top=top).savefig(pictures[-1])
        return film(pictures, file, seconds=seconds)


def draw_glimpse(path: Scanpath, step: int, *, title: str = "", top: int = 5) -> Figure:
    """Draw a glimpse, counted from 0, with those before: where they are, what was seen, what that was taken for."""
    aspect = min(max(path.photo.shape[1] / path.photo.shape[0], 0.4), 2.5)
    wide, high = 2 * SIDE * math.sqrt(aspect), 2 * SIDE / math.sqrt(aspect)
    above = HEAD + 0.3 * bool(title)
    left, below = 3 * GAP + 2 * wide + names_of(path, top), 1.3 * BAR * (rows_of(path, top)[-1][1] + 1)
    figure = canvas(left + 2 * SIDE + GAP, above + max(high, below) + GAP, layout=None)
    where, seen = (panel(figure, GAP + part * (wide + GAP), above, wide, high) for part in (0, 1))
    bars = panel(figure, left, above, 2 * SIDE, below)
    draw_glimpses(where, path, step + 1, numbers=False)
    draw_seen(seen, path, step + 1)
    draw_probabilities(bars, path, step, top=top)
    where.set_title(f"glimpse {step + 1} of {len(path.corners)}", fontsize="medium", pad=4)
    seen.set_title("seen so far", fontsize="medium", pad=4)
    size = figure.get_size_inches()
    figure.text(GAP / size[0], 1 - 0.18 / size[1], title, fontsize="large", va="center")
    return figure
