"""Images in shards: plain tars, as webdataset names what is in them, that are read in place wherever they lie.

:func:`write` puts the images of any splits into a folder of shards, and goes on where it was broken off;
:class:`Shards` is the place that reads them, by position like any other, out of that folder or from a URL of it.
"""

import hashlib
import io
import json
import mmap
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from visattn.data.sources import DataError, Files, Packed, Place, Source, Split, abridged
from visattn.data.transforms import Augment

ABOUT, SAMPLES, CAPTIONS, JOURNAL = "shards.json", "samples.npz", "captions.json", "written.jsonl"
VERSION = 1
CACHE = "VISATTN_CACHE"  # the variable that says where shards of a URL are kept
LIMIT = "VISATTN_CACHE_GIB"  # and the one that says how many GiB they may take
OPEN = 64  # shards that a process holds open


class ShardError(OSError):
    """A shard that cannot be read, and with it all its images."""


# ------------------------------------------------------------------------------------------------------------- reading


class Shards(Files):
    """Files in shards, in the order in which they were before; a shard is looked at when one of its files is wanted.

    A shard of a URL is fetched once for all processes of a machine, compared with its checksum, and kept in
    ``VISATTN_CACHE`` (``~/.cache/visattn``). Where ``VISATTN_CACHE_GIB`` says how much may be kept, those that were
    wanted longest ago make room for others.

    Args:
        root: A folder of shards, or its URL, of any kind that fsspec knows.

    Raises:
        DataError: If it is none, or of another version.
    """

    def __init__(self, root: str):
        self.root: Any = root if "://" in root else Path(root).expanduser()
        self.about = said(root, ABOUT, json.loads)
        if self.about.get("version") != VERSION:
            raise DataError(f"{root} has shards of version {self.about.get('version')}, known here is {VERSION}")
        arrays = said(root, SAMPLES, lambda data: dict(np.load(io.BytesIO(data))))
        self.names = Packed([])
        self.names.data, self.names.ends = arrays.pop("names").tobytes(), arrays.pop("ends")
        self.shard, self.extents = arrays.pop("shard"), arrays.pop("extents")
        self.arrays: dict[str, np.ndarray] = arrays
        """Positions and targets of every split."""
        self.folders, self.ignored = set(), []
        self.opened: OrderedDict[int, Any] = OrderedDict()
        self.lost: dict[int, str] = {}

    def load(self, position: int) -> bytes:
        start, size = self.extents[position]
        return self.open(int(self.shard[position]))[start : start + size]

    def open(self, number: int) -> Any:
        """Return what is in a shard."""
        if number in self.lost:
            raise ShardError(self.lost[number])
        if number in self.opened:
            self.opened.move_to_end(number)
            return self.opened[number]
        try:
            with self.here(number) as path, path.open("rb") as file:
                self.opened[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ShardError as error:
            self.lost[number] = str(error)
            raise
        if len(self.opened) > OPEN:
            self.opened.popitem(last=False)
        return self.opened[number]

    @contextmanager
    def here(self, number: int) -> Iterator[Path]:
        """Give the file of a shard, which is fetched where it lies elsewhere, and stays as long as it is wanted."""
        known = self.about["shards"][number]
        if isinstance(self.root, Path):
            file = self.root / known["name"]
            if wrong := amiss(file, known):
                raise ShardError(f"shard {file} {wrong}")
            yield file
            return
        cache = Path(os.environ.get(CACHE, "~/.cache/visattn"), "shards").expanduser()
        folder = cache / hashlib.sha256(self.root.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        file, part = folder / f"{known['sha256'][:16]}.tar", folder / f".{known['name']}.part"
        with FileLock(f"{file}.lock"):
            if amiss(file, known):
                make_room(cache, known["bytes"])
                try:
                    files, path = fsspec.core.url_to_fs(f"{self.root}/{known['name']}")
                    files.get_file(path, str(part))
                except Exception as error:  # of as many kinds as there are places
                    why = f"cannot be fetched ({type(error).__name__}: {error})"
                    raise ShardError(f"shard {self.root}/{known['name']} {why}") from error
                if wrong := amiss(part, known, whole=True):
                    part.unlink()
                    raise ShardError(f"shard {self.root}/{known['name']} {wrong}")
                part.replace(file)
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))  # many disks note no reading by themselves
            yield file

    def check(self) -> Iterator[tuple[str, str | None]]:
        """Yield every shard with what is wrong with it, all its bytes compared with its checksum."""
        for number, known in enumerate(self.about["shards"]):
            try:
                with self.here(number) as file:
                    wrong = amiss(file, known, whole=True)
            except ShardError as error:
                wrong = str(error)
            yield known["name"], wrong

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": OrderedDict()}


def make_room(cache: Path, size: int) -> None:
    """Remove shards that nobody opens just now, those first that were wanted longest ago, until this size fits."""
    given = os.environ.get(LIMIT)
    if not given:
        return
    try:
        limit = float(given)
    except ValueError:
        raise DataError(f"{LIMIT} must be a number of GiB, got {given!r}") from None
    taken = []
    for file in cache.glob("*/*.tar"):
        with suppress(FileNotFoundError):  # another process made room
            stat = file.stat()
            taken.append((stat.st_atime_ns, stat.st_size, file))
    over = size + sum(each for _, each, _ in taken) - limit * 2**30
    for _, each, file in sorted(taken):
        if over <= 0:
            break
        with suppress(Timeout), FileLock(f"{file}.lock", timeout=0):
            file.unlink(missing_ok=True)
            over -= each


def said(root: str, name: str, read: Callable[[bytes], Any]) -> Any:
    """Return what a file says that lies beside the shards."""
    path = f"{root if '://' in root else Path(root).expanduser()}/{name}"
    try:
        with fsspec.open(path, "rb") as file:
            return read(file.read())
    except Exception as error:  # of as many kinds as there are places
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def amiss(file: Path, known: Mapping[str, Any], *, whole: bool = False) -> str | None:
    """Return what is wrong with a shard: that it is not there, its length or, of the whole, its checksum."""
    if not file.is_file():
        return "is missing"
    if (size := file.stat().st_size) != known["bytes"]:
        return f"is {'truncated' if size < known['bytes'] else 'another one'}: {size} of {known['bytes']} bytes"
    return "is damaged: its checksum is another" if whole and digest(file) != known["sha256"] else None


def digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def holds_shards(root: str) -> bool:
    """Whether this is a folder of shards or, as nothing else is, a URL."""
    if "://" in root:
        return True
    folder = Path(root).expanduser()
    if (folder / JOURNAL).is_file():
        raise DataError(f"{root} holds shards that are not all written: do again what wrote them, and it goes on")
    return (folder / ABOUT).is_file()


def open_shards(root: str, *, labelled: bool = True) -> Source:
    """Return labels and splits of shards; without labels, one split ``predict`` of all images.

    Args:
        root: A folder of shards, or its URL.
        labelled: Whether the images' classes are wanted.

    Raises:
        DataError: If they cannot be read, or hold no classes.
    """
    shards = Shards(root)
    about, splits = shards.about, {}
    if not labelled:
        count = len(shards.names)
        return Source([], {"predict": Split(shards, np.arange(count), np.zeros(count, np.int64))})
    if about["labels"] is None:
        raise DataError(f"root={root!r} holds images with captions and no classes")
    for name in about["splits"]:
        splits[name] = Split(shards, shards.arrays[f"{name}.positions"], shards.arrays[f"{name}.targets"])
    augment: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in about["augment"].items()}
    return Source(about["labels"], splits, about["multi_label"], tuple(about["input_size"]), Augment(**augment))


# ------------------------------------------------------------------------------------------------------------- writing


def write(
    dest: Path,
    splits: Mapping[str, Split],
    *,
    about: Mapping[str, Any],
    told: Callable[[str, int], Any],
    megabytes: float = 64.0,
    beside: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Write the images of splits into shards, and yield how many are written, from those of a run that was broken off.

    An image keeps its bytes; one that has none, since it comes as pixels, becomes a PNG. Each comes with a JSON of its
    name, its split and what is told of it. The images of a shard are of one split; those of training are shuffled.

    Args:
        dest: The folder.
        splits: What to write.
        about: What is known of all the images, in plain values.
        told: Returns what is told of an image, by the split's name and its index there.
        megabytes: From which size on a shard is full.
        beside: Texts to lie beside the shards, by name.

    Raises:
        ValueError: If ``megabytes`` is not positive; as ``DataError`` if something else lies in the folder.
    """
    if megabytes <= 0:
        raise ValueError(f"megabytes must be positive, got {megabytes}")
    numbers, names = numbered(splits)
    plan = digest_of(names, {name: len(split) for name, split in splits.items()}, about, megabytes, beside)
    if (dest / ABOUT).is_file():
        if json.loads((dest / ABOUT).read_text("utf-8")).get("plan") != plan:
            raise DataError(f"{dest} holds other shards already")
        yield len(names)
        return
    dest.mkdir(parents=True, exist_ok=True)
    journal = dest / JOURNAL
    if not journal.is_file():
        if found := [file.name for file in dest.iterdir()]:
            raise DataError(f"{dest} must be empty, or hold shards of the same images, got {abridged(sorted(found))}")
        journal.write_text(json.dumps({"plan": plan}) + "\n")
    first, *written = lines(journal)
    if first.get("plan") != plan:
        raise DataError(f"{dest} holds a part of other shards")
    shard, extents = np.full(len(names), -1, np.int32), np.zeros((len(names), 2), np.int64)

    def enter(number: int, entry: Mapping[str, Any]) -> None:
        positions = order[entry["split"]][entry["first"] : entry["first"] + entry["images"]]
        places = numbers[entry["split"]][positions]
        shard[places], extents[places] = number, entry["extents"]

    order = {name: shuffled(name, len(split)) for name, split in splits.items()}
    done = {name: 0 for name in splits}
    for number, entry in enumerate(written):
        enter(number, entry)
        done[entry["split"]] += entry["images"]
    yield sum(done.values())
    for name, split in splits.items():
        while done[name] < len(split):
            file = f"{name}-{sum(each['split'] == name for each in written):05d}.tar"
            entry = {"name": file, "split": name, "first": done[name]}
            entry |= pack(dest, file, split, order[name][done[name] :], partial(told, name), megabytes)
            with journal.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            enter(len(written), entry)
            written.append(entry)
            done[name] += entry["images"]
            yield sum(done.values())
    arrays = {"names": np.frombuffer(names.data, np.uint8), "ends": names.ends, "shard": shard, "extents": extents}
    for name, split in splits.items():
        arrays |= {f"{name}.positions": numbers[name], f"{name}.targets": split.targets}
    samples = io.BytesIO()
    np.savez_compressed(samples, **arrays)  # type: ignore[arg-type]
    kept = [{key: entry[key] for key in ("name", "images", "bytes", "sha256")} for entry in written]
    whole = {"version": VERSION, "plan": plan, **about, "splits": [*splits], "shards": kept}
    files = {name: text.encode() for name, text in (beside or {}).items()}
    for name, data in {**files, SAMPLES: samples.getvalue(), ABOUT: json.dumps(whole, indent=1).encode()}.items():
        with put(dest / name) as stream:
            stream.write(data)
    journal.unlink()


def numbered(splits: Mapping[str, Split]) -> tuple[dict[str, np.ndarray], Packed]:
    """Return the number that each image of each split gets, in the order in which they lie, and the names of all."""
    places = list({id(split.place): split.place for split in splits.values()}.values())
    used = [[split.positions for split in splits.values() if split.place is place] for place in places]
    sorted_ = [np.unique(np.concatenate(positions)) for positions in used]
    starts = np.cumsum([0, *map(len, sorted_)])
    numbers = {}
    for name, split in splits.items():
        k = next(k for k, place in enumerate(places) if place is split.place)
        numbers[name] = starts[k] + np.searchsorted(sorted_[k], split.positions)
    pairs = ((place, int(k)) for place, positions in zip(places, sorted_, strict=True) for k in positions)
    return numbers, Packed(os.fsencode(path_of(place, k)) for place, k in pairs)


def path_of(place: Place, position: int) -> str:
    return place.path(position) if isinstance(place, Files) else place.name(position)


def digest_of(names: Packed, *others: Any) -> str:
    found = hashlib.sha256(names.data + names.ends.tobytes())
    found.update(json.dumps(others, sort_keys=True).encode())
    return found.hexdigest()


def shuffled(name: str, count: int) -> np.ndarray:
    """Return the order in which the images of a split are written: drawn once, where they are to train with."""
    return np.random.default_rng(0).permutation(count) if name in ("train", "restval") else np.arange(count)


def lines(journal: Path) -> list[dict[str, Any]]:
    """Return what a journal says, up to a line that is broken off."""
    found: list[dict[str, Any]] = []
    with suppress(json.JSONDecodeError):
        found.extend(map(json.loads, journal.read_text().splitlines()))
    return found or [{}]


def pack(
    dest: Path, name: str, split: Split, indices: np.ndarray, told: Callable[[int], Any], megabytes: float
) -> dict[str, Any]:
    """Write one shard of the first of these images, as many as it takes, and return what is to be known of it."""
    extents = []
    with put(dest / name) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for k in indices.tolist():
            position = int(split.positions[k])
            data, ending = encoded(split.place, position)
            extents.append([tar.offset + tarfile.BLOCKSIZE, len(data)])
            beside = {"name": path_of(split.place, position), "split": name.rpartition("-")[0], **told(k)}
            for part, suffix in ((data, ending), (json.dumps(beside).encode(), ".json")):
                member = tarfile.TarInfo(f"{name.removesuffix('.tar')}-{len(extents) - 1:06d}{suffix}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
            if tar.offset >= megabytes * 1e6:
                break
    size = (dest / name).stat().st_size
    return {"images": len(extents), "bytes": size, "sha256": digest(dest / name), "extents": extents}


def encoded(place: Place, position: int) -> tuple[bytes, str]:
    """Return the bytes of an image, and the ending of its file."""
    if isinstance(place, Files):
        return place.load(position), Path(place.path(position)).suffix.lower()
    stream = io.BytesIO()
    image: Image.Image = place.read(position)
    image.save(stream, "png")
    return stream.getvalue(), ".png"


@contextmanager
def put(file: Path) -> Iterator[Any]:
    """Open a file to write under another name, and rename it when it is whole."""
    part = file.with_name(f".{file.name}.part")
    with part.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def about_source(source: Source) -> dict[str, Any]:
    """Return what is known of images with labels, in plain values."""
    known = {"labels": source.labels, "multi_label": source.multi_label, "input_size": list(source.input_size)}
    return known | {"augment": asdict(source.augment)}
