"""Digits on a canvas: turned, warped, moved, among others and among scraps of others, with everything known of them."""

import copy
import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from visattn.data.images import Once, Resumable, Shuffled
from visattn.data.sources import DataError, Pixels, Split, download, open_source
from visattn.data.transforms import Preprocess, spread

Place = Literal["centre", "anywhere"]
Warp = Literal["affine", "projective", "elastic"]
Target = Literal["ordered", "pair", "sum", "sequence"]
Preset = Literal[
    "plain",
    "rotated",
    "rotated_scaled_translated",
    "projective",
    "elastic",
    "translated",
    "cluttered_transformer",
    "cluttered_recurrent",
    "cluttered_large",
    "pairs",
    "sums",
    "sequences",
    "colocalised",
    "addition",
]
DIGIT = 28  # height and width of MNIST's images
TRIES = 16  # how often corners are moved until they span a convex quadrilateral
CORNERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
END = "end"  # what the label behind the last of a sequence is called
FAR = 1e4  # where points beyond the horizon of a homography go


@dataclass(frozen=True)
class Layout:
    """What a canvas holds. Lengths are in pixels.

    Args:
        size: Height and width, or one number for both.
        digits: How many digits there are.
        fewest: How many there are at least, for sequences: all numbers from it to ``digits`` are equally likely; None:
            always ``digits``.
        place: Where they are: in the centre, or anywhere on the canvas, at whole pixels if they are neither rotated nor
            scaled nor warped. There the first and the last row and column are as likely as others.
        rotate: Greatest angle of rotation, in degrees, either way.
        scale: Least and greatest factor of size.
        warp: What happens then: nothing; each corner of the canvas is moved, as long as they span a convex
            quadrilateral; or each of 4 × 4 points spread evenly over it is, and the rest as a thin plate bends.
        jitter: Standard deviation of these movements, in x and in y.
        patches: How many square patches of other digits' images are strewn over the canvas (over each channel).
        patch_size: Height and width of a patch.
        target: What is to be told: the digits from left to right as one number, of one digit its class; which two
            digits there are in any order; their sum; or the class of each from left to right, as a sequence in which
            the rest is filled with a class of its own, at least once.
        separate: Whether each digit has a channel of its own. Otherwise overlapping ones are added, and clipped at 1.

    Raises:
        ValueError: If a value is out of its range.
    """

    size: int | tuple[int, int] = DIGIT
    digits: int = 1
    fewest: int | None = None
    place: Place = "centre"
    rotate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    warp: Warp = "affine"
    jitter: float = 0.0
    patches: int = 0
    patch_size: int = 8
    target: Target = "ordered"
    separate: bool = False

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.digits, self.patch_size) < 1:
            raise ValueError(
                f"size, digits and patch_size must be at least 1, got {self.size}, {self.digits} and {self.patch_size}"
            )
        for name, kinds in (("place", Place), ("warp", Warp), ("target", Target)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate must lie between 0 and 180, got {self.rotate}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two positive factors, the lesser first, got {self.scale}")
        for name in ("jitter", "patches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.target == "pair" and self.digits != 2:
            raise ValueError(f"target='pair' needs two digits, got digits={self.digits}")
        if self.fewest is not None and self.target != "sequence":
            raise ValueError(f"fewest must be left out without target='sequence', got {self.fewest}")
        if self.fewest is not None and not 1 <= self.fewest <= self.digits:
            raise ValueError(f"fewest must lie between 1 and digits={self.digits}, got {self.fewest}")

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def channels(self) -> int:
        return self.digits if self.separate else 1

    @property
    def exact(self) -> bool:
        """Whether digits keep their pixels."""
        return self.warp == "affine" and self.rotate == 0 and tuple(self.scale) == (1, 1)


PRESETS: dict[Preset, Layout] = {
    "plain": Layout(),
    "rotated": Layout(rotate=90.0),
    "rotated_scaled_translated": Layout(42, place="anywhere", rotate=45.0, scale=(0.7, 1.2)),
    "projective": Layout(scale=(0.75, 1.0), warp="projective", jitter=5.0),
    "elastic": Layout(scale=(0.75, 1.0), warp="elastic", jitter=1.5),
    "translated": Layout(60, place="anywhere"),
    "cluttered_transformer": Layout(60, place="anywhere", patches=6, patch_size=6),
    "cluttered_recurrent": Layout(60, place="anywhere", patches=4),
    "cluttered_large": Layout(100, place="anywhere", patches=8),
    "pairs": Layout(100, digits=2, place="anywhere", target="pair"),
    "sums": Layout(100, digits=2, place="anywhere", target="sum"),
    "sequences": Layout(100, digits=3, fewest=1, place="anywhere", target="sequence"),
    "colocalised": Layout(84, place="anywhere", patches=16, patch_size=6),
    "addition": Layout(42, digits=2, place="anywhere", rotate=45.0, scale=(0.7, 1.2), target="sum", separate=True),
}


class CanvasBatch(NamedTuple):
    """Canvases and what is on them. Digits are ordered from left to right, or as their channels are."""

    images: Tensor
    """(b, c, h, w)."""
    labels: Tensor
    """(b), what is to be told; of sequences (b, k + 1)."""
    boxes: Tensor
    """(b, k, 4), the first column and row of what is seen of each digit, and those behind its last; zeros if nothing.
    Seen is what is brighter than a tenth, whatever else lies there."""
    digit_labels: Tensor
    """(b, k), the class of each digit; -1 behind the last, where there are fewer than ``digits``."""
    transform: Tensor
    """Where each digit comes from, as :func:`mapped` takes it: (b, k, 2, 3), (b, k, 3, 3) or (b, k, 16, 2)."""


class Chance:
    """Random numbers for many samples at once; those of each follow from its place alone, whatever is beside it.

    A counter is hashed by the steps of SplitMix64.

    Args:
        place: Whole numbers, or arrays of them, one entry a sample.
    """

    def __init__(self, *place: int | np.ndarray):
        self.state = np.zeros(1, np.uint64)
        self.drawn = 0
        for part in place:
            self.state = mixed(self.state + np.asarray(part, np.uint64))

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers between 0 and 1, neither included, in float64 and of this shape for each sample."""
        slots = np.arange(self.drawn, self.drawn + math.prod(shape), dtype=np.uint64)
        self.drawn += len(slots)
        bits = mixed(self.state[:, None] + slots) >> np.uint64(12)
        return torch.from_numpy((bits + 0.5) * 2.0**-52).reshape(len(self.state), *shape)

    def below(self, bound: "int | Tensor", *shape: int) -> Tensor:
        """Draw whole numbers from 0 to ``bound`` - 1."""
        return (self.uniform(*shape) * bound).long()

    def normal(self, *shape: int) -> Tensor:
        """Draw from the standard normal distribution."""
        return torch.special.ndtri(self.uniform(*shape))


def mixed(bits: np.ndarray) -> np.ndarray:
    """Return what SplitMix64 makes of its counter."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def pixel_centres(height: int, width: int) -> Tensor:
    """Return (x, y) of every pixel's centre, row by row, where the outer edges of an image lie at -1 and 1."""
    y, x = ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in (height, width))
    return torch.cartesian_prod(y, x).flip(1)


def lattice() -> Tensor:
    """Return (x, y) of the 4 × 4 points, row by row, at which an elastic warp is given."""
    line = torch.linspace(-1, 1, 4, dtype=torch.float64)
    return torch.cartesian_prod(line, line).flip(1)


def thin_plate(control: Tensor, points: Tensor) -> Tensor:
    """Return the matrix that takes values at ``control`` points to their thin-plate spline at ``points``."""

    def basis(x: Tensor) -> Tensor:
        squares = (x[:, None] - control).square().sum(-1)
        return torch.cat((torch.xlogy(squares, squares), torch.ones_like(x[:, :1]), x), 1)

    n = len(control)
    system = F.pad(basis(control), (0, 0, 0, 3))
    system[n:, :n] = system[:n, n:].T
    return torch.linalg.solve(system, basis(points).T)[:n].T


def mapped(points: Tensor, transform: Tensor) -> Tensor:
    """Map points of the canvas to where they come from in the images of its digits.

    Coordinates are (x, y), and the outer edges of canvas and image lie at -1 and 1 (``align_corners=False``). So
    ``grid_sample(image, mapped(centres of the canvas's pixels, transform))`` shows the digit on the canvas. To put it
    upright again needs the inverse map; a spatial transformer that did would yield points which this takes to those of
    an upright grid.

    Args:
        points: (n, 2).
        transform: (…, 2, 3), affine; (…, 3, 3), homographies; or (…, 16, 2), to where a thin plate takes the points of
            a 4 × 4 grid, row by row, whose outer ones lie at -1 and 1.

    Returns:
        (…, n, 2). What is beyond the horizon of a homography is far away.

    Example:
        >>> mapped(torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.25]]))
        tensor([[0.0000, 0.7500]])
    """
    points = points.to(transform.dtype)
    if transform.shape[-2:] == (16, 2):
        return thin_plate(lattice(), points.double()).to(transform.dtype) @ transform
    ends = points @ transform[..., :2].mT + transform[..., None, :, 2]
    if transform.shape[-2] == 2:
        return ends
    depth = ends[..., 2:]
    return torch.where(depth > 1 / FAR, ends[..., :2] / depth.clamp_min(1 / FAR), FAR)


def homography(ends: Tensor) -> Tensor:
    """Return the homographies (…, 3, 3) that take the corners of [-1, 1]², clockwise, to ``ends`` (…, 4, 2)."""
    corners = F.pad(CORNERS, (0, 1), value=1).expand(*ends.shape[:-1], 3)
    zeros = torch.zeros_like(corners)
    x, y = ends[..., :1], ends[..., 1:]
    system = torch.cat(
        (
            torch.cat((corners, zeros, -x * corners[..., :2]), -1),
            torch.cat((zeros, corners, -y * corners[..., :2]), -1),
        ),
        -2,
    )
    entries = torch.linalg.solve(system, torch.cat((x, y), -2))[..., 0]
    return F.pad(entries, (0, 1), value=1).unflatten(-1, (3, 3))


def convex(corners: Tensor) -> Tensor:
    """Say whether quadrilaterals (…, 4, 2) are convex, their corners clockwise, and no three nearly in line."""
    edges = corners.roll(-1, -2) - corners
    following = edges.roll(-1, -2)
    return (edges[..., 0] * following[..., 1] - edges[..., 1] * following[..., 0] > 1).all(-1)


def ink(images: Tensor) -> Tensor:
    """Return the boxes (…, 4) of what is brighter than a tenth in images (…, h, w) of bytes, or of floats up to 1."""
    seen = images > (25 if images.dtype == torch.uint8 else 25.5 / 255)
    bounds = []
    for axis in (-2, -1):
        lines = seen.any(axis).byte()
        bounds.append((lines.argmax(-1), (lines.shape[-1] - lines.flip(-1).argmax(-1)) * lines.amax(-1)))
    (left, right), (top, bottom) = bounds
    return torch.stack((left, top, right, bottom), -1)


class Canvases(Dataset):
    """The canvases of a split, made from its digits when they are asked for, all of a batch at once.

    Canvas ``index`` has digit ``index`` of the split on it. All else on it comes from the same split, too, and follows
    from (seed, split, epoch, index) alone.

    Args:
        called: What the split is called.
        split: The digits: bytes of shape (n, h, w). Smaller images than MNIST's are brought into the same form.
        layout: What a canvas holds.
        classes: How many classes of digits there are.
        preprocess: How batches are normalised; None: not at all.
        seed: Where the random numbers start.
        train: Whether every epoch has its own canvases.
        give: What batches are: images with labels, images with names, or all that is known.

    Raises:
        DataError: If there are too few digits, or they are not grey images in memory.
        ValueError: If digits or patches do not fit.

    Example:
        >>> split = open_source("digits").splits["train"]
        >>> canvases = Canvases("train", split, PRESETS["cluttered_large"], classes=10)
        >>> batch = canvases.batch(range(8), epoch=3)
        >>> batch.images.shape, batch.labels.tolist(), batch.boxes.shape
        (torch.Size([8, 1, 100, 100]), [0, 1, 2, 3, 4, 5, 6, 7], torch.Size([8, 1, 4]))
    """

    def __init__(
        self,
        called: str,
        split: Split,
        layout: Layout,
        *,
        classes: int,
        preprocess: Preprocess | None = None,
        seed: int = 0,
        train: bool = False,
        give: Literal["labels", "names", "all"] = "labels",
    ):
        if not isinstance(split.place, Pixels) or split.place.pixels.ndim != 3:
            raise DataError("a canvas needs grey images in memory: digits, MNIST, FashionMNIST or KMNIST")
        needed = 2 if layout.digits > 1 or layout.patches else 1
        if len(split) < needed:
            raise DataError(f"{called} must have at least {needed} images for such canvases, got {len(split)}")
        self.digits = framed(torch.from_numpy(split.place.pixels[split.positions]))
        shape = self.digits.shape[1:]
        for needs, has in zip(shape, (layout.height, layout.width), strict=True):
            if has < needs * layout.scale[1]:
                raise ValueError(
                    f"size must be at least {math.ceil(needs * layout.scale[1])} for digits of {needs} pixels scaled "
                    f"by up to {layout.scale[1]:g}, got {has}"
                )
        if layout.patches and layout.patch_size > min(shape):
            raise ValueError(
                f"patch_size must be at most {min(shape)}, as high and wide as digits, got {layout.patch_size}"
            )
        self.called = called
        self.split = split
        self.layout = layout
        self.classes = classes
        self.preprocess = preprocess
        self.seed = seed
        self.train = train
        self.give = give
        self.targets = torch.from_numpy(split.targets)
        self.boxes = ink(self.digits)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, ...]:
        return tuple(part[0] for part in self.__getitems__([key]))

    def __getitems__(self, keys: "Sequence[int | tuple[int, int]]") -> "CanvasBatch | tuple[Tensor, Any]":
        """Return a batch, normalised, of indices or of pairs (epoch, index) with the same epoch."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        indices = [index for _, index in pairs]
        batch = self.batch(indices, pairs[0][0])
        images = batch.images
        if self.preprocess:
            mean, std = (torch.tensor(each)[:, None, None] for each in (self.preprocess.mean, self.preprocess.std))
            images = (images - mean) / std
        if self.give == "all":
            return batch._replace(images=images)
        return images, [self.name(index) for index in indices] if self.give == "names" else batch.labels

    def name(self, index: int) -> str:
        """Return what a canvas is called."""
        return self.split.name(index)

    def batch(self, indices: "Sequence[int] | Tensor", epoch: int = 0) -> CanvasBatch:
        """Make canvases, with values from 0 to 1, of an epoch; those of evaluation are the same in every one.

        Raises:
            IndexError: If there is no such digit.
        """
        first = torch.as_tensor(indices, dtype=torch.int64).reshape(-1, 1)
        if len(absent := first[(first < 0) | (first >= len(self))]):
            raise IndexError(f"index must lie between 0 and {len(self) - 1}, got {int(absent[0])}")
        layout, height, width = self.layout, self.layout.height, self.layout.width
        chance = Chance(self.seed, zlib.crc32(self.called.encode()), epoch if self.train else 0, first[:, 0].numpy())
        chosen = self.chosen(first, chance)
        least = layout.digits if layout.fewest is None else layout.fewest
        count = chance.below(layout.digits - least + 1, 1) + least if least < layout.digits else least
        absent = (torch.arange(layout.digits) >= count).expand(chosen.shape)
        corner, transform = self.placed(chance, absent)
        labels = self.targets[chosen].masked_fill(absent, -1)
        layers = self.digits[chosen].masked_fill(absent[..., None, None], 0)
        if layout.exact:
            images = torch.zeros(len(first), layout.channels, height * width)
            put(images, layers, corner, width)
            boxes = self.boxes[chosen].masked_fill(absent[..., None], 0)
            boxes = boxes + corner.repeat(1, 1, 2) * boxes.any(-1, keepdim=True)
        else:
            grid = mapped(pixel_centres(height, width), transform).reshape(-1, height, width, 2)
            shown = F.grid_sample(layers.flatten(0, 1)[:, None] / 255, grid, align_corners=False)
            layers = shown.reshape(*chosen.shape, height, width)
            images = (layers if layout.separate else layers.sum(1, keepdim=True)).flatten(2)
            boxes = ink(layers)
        if layout.patches:
            self.strew(images, first, chance)
        images = images.clamp_(0, 1).reshape(-1, layout.channels, height, width)
        return CanvasBatch(images, self.told(labels), boxes, labels, transform)

    def chosen(self, first: Tensor, chance: Chance) -> Tensor:
        """Return which digits there are."""
        return torch.cat((first, self.others(first, self.layout.digits - 1, chance)), 1)

    def others(self, first: Tensor, count: int, chance: Chance) -> Tensor:
        """Draw digits other than the first."""
        return (first + 1 + chance.below(len(self.digits) - 1, count)) % len(self.digits)

    def placed(self, chance: Chance, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Draw where digits are: the column and row of their first pixels, if those are whole, and the transforms."""
        layout, k = self.layout, self.layout.digits
        canvas = torch.tensor((layout.width, layout.height), dtype=torch.float64)
        digit = torch.tensor(self.digits.shape[:0:-1], dtype=torch.float64)
        where = chance.uniform(k, 2)
        if layout.place == "centre":
            where.fill_(0.5)
        scale = layout.scale[0] + (layout.scale[1] - layout.scale[0]) * chance.uniform(k, 1)
        angle = math.radians(layout.rotate) * (2 * chance.uniform(k, 1) - 1)
        if layout.exact:
            centre = (where * (canvas - digit + 1)).floor() + digit / 2
        else:
            centre = scale * digit / 2 + where * (canvas - scale * digit)
        if not layout.separate:
            ordered = centre[..., :1].masked_fill(absent[..., None], torch.inf).argsort(1)
            centre, scale, angle = (each.take_along_dim(ordered, 1) for each in (centre, scale, angle))

        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack((torch.cat((cos, -sin), -1), torch.cat((sin, cos), -1)), -2) * scale[..., None]
        forth = turn * digit / canvas[:, None]
        back = forth.inverse()
        middle = 2 * centre / canvas - 1
        shift = -back @ middle[..., None]
        if layout.warp == "affine":
            transform = torch.cat((back, shift), -1)
        elif layout.warp == "elastic":
            points = lattice() + 2 * layout.jitter / canvas * chance.normal(k, 16, 2)
            transform = points @ back.mT + shift.mT
        else:
            moved = CORNERS * canvas / 2 + layout.jitter * chance.normal(k, TRIES, 4, 2)
            moved[:, :, -1] = CORNERS * canvas / 2  # if all else fails
            first = convex(moved).byte().argmax(-1)[..., None, None, None]
            ends = 2 * moved.take_along_dim(first, 2)[:, :, 0] / canvas
            whole = F.pad(torch.cat((back, shift), -1), (0, 0, 0, 1))
            whole[..., 2, 2] = 1
            transform = whole @ homography(ends).inverse()
        return (centre - digit / 2).long(), transform.float()

    def strew(self, images: Tensor, first: Tensor, chance: Chance) -> None:
        """Add patches of other digits' images, from anywhere in them to anywhere on the canvas."""
        layout, count, side = self.layout, self.layout.patches * self.layout.channels, self.layout.patch_size
        donors = self.others(first, count, chance)
        bounds = torch.tensor([self.digits.shape[:0:-1], (layout.width, layout.height)]) - side + 1
        source, goal = chance.below(bounds, count, 2, 2).unbind(2)
        x, y = (source[..., axis, None, None] + torch.arange(side) for axis in (0, 1))
        put(images, self.digits[donors[..., None, None], y.mT, x], goal, layout.width)

    def told(self, labels: Tensor) -> Tensor:
        """Turn the classes of digits into what is to be told of them."""
        if self.layout.target == "sequence":
            return F.pad(labels.masked_fill(labels < 0, self.classes), (0, 1), value=self.classes)
        if self.layout.target == "sum":
            return labels.sum(1)
        if self.layout.target == "ordered":
            return (labels * self.classes ** torch.arange(self.layout.digits - 1, -1, -1)).sum(1)
        less, more = labels.sort(1).values.unbind(1)
        return less * self.classes - less * (less - 1) // 2 + more - less


def framed(digits: Tensor) -> Tensor:
    """Enlarge images (n, h, w) of bytes that are smaller than MNIST's to their size, with a margin like theirs."""
    least = min(digits.shape[1:])
    if least >= DIGIT:
        return digits
    digits = F.pad(digits[:, None].float(), (round(least / 5),) * 4)
    larger = F.interpolate(digits, (DIGIT, DIGIT), mode="bicubic", align_corners=False)
    return larger[:, 0].round().clamp(0, 255).byte()


def put(canvas: Tensor, layers: Tensor, corner: Tensor, width: int) -> None:
    """Add bytes (b, k, h, w) to canvases (b, c, height * width), from the column and row ``corner`` (b, k, 2) on."""
    height, across = layers.shape[2:]
    rows = corner[..., 1, None, None] + torch.arange(height)[:, None]
    places = rows * width + corner[..., 0, None, None] + torch.arange(across)
    shape = *canvas.shape[:2], layers.shape[1] // canvas.shape[1] * height * across
    canvas.scatter_add_(2, places.reshape(shape), layers.reshape(shape) / 255)


def told_as(labels: list[str], layout: Layout) -> list[str]:
    """Return what the classes of a target are called, given what those of digits are."""
    if layout.target == "sequence":
        return [*labels, END]
    if layout.target == "ordered":
        return [", ".join(names) for names in itertools.product(labels, repeat=layout.digits)]
    if layout.target == "pair":
        return [", ".join(names) for names in itertools.combinations_with_replacement(labels, 2)]
    if labels != [*map(str, range(len(labels)))]:
        raise DataError(f"target='sum' needs digits, got {', '.join(labels)}")
    return [*map(str, range(layout.digits * (len(labels) - 1) + 1))]


class Canvas(pl.LightningDataModule):
    """Digits on canvases, made afresh for every epoch of training and fixed by a seed for evaluation.

    The digits of a canvas, and what is strewn among them, come from its own split: where ``val`` or ``test`` is
    missing, a share of the training digits is held out for it. Each digit of a split is on one canvas of an epoch, and
    may be on more by chance where there are several.

    The presets: ``plain``, digits as they are · those of spatial transformers (arXiv:1506.02025): ``rotated``,
    ``rotated_scaled_translated`` (42 × 42), ``projective``, ``elastic``, ``cluttered_transformer`` (60 × 60 with six
    6 × 6 patches), ``colocalised`` (84 × 84 with sixteen), ``addition`` (two digits in channels of 42 × 42) · those of
    recurrent attention (arXiv:1406.6247): ``translated`` (60 × 60), ``cluttered_recurrent`` (with four 8 × 8 patches),
    ``cluttered_large`` (100 × 100, with eight) · those of its sequel (arXiv:1412.7755): ``pairs`` and ``sums`` of two
    digits on 100 × 100, and ``sequences`` of one to three, which it has of house numbers. How many patches the papers
    have on 100 × 100 is not certain: set ``patches``.

    Options left out are the preset's. Batches are (images, labels), all of :class:`CanvasBatch` with ``described``, and
    (images, names) for prediction.

    Args:
        preset: What a canvas holds.
        root: The digits: digits (scikit-learn's, always there), MNIST, FashionMNIST, KMNIST, or a folder of such files.
        directory: Where a known set lies or is downloaded to.
        download: Whether to download a known set that is not there.
        size: Height and width of the canvas, or one number for both.
        digits: How many digits there are.
        fewest: How many there are at least, for sequences.
        place: Where they are: in the centre or anywhere.
        rotate: Greatest angle of rotation, in degrees, either way.
        scale: Least and greatest factor of a digit's size.
        warp: What happens then: nothing, four corners are moved, or 16 points of a thin plate.
        jitter: Standard deviation of these movements, in pixels.
        patches: How many patches of other digits are strewn over the canvas.
        patch_size: Height and width of a patch.
        target: What is to be told: the digits from left to right as one number, which two there are in any order, their
            sum, or each of them as a sequence with an end, of which labels have a column for each place.
        separate: Whether each digit has a channel of its own.
        in_chans: Channels of the input, 1 or 3 alike; left out, what a pretrained model expects, else 1.
        mean: Mean of each channel, on the scale from 0 to 1; left out, what a pretrained model expects, else 0.
        std: Standard deviation of each channel; left out, what a pretrained model expects, else 1.
        val_fraction: Share of each class that is held out for each of ``val`` and ``test`` that is missing.
        described: Whether batches hold all that is known of the canvases.
        batch_size: Canvases in a batch, on each device.
        workers: Processes that make canvases, on each device.
        seed: Where the random numbers start: which digits are held out, their order, and what is on the canvases.

    Raises:
        ValueError: If a value is out of its range; as its subclass ``DataError`` if something is wrong with the data.

    Example:
        >>> data = Canvas("cluttered_recurrent", batch_size=16)
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape, data.num_classes
        (torch.Size([16, 1, 60, 60]), torch.Size([16]), 10)
        >>> data.splits["val"].batch([0, 1]).digit_labels.shape
        torch.Size([2, 1])
    """

    kind: ClassVar[type[Canvases]] = Canvases
    multi_label: ClassVar[bool] = False
    preprocess: Preprocess | None
    """How canvases are normalised; None where digits have channels of their own. If set before ``setup`` (to what a
    pretrained model expects), options that are left out are taken from it."""
    labels: list[str]
    """What each class is called."""

    def __init__(
        self,
        preset: Preset = "translated",
        *,
        root: str = "digits",
        directory: str = "data",
        download: bool = False,
        size: int | tuple[int, int] | None = None,
        digits: int | None = None,
        fewest: int | None = None,
        place: Place | None = None,
        rotate: float | None = None,
        scale: tuple[float, float] | None = None,
        warp: Warp | None = None,
        jitter: float | None = None,
        patches: int | None = None,
        patch_size: int | None = None,
        target: Target | None = None,
        separate: bool | None = None,
        in_chans: Literal[1, 3] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        val_fraction: float = 0.1,
        described: bool = False,
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if not 0 < val_fraction < 0.5:
            raise ValueError(f"val_fraction must lie between 0 and 0.5, got {val_fraction}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for name, value in (("workers", workers), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        changes: dict[str, Any] = {
            "size": size,
            "digits": digits,
            "fewest": fewest,
            "place": place,
            "rotate": rotate,
            "scale": scale,
            "warp": warp,
            "jitter": jitter,
            "patches": patches,
            "patch_size": patch_size,
            "target": target,
            "separate": separate,
        }
        self.layout = replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})
        if self.layout.separate and (in_chans or mean or std):
            raise ValueError("in_chans, mean and std must be left out where each digit has a channel of its own")
        self.root = root
        self.directory = directory
        self.download = download
        self.channels = in_chans
        self.mean = mean
        self.std = std
        self.val_fraction = val_fraction
        self.described = described
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.splits: dict[str, Canvases] = {}

    @property
    def in_chans(self) -> int:
        """Channels of the input."""
        return self.preprocess.input_size[0] if self.preprocess else self.layout.channels

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        return self.in_chans, self.layout.height, self.layout.width

    @property
    def num_classes(self) -> int:
        """How many classes there are to tell."""
        return len(self.labels)

    @property
    def targets(self) -> int:
        """How many labels a canvas has."""
        return self.layout.digits + 1 if self.layout.target == "sequence" else 1

    def prepare_data(self) -> None:
        if self.download:
            download(self.root, self.directory)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        source = open_source(self.root, directory=self.directory)
        splits = source.splits
        for name in ("test", "val"):
            if name not in splits:
                train, held = splits["train"].hold_out(self.val_fraction, self.seed)
                splits = {**splits, "train": train, name: held}
        self.labels = told_as(source.labels, self.layout)
        self.preprocess = self.prepared(getattr(self, "preprocess", None))
        for name, split in splits.items():
            self.splits[name] = self.made(name, split, self.layout, classes=len(source.labels))

    def made(self, called: str, split: Split, layout: Layout, *, classes: int, **options: Any) -> Canvases:
        """Return the canvases of a split."""
        return self.kind(
            called,
            split,
            layout,
            classes=classes,
            preprocess=self.preprocess,
            seed=self.seed,
            train=called == "train",
            give="all" if self.described else "labels",
            **options,
        )

    def prepared(self, given: Preprocess | None) -> Preprocess | None:
        """Return the normalisation: the options, then what was given, then none."""
        if self.layout.separate:
            return None
        channels = self.channels or (given.input_size[0] if given else 1)
        mean, std = (given.mean, given.std) if given else ((0.0,), (1.0,))
        return Preprocess(
            (channels, self.layout.height, self.layout.width),
            mean=self.mean or spread(mean, channels),
            std=self.std or spread(std, channels),
        )

    def loader(self, canvases: Canvases, sampler: DistributedSampler | None) -> DataLoader:
        return Resumable(
            canvases,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=as_made,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            drop_last=isinstance(sampler, Shuffled) and len(sampler) >= self.batch_size,
        )

    def canvases(self, called: str) -> Canvases:
        """Return a split."""
        self.setup()
        return self.splits[called]

    def processes(self) -> dict[str, Any]:
        """Return how many processes train together, and which of them this is."""
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}

    def train_dataloader(self) -> DataLoader:
        canvases = self.canvases("train")
        return self.loader(canvases, Shuffled(canvases, seed=self.seed, **self.processes()))

    def val_dataloader(self) -> DataLoader:
        canvases = self.canvases("val")
        return self.loader(canvases, Once(canvases, **self.processes()))

    def test_dataloader(self) -> DataLoader:
        canvases = self.canvases("test")
        return self.loader(canvases, Once(canvases, **self.processes()))

    def predict_dataloader(self) -> DataLoader:
        canvases = copy.copy(self.canvases("test"))
        canvases.give = "names"
        return self.loader(canvases, None)  # Lightning divides it itself


def as_made(batch: Any) -> Any:
    """Return a batch that was made whole."""
    return batch
