"""Where images come from: folders, archives, the MNIST family's files, torchvision's sets, scikit-learn's digits.

A place (:class:`Folder`, :class:`Zip`, :class:`Tar`, :class:`Pixels`) reads images by position and names them;
:func:`open_source` finds the labels and splits of what lies there. Nothing is written beside the data.
"""

import bz2
import csv
import gzip
import io
import lzma
import mmap
import os
import posixpath
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

from visattn.data.transforms import Augment

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".txz": lzma.open}
OPENERS |= {".bz2": bz2.open, ".tbz2": bz2.open}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
SETS = ("digits", "MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "ImageNet")
SPLITS = dict(train="train", training="train", val="val", valid="val", validation="val", test="test", testing="test")
WORDS, TABLE = "classes.txt", "labels.csv"
DAMAGE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)


class DataError(ValueError):
    """What is wrong with the data, and where."""


@runtime_checkable
class Place(Protocol):
    """Images by position."""

    def read(self, position: int) -> Image.Image: ...

    def name(self, position: int) -> str: ...


@dataclass(frozen=True)
class Split:
    """Images of one split and what they show.

    Args:
        place: Where the images are.
        positions: Which of those there belong to the split.
        targets: Class of each (int64); or, of images with many labels, a row of zeros and ones for each (float32).
    """

    place: Place
    positions: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, index: int) -> Image.Image:
        """Return an image, which may be decoded only when it is used."""
        return self.place.read(int(self.positions[index]))

    def name(self, index: int) -> str:
        """Return what an image is called, so that it can be found."""
        return self.place.name(int(self.positions[index]))

    def take(self, keep: np.ndarray) -> "Split":
        """Return the images whose indices are in ``keep``."""
        return replace(self, positions=self.positions[keep], targets=self.targets[keep])

    def draw(self, count: Callable[[int], int], seed: int) -> np.ndarray:
        """Return indices, in order, of ``count(n)`` images of each class of ``n``; multi-label images are one class."""
        chance = np.random.default_rng(seed)
        classes = self.targets if self.targets.ndim == 1 else np.zeros(len(self), np.int64)
        groups = [chance.permutation(np.flatnonzero(classes == label)) for label in np.unique(classes)]
        return np.sort(np.concatenate([group[: count(len(group))] for group in groups]))

    def at_most(self, most: int, seed: int) -> "Split":
        """Return no more than ``most`` images of each class."""
        return self.take(self.draw(lambda n: most, seed))

    def hold_out(self, fraction: float, seed: int) -> "tuple[Split, Split]":
        """Return the split without and with only ``fraction`` of each class, of which at least one image stays."""
        held = self.draw(lambda n: min(n - 1, round(n * fraction)), seed)
        return self.take(np.setdiff1d(np.arange(len(self)), held)), self.take(held)


@dataclass(frozen=True)
class Source:
    """What lies somewhere.

    Args:
        labels: What each class is called.
        splits: ``train``, ``val`` and ``test``, those there are.
        multi_label: Whether an image may have many labels.
        input_size: Channels, height and width that suit the images.
        augment: What chance may do to them in training.
    """

    labels: list[str]
    splits: dict[str, Split]
    multi_label: bool = False
    input_size: tuple[int, int, int] = (3, 224, 224)
    augment: Augment = field(default_factory=Augment)


class Pixels:
    """Images that are there as numbers.

    Args:
        pixels: uint8, of shape (n, h, w) or (n, h, w, 3).
        called: What an image's name begins with.
    """

    def __init__(self, pixels: np.ndarray, called: str):
        self.pixels = pixels
        self.called = called

    def read(self, position: int) -> Image.Image:
        return Image.fromarray(self.pixels[position])

    def name(self, position: int) -> str:
        return f"{self.called}, image {position}"

    def split(self, targets: Sequence[int] | np.ndarray) -> Split:
        """Return all the images with their classes."""
        return Split(self, np.arange(len(self.pixels)), np.asarray(targets, np.int64))


class Packed:
    """Byte strings in one array, which forked workers share; a list they would copy, as its reference counts change."""

    def __init__(self, items: Iterable[bytes]):
        items = list(items)
        self.ends = np.cumsum([0, *map(len, items)])
        self.data = b"".join(items)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.ends[index] : self.ends[index + 1]]


class Files:
    """Image files and what describes them, in a folder or an archive.

    Args:
        root: The folder or archive.

    Raises:
        DataError: If it is truncated or damaged.
    """

    def __init__(self, root: Path):
        self.root = root
        self.folders: set[str] = set()
        self.ignored: list[str] = []
        names = []
        try:
            for name in self.walk():
                parts = name.split("/")
                if any(part.startswith(".") or part == "__MACOSX" for part in parts):
                    continue
                self.folders.update("/".join(parts[:k]) for k in range(1, len(parts)))
                if name.lower().endswith(IMAGES) or parts[-1] in (WORDS, TABLE):
                    names.append(name)
                else:
                    self.ignored.append(name)
        except DAMAGE as error:
            raise DataError(f"{root} is truncated or damaged: {error}") from error
        self.names = Packed(os.fsencode(name) for name in sorted(names))

    def walk(self) -> Iterator[str]:
        """Yield the path of every file, relative and with slashes, and note folders, which may be empty."""
        raise NotImplementedError

    def load(self, position: int) -> bytes:
        """Return what is in a file."""
        raise NotImplementedError

    def read(self, position: int) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.load(position)))
        except UnidentifiedImageError as error:
            raise OSError("its bytes are no image") from error

    def path(self, position: int) -> str:
        """Return the path of a file within the root."""
        return os.fsdecode(self.names[position])

    def name(self, position: int) -> str:
        return f"{self.root}/{self.path(position)}"

    def images(self) -> dict[str, int]:
        """Return the position of every image by its path."""
        paths = {self.path(position): position for position in range(len(self.names))}
        return {path: position for path, position in paths.items() if path.lower().endswith(IMAGES)}

    def texts(self, called: str) -> dict[str, list[str]]:
        """Return the lines of every file of this name by its path."""
        found = {}
        for position in range(len(self.names)):
            if posixpath.basename(path := self.path(position)) == called:
                try:
                    found[path] = self.load(position).decode("utf-8-sig").splitlines()
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.name(position)} is not in UTF-8: {error}") from error
        return found


class Folder(Files):
    """Files in a folder and those below it; links are followed."""

    def walk(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root, followlinks=True):
            within = Path(folder).relative_to(self.root)
            folders[:] = [name for name in folders if not name.startswith(".")]
            self.folders.update((within / name).as_posix() for name in folders)
            yield from ((within / name).as_posix() for name in files)

    def load(self, position: int) -> bytes:
        return (self.root / self.path(position)).read_bytes()


class Zip(Files):
    """Files in a zip, each unpacked when it is read."""

    def walk(self) -> Iterator[str]:
        self.open: tuple[int, zipfile.ZipFile] | None = None
        with zipfile.ZipFile(self.root) as archive:
            for name in archive.namelist():
                if name.endswith("/"):
                    self.folders.add(name.rstrip("/"))
                else:
                    yield name

    def load(self, position: int) -> bytes:
        if self.open is None or self.open[0] != os.getpid():  # forked workers would share one place in the file
            self.open = os.getpid(), zipfile.ZipFile(self.root)
        return self.open[1].read(self.path(position))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": None}


class Tar(Files):
    """Files in a tar: read from the disk where it is plain, from memory, unpacked once, where it is compressed."""

    def __init__(self, root: Path):
        self.data: Any = None
        self.extents: Any = {}
        super().__init__(root)
        self.extents = np.array([self.extents[self.path(k)] for k in range(len(self.names))]).reshape(-1, 2)

    def open(self) -> None:
        with OPENERS.get(self.root.suffix.lower(), open)(self.root, "rb") as file:
            if self.root.suffix.lower() in OPENERS:
                self.data = file.read()
            else:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def walk(self) -> Iterator[str]:
        if not self.root.stat().st_size:
            raise EOFError("the file is empty")
        self.open()
        file: Any = io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = posixpath.normpath(member.name).lstrip("/")
                if member.isdir():
                    self.folders.add(name)
                else:
                    self.extents[name] = member.offset_data, member.size if member.isfile() else 0
                    yield name
            if self.data[archive.offset : archive.offset + 512].strip(b"\0") or archive.offset >= len(self.data):
                raise EOFError("the archive has no end")

    def load(self, position: int) -> bytes:
        if self.data is None:
            self.open()
        start, size = self.extents[position]
        return self.data[start : start + size]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data if isinstance(self.data, bytes) else None}


def open_files(path: Path) -> Files:
    """Return the files of a folder or an archive."""
    if path.is_dir():
        return Folder(path)
    return Zip(path) if path.suffix.lower() == ".zip" else Tar(path)


def open_source(root: str, *, directory: str = "data", labelled: bool = True) -> Source:
    """Find the labels and splits of what lies at ``root``; without labels, one split ``predict`` of all images.

    Args:
        root: Name of a known set, or path of a folder or archive.
        directory: Where a known set lies, if it is not one that comes with a package.
        labelled: Whether the images' classes are wanted.

    Raises:
        DataError: If there is nothing of the kind, or something is wrong with it.
    """
    known = {name.lower(): name for name in SETS}.get(root.lower())
    path = Path(root).expanduser()
    if known and path.exists():
        raise DataError(f"root={root!r} names both a known set and a file or folder; write './{root}' for the latter")
    if known == "digits":
        return digits()
    if known in ("MNIST", "FashionMNIST", "KMNIST"):
        return idx(absent_without(idx_folders(Path(directory) / known), known, directory)[0])
    if known == "ImageNet":
        return imagenet(Path(directory))
    if known:
        return cifar(known, directory)
    if path.is_dir() and (folders := idx_folders(path)):
        if len(folders) > 1:
            raise DataError(f"root={root!r} holds several sets, name one: {', '.join(map(str, folders))}")
        return idx(folders[0])
    if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(ARCHIVES)):
        what = "is no archive known here" if path.exists() else "does not exist"
        raise DataError(
            f"root must be a folder, an archive ({', '.join(ARCHIVES)}) or one of {', '.join(SETS)}; {root!r} {what}"
        )
    files = open_files(path)
    images = files.images()
    if not images:
        raise DataError(f"{root} holds no image, which is a file ending in {', '.join(IMAGES)}")
    if not labelled:
        positions = np.array(list(images.values()))
        source = Source([], {"predict": Split(files, positions, np.zeros(len(positions), np.int64))})
    elif files.texts(TABLE):
        source = tables(files, images)
    else:
        source = class_folders(files, images)
    if files.ignored:
        kinds = Counter(posixpath.splitext(name)[1].lower() or "no extension" for name in files.ignored)
        counts = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
        warnings.warn(
            f"{root}: ignored what is no image or has no class ({counts}), such as {files.ignored[0]}", stacklevel=2
        )
    return source


def download(root: str, directory: str) -> None:
    """Fetch a set that torchvision knows into ``directory``, or, for ImageNet, unpack the archives that lie there."""
    import torchvision.datasets

    known = {name.lower(): name for name in SETS}.get(root.lower(), "")
    if known == "ImageNet":
        for split in ("train", "val"):
            torchvision.datasets.ImageNet(directory, split)
    elif known != "digits" and known:
        getattr(torchvision.datasets, known)(directory, download=True)


def absent_without(found: Any, name: str, directory: str) -> Any:
    if not found:
        raise DataError(f"{name} is not in directory={directory!r}; name where it is, or fetch it with download: true")
    return found


# ------------------------------------------------------------------------------------- what folders and tables say


def class_folders(files: Files, images: dict[str, int]) -> Source:
    """Read labels off class folders, with or without folders of splits above them."""
    parts = {path: tuple(path.split("/")) for path in images}
    folders = {tuple(folder.split("/")) for folder in files.folders}
    tops = {folder[0] for folder in folders}
    base: tuple[str, ...] = ()
    if len(tops) == 1 and not tops & SPLITS.keys() and all(len(p) > 2 for p in parts.values()):
        base = (*tops,)  # an archive of one folder
        tops = {folder[1] for folder in folders if len(folder) > 1}
    found = [top for top in sorted(tops) if top.lower() in SPLITS]
    if "train" not in map(SPLITS.get, map(str.lower, found)) and len(found) < len(tops):
        found = []  # class folders, one of which happens to be called so
    prefixes = {SPLITS[top.lower()]: (*base, top) for top in found} or {"train": base}
    if len(prefixes) < max(1, len(found)):
        raise DataError(f"{files.root} has two folders for one split among {', '.join(found)}")

    members: dict[str, dict[str, list[str]]] = {}
    for split, prefix in prefixes.items():
        depth = len(prefix)
        members[split] = {f[depth]: [] for f in sorted(folders) if len(f) == depth + 1 and f[:depth] == prefix}
        for path, p in parts.items():
            if p[:depth] == prefix and len(p) > depth + 1:
                members[split][p[depth]].append(path)
    stray = images.keys() - {path for classes in members.values() for paths in classes.values() for path in paths}
    if len(stray) == len(images):
        raise DataError(
            f"{files.root} has images, but none in a class folder (<class>/image or train/<class>/image), "
            f"and no {TABLE} beside them"
        )
    files.ignored.extend(sorted(stray))
    for split, classes in members.items():
        for label, paths in classes.items():
            if not paths:
                raise DataError(f"class folder {'/'.join([str(files.root), *prefixes[split], label])} holds no image")

    first = "train" if "train" in members else min(members)
    words = class_words(files, "/".join((*base, WORDS))) or {label: label for label in members[first]}
    for split, classes in members.items():
        for label in classes.keys() - words.keys():
            where = "/".join([str(files.root), *prefixes[split], label])
            raise DataError(f"class folder {where} is none of the {len(words)} classes: {abridged(words)}")
    for label in words.keys() - members[first].keys():
        raise DataError(f"{WORDS} in {files.root} names {label!r}, but {first} has no class folder of that name")
    if len(words) < 2:
        raise DataError(f"{files.root} must have at least two class folders, got {abridged(words)}")
    index = {label: k for k, label in enumerate(words)}
    splits = {}
    for split, classes in members.items():
        pairs = [(images[path], index[label]) for label, paths in classes.items() for path in paths]
        positions, targets = np.array(sorted(pairs)).T
        splits[split] = Split(files, positions, targets)
    return Source([*words.values()], splits)


def tables(files: Files, images: dict[str, int]) -> Source:
    """Read many labels an image off ``labels.csv``: lines ``filename,label1|label2``, names relative to the table."""
    rows: dict[str, dict[int, list[str]]] = {}
    places: dict[str, str] = {}
    for table, lines in files.texts(TABLE).items():
        for number, row in enumerate(csv.reader(lines), 1):
            where = f"{files.root}/{table}, line {number}"
            if not row or (number == 1 and row[0].strip().lower() == "filename"):
                continue
            if len(row) != 2:
                raise DataError(f"{where} must be filename,label1|label2, got {','.join(row)!r}")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(table), row[0].strip()))
            if path not in images:
                raise DataError(f"{where} names {row[0]!r}, which is not there or no image")
            split = next((SPLITS[p.lower()] for p in path.split("/")[:-1] if p.lower() in SPLITS), "train")
            if images[path] in rows.setdefault(split, {}):
                raise DataError(f"{where} names {row[0]!r} a second time")
            rows[split][images[path]] = labels = [label.strip() for label in row[1].split("|") if label.strip()]
            places |= {label: where for label in labels if label not in places}
    files.ignored.extend(sorted(images.keys() - {files.path(k) for listed in rows.values() for k in listed}))
    words = class_words(files, WORDS) or {label: label for label in sorted(places)}
    for label, where in places.items():
        if label not in words:
            raise DataError(f"{where} has label {label!r}, none of the {len(words)} classes: {abridged(words)}")
    if not words:
        raise DataError(f"{TABLE} in {files.root} names no label")
    index = {label: k for k, label in enumerate(words)}
    splits = {}
    for split, listed in rows.items():
        targets = np.zeros((len(listed), len(words)), np.float32)
        for row_of, labels in zip(targets, listed.values(), strict=True):
            row_of[[index[label] for label in labels]] = 1
        splits[split] = Split(files, np.array([*listed]), targets)
    return Source([*words.values()], splits, multi_label=True)


def class_words(files: Files, path: str) -> dict[str, str]:
    """Return what ``classes.txt`` calls each class folder, in its order: lines ``folder<TAB>words``, or ``folder``."""
    lines = [line.split("\t", 1) for line in files.texts(WORDS).get(path, []) if line.strip()]
    words = {line[0].strip(): line[-1].strip() for line in lines}
    if len(words) < len(lines):
        raise DataError(f"{files.root}/{path} names a class twice")
    return words


def abridged(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------- known sets

UPRIGHT = Augment(scale=(0.7, 1.0), ratio=(0.9, 1.1), flip=0.0, rotate=10.0, jitter=0.0)  # a mirrored digit is none


def digits() -> Source:
    """Return scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, which come with the package."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = Pixels((found.images * (255 / 16)).round().astype(np.uint8), "digits")
    return Source([*"0123456789"], {"train": pixels.split(found.target)}, input_size=(1, 32, 32), augment=UPRIGHT)


def idx_folders(path: Path) -> list[Path]:
    """Return where files of the MNIST family lie: in ``path``, its ``raw`` or its ``<set>/raw``."""
    return [p for p in (path, path / "raw", *sorted(path.glob("*/raw"))) if idx_file(p, "train-images-idx3-ubyte")]


def idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def idx(folder: Path) -> Source:
    """Read the MNIST family's files where they lie, compressed or not."""
    from torchvision import datasets

    named = next((name for name in ("FashionMNIST", "KMNIST") if name in folder.parts), None)
    labels = list(getattr(datasets, named).classes) if named else [*"0123456789"]
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        paths = [idx_file(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        if split == "test" and not any(paths):
            continue
        if not all(paths):
            raise DataError(f"{folder} has images without labels or labels without images for {split}")
        pixels, targets = (idx_array(path) for path in paths if path)
        if pixels.ndim != 3 or targets.shape != pixels.shape[:1]:
            raise DataError(f"{paths[0]} holds {pixels.shape} pixels and {paths[1]} {targets.shape} labels")
        if len(wrong := np.flatnonzero(targets >= len(labels))):
            where = f"{paths[1]}, image {wrong[0]}"
            raise DataError(f"{where} has label {targets[wrong[0]]}, outside the range 0 to {len(labels) - 1}")
        splits[split] = Pixels(pixels, str(paths[0])).split(targets)
    augment = replace(UPRIGHT, flip=None, rotate=0.0) if named == "FashionMNIST" else UPRIGHT
    return Source(labels, splits, input_size=(1, *pixels.shape[1:]), augment=augment)


def idx_array(path: Path) -> np.ndarray:
    """Return the uint8 array in an idx file."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except DAMAGE as error:
        raise DataError(f"{path} is truncated or damaged: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is no idx file of bytes")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], ">i4")
    if len(data) != start + shape.prod():
        raise DataError(f"{path} is truncated or damaged: {start + shape.prod()} bytes expected, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def cifar(name: str, directory: str) -> Source:
    """Read torchvision's CIFAR-10 or CIFAR-100."""
    from torchvision import datasets

    splits = {}
    for split in ("train", "test"):
        try:
            found = getattr(datasets, name)(directory, train=split == "train")
        except RuntimeError:  # not there, or not the file that it should be
            absent_without(None, name, directory)
        splits[split] = Pixels(found.data, f"{name} {split}").split(found.targets)
    return Source(list(found.classes), splits, input_size=(3, 32, 32), augment=Augment(scale=(0.5, 1.0), jitter=0.2))


def imagenet(directory: Path) -> Source:
    """Read ImageNet as torchvision lays it out: ``train/<id>/``, ``val/<id>/`` and the words in ``meta.bin``."""
    from torchvision.datasets.imagenet import load_meta_file

    there = all((directory / name).exists() for name in ("meta.bin", "train", "val"))
    absent_without(there, "ImageNet", str(directory))
    files = Folder(directory)
    source = class_folders(files, files.images())
    words, _ = load_meta_file(str(directory))
    return replace(source, labels=[", ".join(words[label]) for label in source.labels])
