"""What a network draws, step by step, and through which windows; a sheet of what it drew."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor

from visattn.drawing.figure import canvas
from visattn.drawing.film import film

SIDE = 112  # of an image that is shown, in pixels, about
GAP = 4  # between two
WINDOW = (240, 60, 40)
WHITE = 255
NOWHERE = -10_000


def shades(canvases: Float[Tensor, "*n c h w"]) -> UInt8[ndarray, "*n h w 3"]:
    """Return pictures of logits: how likely each pixel is on. Other than three channels are shown as their mean."""
    values = canvases.detach().float().cpu().sigmoid()
    if values.shape[-3] != 3:
        values = values.mean(-3, keepdim=True).expand(*values.shape[:-3], 3, *values.shape[-2:])
    return (values * 255).round().byte().movedim(-3, -1).numpy()


def tiled(
    photos: UInt8[ndarray, "r c h w 3"], corners: Float[ndarray, "r c 4 2"] | None = None, *, side: int = SIDE
) -> Image.Image:
    """Return images side by side, each pixel as a square, with the outlines of windows, of what of them is inside.

    Args:
        photos: The images.
        corners: Of a window in each, (x, y) in pixels of the image.
        side: About how wide or high, whichever is more, an image is shown.
    """
    rows, columns, height, width = photos.shape[:4]
    factor = max(1, round(side / max(height, width)))
    high, wide = factor * height, factor * width
    sheet = Image.new("RGB", (columns * (wide + GAP) + GAP, rows * (high + GAP) + GAP), (WHITE,) * 3)
    for row in range(rows):
        for column in range(columns):
            tile = Image.fromarray(photos[row, column]).resize((wide, high), Image.Resampling.NEAREST)
            if corners is not None:
                first = (corners[row, column].min(0) * factor).round().clip(0)
                last = (corners[row, column].max(0) * factor).round().clip(max=(wide, high)) - 1
                if (first < last).all():
                    outline = (*first.tolist(), *last.tolist())
                    ImageDraw.Draw(tile).rectangle(outline, outline=WINDOW, width=max(2, factor // 2))
            sheet.paste(tile, (GAP + column * (wide + GAP), GAP + row * (high + GAP)))
    return sheet


def by_rows(count: int) -> tuple[int, int]:
    """Return how many rows and columns so many images fill, as good as square.

    Example:
        >>> by_rows(16), by_rows(7)
        ((4, 4), (3, 3))
    """
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def arranged(each: ndarray, blank: int) -> ndarray:
    """Return what belongs to images in rows and columns, the last row filled up."""
    rows, columns = by_rows(len(each))
    rest = np.full((rows * columns - len(each), *each.shape[1:]), blank, each.dtype)
    return np.concatenate((each, rest)).reshape(rows, columns, *each.shape[1:])


def draw_samples(canvases: Float[Tensor, "n c h w"]) -> Image.Image:
    """Return a sheet of what was drawn, in rows.

    Args:
        canvases: The logits of the pixels.

    Example:
        >>> draw_samples(torch.randn(12, 1, 28, 28)).size
        (468, 352)
    """
    return tiled(arranged(shades(canvases), WHITE))


def draw_generation(
    canvases: Float[Tensor, "n t c h w"],
    corners: Float[Tensor, "n t 4 2"] | None = None,
    *,
    columns: int = 10,
    title: str = "",
) -> Figure:
    """Draw how images came about: a row for each, with the windows through which was written.

    Args:
        canvases: The logits of the pixels after each step.
        corners: Of the windows, (x, y) in pixels of the image.
        columns: How many steps are drawn at most, as evenly chosen as can be; the last is among them.
        title: A line above it all.

    Example:
        >>> figure = draw_generation(torch.randn(2, 20, 1, 28, 28), columns=4)
        >>> [text.get_text() for text in figure.texts]
        ['step 1', '7', '14', '20']
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    count = canvases.shape[1]
    last = np.linspace(count, 1, min(columns, count))[::-1].round().astype(int)
    outlines = None if corners is None else corners[:, last - 1].detach().float().cpu().numpy()
    sheet = tiled(shades(canvases[:, last - 1]), outlines)
    head = 26 + 26 * bool(title)
    figure = canvas(sheet.width / 120, (sheet.height + head) / 120, layout=None)
    axes = figure.add_axes((0, 0, 1, sheet.height / (sheet.height + head)))
    axes.imshow(sheet, interpolation="none", aspect="auto")
    axes.set_axis_off()
    step = (sheet.width - GAP) / len(last)
    for column, number in enumerate(last):
        place = (GAP + (column + 0.5) * step - GAP / 2) / sheet.width
        said = str(number) if column else f"step {number}"
        figure.text(place, 1 - (head - 13) / (sheet.height + head), said, fontsize="medium", ha="center", va="center")
    if title:
        figure.text(GAP / sheet.width, 1 - 14 / (sheet.height + head), title, fontsize="large", va="center")
    return figure


def film_generation(
    canvases: Float[Tensor, "n t c h w"],
    file: str | Path,
    corners: Float[Tensor, "n t 4 2"] | None = None,
    *,
    seconds: float = 0.15,
) -> Path:
    """Write how images came about as an endless film, a sheet of all for each step, and return its file.

    Args:
        canvases: The logits of the pixels after each step.
        file: Where to; the suffix is ``.gif``.
        corners: Of the windows through which was written, (x, y) in pixels of the image.
        seconds: How long a step stays.
    """
    photos = arranged(shades(canvases), WHITE)
    outlines = None if corners is None else arranged(corners.detach().float().cpu().numpy(), NOWHERE)
    with TemporaryDirectory() as folder:
        pictures = []
        for step in range(canvases.shape[1]):
            pictures.append(Path(folder, f"{step:05d}.png"))
            tiled(photos[:, :, step], None if outlines is None else outlines[:, :, step]).save(pictures[-1])
        pictures.append(Path(folder, "done.png"))  # without windows
        tiled(photos[:, :, -1]).save(pictures[-1])
        return film(pictures, file, seconds=seconds)
