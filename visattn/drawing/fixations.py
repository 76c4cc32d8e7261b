"""Where each class is looked for: over a data set, how often glimpses lie on each part of an image."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from visattn.drawing.figure import canvas, panel, show
from visattn.drawing.overlay import COLOURS
from visattn.drawing.path import pixel_centres, within
from visattn.drawing.photo import denormalise

CELLS = 64  # of a map, at most, down and across
SIDE, GAP = 0.9, 0.06  # of a panel, in inches


class Fixations:
    """Sums up where images of each class are looked at, glimpse by glimpse.

    A glimpse counts one, spread evenly over the cells of the map whose centres its finest patch covers, or if there are
    none, is in the cell nearest to it. A cell is a pixel, or of large images a square of them.

    Args:
        classes: Number of classes.
        glimpses: How many glimpses are taken of an image.
        size: Channels, height and width of the images.

    Raises:
        ValueError: If an argument is less than 1.

    Example:
        >>> fixations = Fixations(10, 1, (1, 28, 28))
        >>> square = torch.tensor([[0.0, 0.0], [8.0, 0.0], [8.0, 4.0], [0.0, 4.0]])
        >>> fixations.add(torch.rand(1, 1, 28, 28), square[None, None], torch.tensor([3]))
        >>> fixations.maps[3, 0, 0, 0], fixations.counts[3]
        (tensor(0.0312), tensor([1.]))
    """

    maps: Float[Tensor, "c t h w"]
    """How often each class was looked for in each cell, in each glimpse."""
    counts: Float[Tensor, "c t"]
    """How many glimpses there were."""
    images: Float[Tensor, "c d h w"]
    """The sums of the images of each class, as they were given."""
    shown: Float[Tensor, "c"]
    """How many images these are."""

    def __init__(self, classes: int, glimpses: int, size: tuple[int, int, int]):
        if min(classes, glimpses, *size) < 1:
            raise ValueError(f"classes, glimpses and size must be at least 1, got {classes}, {glimpses} and {size}")
        channels, *self.size = size
        side = math.ceil(max(self.size) / CELLS)
        self.cells = (math.ceil(self.size[0] / side), math.ceil(self.size[1] / side))
        self.maps = torch.zeros(classes, glimpses, *self.cells)
        self.counts = torch.zeros(classes, glimpses)
        self.images = torch.zeros(classes, channels, *self.cells)
        self.shown = torch.zeros(classes)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """All that is summed up; added over several processes, it is that of all their images."""
        return self.maps, self.counts, self.images, self.shown

    def add(
        self,
        images: Float[Tensor, "b d h w"],
        corners: Float[Tensor, "m t 4 2"],
        targets: Int[Tensor, "b *s"],
        taken: Int[Tensor, "m"] | None = None,
    ) -> None:
        """Count the glimpses of images.

        Args:
            images: The images.
            corners: What the finest patch of each glimpse covers, as :meth:`~Sensor.corners` says; several roll-outs of
                an image come one after the other.
            targets: The class of each image, or its classes one after another, each looked for by equally many
                glimpses.
            taken: How many glimpses of each roll-out count; left out, all.

        Raises:
            ValueError: If images, glimpses and targets do not fit each other.
        """
        count, glimpses = corners.shape[:2]
        if tuple(images.shape[2:]) != tuple(self.size) or glimpses != self.maps.shape[1]:
            wanted = f"{self.size[0]} × {self.size[1]} with {self.maps.shape[1]} glimpses"
            raise ValueError(
                f"images must be of {wanted}, got {images.shape[2]} × {images.shape[3]} with {glimpses} glimpses"
            )
        each = targets.reshape(len(targets), -1).cpu().long()
        if len(each) != len(images) or count % len(images) or glimpses % each.shape[1]:
            shapes = f"{tuple(corners.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"corners and targets must fit {len(images)} images, got {shapes}")
        small = F.adaptive_avg_pool2d(images.float(), self.cells).cpu()
        for kinds in each.unbind(1):
            self.images.index_add_(0, kinds, small)
            self.shown.index_add_(0, kinds, torch.ones(len(kinds)))
        told = each.repeat_interleave(count // len(images), 0).repeat_interleave(glimpses // each.shape[1], 1)
        for step in range(glimpses):
            there = torch.ones(count, dtype=torch.bool) if taken is None else taken.cpu() > step
            kinds = told[there, step]
            spread = self.spread(corners[there.to(corners.device), step].double().cpu().numpy())
            self.maps[:, step].index_add_(0, kinds, torch.from_numpy(spread).float())
            self.counts[:, step].index_add_(0, kinds, torch.ones(len(kinds)))

    def spread(self, corners: Float[ndarray, "m 4 2"]) -> Float[ndarray, "m h w"]:
        """Return the map of each glimpse."""
        points = pixel_centres((self.size[0], self.size[1]), self.cells)
        inside = within(corners, points)[1].astype(float)
        missed = np.flatnonzero(~inside.any(1))
        distances = np.square(corners[missed].mean(1)[:, None] - points).sum(-1)
        inside[missed, distances.argmin(1)] = 1
        return (inside / inside.sum(1, keepdims=True)).reshape(-1, *self.cells)


def draw_fixations(
    fixations: Fixations,
    labels: Sequence[str] | None = None,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    columns: int = 12,
    title: str = "",
) -> Figure:
    """Draw where classes are looked for: a column for all, and for each class, a row for each glimpse, and for all.

    Brightness says how many times as often as if glimpses were spread evenly; the mean image is below.

    Args:
        fixations: What was summed up.
        labels: What the classes are called; left out, their numbers.
        mean: What was taken from each channel of the images.
        std: What each channel was divided by.
        columns: How many classes there are, at most: those with most of the images.
        title: A line above it all.

    Raises:
        ValueError: If there are no images.
    """
    if not fixations.shown.any():
        raise ValueError("fixations must be of at least one image, got none")
    most = fixations.shown.argsort(descending=True, stable=True)[:columns].sort().values
    chosen = [k for k in most.tolist() if fixations.shown[k]]
    several = len(chosen) > 1
    groups = [[*range(len(fixations.shown))]] * several + [[k] for k in chosen]
    names = ["all"] * several + [labels[k] if labels else str(k) for k in chosen]
    glimpses = fixations.maps.shape[1]
    heats = []
    for group in groups:
        maps, counts = fixations.maps[group].sum(0), fixations.counts[group].sum(0)
        maps, counts = torch.cat((maps, maps.sum(0, keepdim=True))), torch.cat((counts, counts.sum(0, keepdim=True)))
        heats.append((maps / counts.clamp_min(1)[:, None, None] * maps[0].numel()).numpy())
    greatest = max(float(heat.max()) for heat in heats)
    rows = [f"glimpse {step + 1}" for step in range(glimpses)] + ["all glimpses"] * (glimpses > 1) + ["mean image"]
    aspect = min(max(fixations.size[1] / fixations.size[0], 0.4), 2.5)
    wide, high = SIDE * math.sqrt(aspect), SIDE / math.sqrt(aspect)
    left, above, scale = 1.0, 0.34 * bool(title) + 0.24, 0.85
    width = left + len(groups) * (wide + GAP) + scale
    figure = canvas(max(width, 3.6), above + len(rows) * (high + GAP) + GAP, layout=None)
    size = figure.get_size_inches()
    norm = PowerNorm(0.5, 0, greatest)  # roots, so that little is told from nothing
    for column, (name, group, heat) in enumerate(zip(names, groups, heats, strict=True)):
        pictures = [*heat[: len(rows) - 1]]
        photo = denormalise(fixations.images[group].sum(0) / fixations.shown[group].sum(), mean, std)
        for row in range(len(rows)):
            axes = panel(figure, left + column * (wide + GAP), above + row * (high + GAP), wide, high)
            if row < len(pictures):
                axes.imshow(pictures[row], cmap=COLOURS, norm=norm, extent=(0, fixations.size[1], fixations.size[0], 0))
                axes.set_axis_off()
            else:
                show(axes, photo, (fixations.size[0], fixations.size[1]))
            if not row:
                axes.set_title(name if len(name) <= 12 else f"{name[:11]}…", fontsize="small", pad=3)
    for row, name in enumerate(rows):
        middle = 1 - (above + row * (high + GAP) + high / 2) / size[1]
        figure.text((left - GAP) / size[0], middle, name, fontsize="small", ha="right", va="center")
    place = panel(figure, left + len(groups) * (wide + GAP) + 0.08, above, 0.1, 2 * (high + GAP) - GAP)
    marks = [mark for mark in (0, 1, 3, 10, 30, 100, 300) if mark <= greatest]
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), cax=place, ticks=marks)
    bar.minorticks_off()
    bar.set_ticklabels([str(mark) for mark in marks])
    bar.ax.tick_params(labelsize="small", length=2)
    bar.set_label("times an even spread", fontsize="small")
    bar.outline.set_visible(False)
    figure.text(GAP / size[0], 1 - 0.18 / size[1], title, fontsize="large", va="center")
    return figure
