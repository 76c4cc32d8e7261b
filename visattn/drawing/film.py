"""Pictures one after the other, as an animated GIF."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

LAST = 3  # how much longer the last picture stays


def film(pictures: Sequence[str | Path], file: str | Path, *, seconds: float = 0.5) -> Path:
    """Write pictures as an endless film, and return its file; the last one stays longer.

    Args:
        pictures: Files of pictures; those of another size than the first are fitted into it.
        file: Where to; the suffix is ``.gif``.
        seconds: How long a picture stays.

    Raises:
        ValueError: If there are no pictures, or ``seconds`` is not positive.
    """
    if not pictures:
        raise ValueError("pictures must be at least one, got none")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    frames: list[Image.Image] = []
    for picture in pictures:
        with Image.open(picture) as opened:
            frame = opened.convert("RGB")
        fitted = frame if not frames else ImageOps.pad(frame, frames[0].size, color="white")
        frames.append(fitted.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE))  # thin lines count
    stays = [round(1000 * seconds)] * len(frames)
    stays[-1] *= LAST
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=stays, loop=0)
    return Path(file)
