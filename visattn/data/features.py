"""Maps of a frozen encoder, made once: in half precision on the disk, read where they lie."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visattn.data.sources import DataError

MAPS, ABOUT = "features.npy", "features.json"
OFTEN = 32  # batches from one note of what is done to the next


class Features:
    """Maps of images, by the number of the image. Workers read them from one place.

    A folder holds ``features.npy``, of shape (n, c, h, w), and ``features.json``: what the maps are of, how many are
    done, and which images had none.

    Args:
        folder: Where they lie, as :func:`fill` has left them.

    Raises:
        DataError: If they are not there, or not all, or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        notes = noted(self.folder)
        if notes is None or notes["done"] < notes["shape"][0]:
            done = f"only {notes['done']:,} of {notes['shape'][0]:,}" if notes else "none"
            raise DataError(f"{folder} must hold the maps of all images, it has {done}")
        self.shape: tuple[int, ...] = tuple(notes["shape"])
        self.absent = frozenset(notes["absent"])
        self.maps = opened(self.folder, self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """Return the map (c, h, w) of an image.

        Raises:
            OSError: If the image could not be read.
        """
        if index in self.absent:
            raise OSError(f"it could not be read when the maps in {self.folder} were made")
        if self.maps is None:
            self.maps = opened(self.folder, self.shape)
        return torch.from_numpy(np.array(self.maps[index]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": None}  # it would be copied whole


def fill(
    folder: str | Path,
    look: Callable[[Tensor], Tensor],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    *,
    count: int,
    about: Mapping[str, Any],
) -> Features:
    """Make the maps of images, or go on where that was broken off; nothing is done where all are there.

    Of several processes, call it in one.

    Args:
        folder: Where to.
        look: Returns the maps (b, c, h, w) of images.
        batches: Called with a number; gives the images from it on, in order, and their numbers. One may be left out.
        count: How many images there are.
        about: What decides the maps, in plain values: encoder, weights, preprocessing, images.

    Raises:
        DataError: If the folder holds maps of something else, the disk is too small, or maps do not fit in half
            precision or change their shape.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> folder, images = TemporaryDirectory(), torch.rand(5, 3, 8, 8)
        >>> features = fill(
        ...     folder.name,
        ...     lambda x: x[..., ::4, ::4],
        ...     lambda start: [(images[start:], torch.arange(start, 5))],
        ...     count=5,
        ...     about={"encoder": "every fourth pixel"},
        ... )
        >>> len(features), features[4].shape
        (5, torch.Size([3, 2, 2]))
        >>> folder.cleanup()
    """
    folder, about = Path(folder), json.loads(json.dumps(dict(about)))
    notes = noted(folder)
    if notes:
        for name in notes["about"] | about:
            if (there := notes["about"].get(name)) != (here := about.get(name)):
                raise DataError(f"{folder} holds other maps, delete it or name another: {name} is {there}, not {here}")
        if notes["shape"][0] != count:
            raise DataError(f"{folder} holds the maps of {notes['shape'][0]:,} images, not {count:,}: delete it")
        if notes["done"] == count:
            return Features(folder)
    maps: Any = None
    broken = notes or {"about": about, "shape": [count], "done": 0, "absent": []}
    done, absent = broken["done"], list(broken["absent"])

    def note() -> None:
        if maps is not None:
            maps.flush()
            write(folder, {"about": about, "shape": list(maps.shape), "done": done, "absent": absent})

    try:
        for number, (images, numbers) in enumerate(batches(done), 1):
            with torch.no_grad():
                made = look(images).half().cpu().numpy()
            if not np.isfinite(made).all():
                raise DataError("maps must be finite and below 65,504 to be kept in half precision")
            if maps is None:
                shape = count, *made.shape[1:]
                maps = opened(folder, notes["shape"], "r+") if notes else created(folder, shape)
            if made.shape[1:] != maps.shape[1:]:
                raise DataError(f"maps must all be {maps.shape[1:]}, got {made.shape[1:]}")
            rows = numbers.tolist()
            maps[rows] = made
            absent += sorted({*range(done, rows[-1])} - {*rows})
            done = rows[-1] + 1
            if number % OFTEN == 0:
                note()
        if maps is not None:
            absent += range(done, count)
            done = count
    finally:
        note()
    return Features(folder)


def wait(folder: str | Path, patience: float = 1800.0) -> None:
    """Return once all maps are there that another process makes, or none have come for so many seconds.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     wait(folder, patience=0.1)  # nobody makes any
    """
    folder, seen, since = Path(folder).expanduser(), -1, time.monotonic()
    while time.monotonic() - since < patience:
        notes = noted(folder)
        done = notes["done"] if notes else 0
        if notes and done == notes["shape"][0]:
            return
        if done != seen:
            seen, since = done, time.monotonic()
        time.sleep(min(1.0, patience))


def opened(folder: Path, shape: Sequence[int], mode: Any = "r") -> Any:
    """Return the array on the disk."""
    try:
        maps = np.load(folder / MAPS, mmap_mode=mode)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder / MAPS} is damaged, delete the folder ({error})") from error
    if maps.shape != tuple(shape) or maps.dtype != np.float16:
        raise DataError(f"{folder / MAPS} must be float16 {tuple(shape)}, got {maps.dtype} {maps.shape}: delete it")
    return maps


def created(folder: Path, shape: tuple[int, ...]) -> np.memmap:
    """Return a new array on the disk, where there is room for it: a full disk would end the process at some write."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{folder} needs {needed / 1e9:.1f} GB for the maps, the disk has {free / 1e9:.1f} GB")
    return np.lib.format.open_memmap(folder / MAPS, "w+", np.float16, shape)


def noted(folder: Path) -> dict[str, Any] | None:
    """Return what is noted in a folder; None where nothing is."""
    try:
        notes = json.loads((folder / ABOUT).read_text("utf-8"))
        return {name: notes[name] for name in ("about", "shape", "done", "absent")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / ABOUT} is damaged, delete the folder ({error!r})") from error


def write(folder: Path, notes: dict[str, Any]) -> None:
    """Note what is done, at once."""
    part = folder / f"{ABOUT}.part"
    part.write_text(json.dumps(notes, indent=2) + "\n", "utf-8")
    os.replace(part, folder / ABOUT)


def digest(what: Mapping[str, Tensor] | Iterable[str]) -> str:
    """Return a few letters that stand for weights, by name, or for a list of names.

    Example:
        >>> digest({"weight": torch.zeros(2)}) == digest({"weight": torch.zeros(3)})
        False
    """
    total = hashlib.sha256()
    for name in what:
        total.update(f"{name}\n".encode())
        if isinstance(what, Mapping):
            tensor = what[name].detach().cpu().contiguous()
            total.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
