"""Photos with captions, in the forms in which people share them, as batches."""

import csv
import gzip
import io
import json
import posixpath
import re
import warnings
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import default_collate

from visattn.data.features import Features, digest, fill
from visattn.data.images import BUFFER, AugmentOn, Images, Loader, Once, Sample, Samples, Shuffled
from visattn.data.shards import CAPTIONS, Shards, holds_shards, said
from visattn.data.sources import ARCHIVES, DAMAGE, IMAGES, SPLITS, DataError, Files, Source, Split, open_files
from visattn.data.transforms import Augment, Interpolation, Unfinished
from visattn.data.vocabulary import Tokenizer, Tokens, Vocabulary, Words

KNOWN = SPLITS | {"dev": "val", "restval": "restval"}
UNLISTED = "unlisted"  # where lists say which images are in which split
LINE = re.compile(r"([^\t]+)#\d+\t(.*)")  # of a token file
HEADER = (  # what the columns of a table may be called
    ("image", "filename", "file_name", "file", "image_name", "path"),
    ("caption", "captions", "text", "sentence", "comment"),
    ("split", "set"),
)
UPRIGHT = Augment(scale=(0.5, 1.0), flip=0.0, jitter=0.2)  # captions tell left from right


class CaptionBatch(NamedTuple):
    """Images with what people say of them."""

    images: Float[Tensor, "b c h w"]
    """The images; or their maps, where these are cached."""
    words: Int[Tensor, "b r t"]
    """Captions of each image, the longest first; behind the end of a caption, more of what ends it."""
    lengths: Int[Tensor, "b r"]
    """How many words there are, with the one that ends the caption, unless it was cut."""
    indices: Int[Tensor, "b"]
    """Which of the split each image is."""
    boxes: Int[Tensor, "b r t 4"] | None = None
    """Where what each word names is seen: its first column and row, and those behind its last; zeros for a word that
    names nothing. None where nobody knows."""


class ReferenceBatch(NamedTuple):
    """Images with the captions that others are compared with."""

    images: Float[Tensor, "b c h w"]
    """The images; or their maps, where these are cached."""
    references: list[list[str]]
    """All captions of each image."""
    names: list[str]
    """What each image is called."""
    words: Int[Tensor, "b r t"] | None = None
    """The same captions as numbers, where boxes are known."""
    boxes: Int[Tensor, "b r t 4"] | None = None
    """As of :class:`CaptionBatch`."""


class Photo(NamedTuple):
    """An image that captions are of, as their file tells."""

    name: str
    captions: list[str]
    split: str | None


# ----------------------------------------------------------------------------------------------- what files of them say


def read(path: str, tokens: Tokens) -> list[Photo]:
    """Read captions in any form: Karpathy's JSON, COCO's, a token file, or a table; each also compressed with gzip.

    Args:
        path: The file.
        tokens: Which text is taken where there are two: ``"given"`` for the words into which others have cut it.

    Raises:
        DataError: If it is not there, in another form, or something is wrong in it.
    """
    text = said(path, CAPTIONS, bytes.decode) if holds_shards(path) else text_of(path)
    found: Iterable[tuple[str, Photo]]
    if text.lstrip()[:1] in ("{", "["):
        found = from_json(path, text, tokens)
    elif LINE.fullmatch(text.lstrip().split("\n", 1)[0].rstrip("\r")):
        found = from_lines(path, text)
    else:
        found = from_table(path, text)
    photos: dict[str, Photo] = {}
    for where, photo in found:
        if not isinstance(photo.name, str) or not isinstance(photo.split, str | None):
            raise DataError(f"{where} must have texts as name and split, got {photo.name!r} and {photo.split!r}")
        split = None if photo.split is None else KNOWN.get(photo.split.strip().lower())
        if split is None and photo.split is not None:
            raise DataError(f"{where} has split {photo.split!r}, none of train, val, test and restval")
        for caption in photo.captions:
            if not isinstance(caption, str):
                raise DataError(f"{where} must have texts as captions, got {caption!r}")
        known = photos.setdefault(photo.name, Photo(photo.name, [], split))
        if known.split != split:
            raise DataError(f"{where} has {photo.name!r} in {split}, it was in {known.split} before")
        known.captions.extend(photo.captions)
    return list(photos.values())


def normal(name: str) -> str:
    """Return the path of an image as folders and archives write it."""
    return posixpath.normpath(name.replace("\\", "/"))


def text_of(path: str) -> str:
    """Return what is in a text file, which may be compressed with gzip."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"captions must be a file, {path!r} {'is a folder' if file.exists() else 'does not exist'}")
    try:
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as stream:
            return stream.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error}") from error
    except DAMAGE as error:
        raise DataError(f"{path} is truncated or damaged: {error}") from error


def placed(root: str) -> Files:
    """Return the images that captions are of: those of a folder, an archive, or shards."""
    if holds_shards(root):
        return Shards(root)
    path = Path(root).expanduser()
    if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(ARCHIVES)):
        what = "is no archive known here" if path.exists() else "does not exist"
        raise DataError(f"images must be a folder or an archive ({', '.join(ARCHIVES)}); {root!r} {what}")
    return open_files(path)


def to_write(captions: str | dict[str, str], root: str) -> tuple[dict[str, Split], dict[int, list[str]], str]:
    """Return images that have captions by split, the captions of each position, and all that is said as one JSON.

    It is Karpathy's form, with captions as text and, where that is another, as the words into which others have cut it.

    Args:
        captions: As of :class:`Captions`.
        root: Where the images are.
    """
    place = placed(root)
    left: dict[str, list[str]] = defaultdict(list)
    kinds: tuple[Tokens, Tokens] = "plain", "given"
    plain, cut = (Captions(captions, root, tokens=tokens).found(place, left) for tokens in kinds)
    groups: dict[str, list[int]] = defaultdict(list)
    images = []
    for position, photo in sorted(plain.items()):
        groups[photo.split or "train"].append(position)
        pairs = zip(photo.captions, cut[position].captions, strict=True)
        sentences = [{"raw": raw, "tokens": words.split(" ")} if raw != words else {"raw": raw} for raw, words in pairs]
        images.append({"filename": photo.name, "split": photo.split, "sentences": sentences})
    splits = {name: Split(place, np.array(group), np.zeros(len(group), np.int64)) for name, group in groups.items()}
    return splits, {position: photo.captions for position, photo in plain.items()}, json.dumps({"images": images})


def from_json(path: str, text: str, tokens: Tokens) -> Iterator[tuple[str, Photo]]:
    """Yield the images of Karpathy's JSON or COCO's, with where they stand."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    images = data.get("images") if isinstance(data, dict) else None
    if not (isinstance(images, list) and images and isinstance(images[0], dict)):
        what = f"an object of {', '.join(data) or 'nothing'}" if isinstance(data, dict) else "a list"
        raise DataError(f"{path} must hold images with sentences, or images and annotations, got {what}")
    coco = "annotations" in data
    captions = defaultdict(list)
    where = path
    try:
        for k, annotation in enumerate(data["annotations"] if coco else []):
            where = f"{path}, annotation {k}"
            captions[annotation["image_id"]].append(annotation["caption"])
        for k, image in enumerate(images):
            where = f"{path}, image {k}"
            if coco:
                yield where, Photo(image["file_name"], captions.pop(image["id"], []), None)
            else:
                name = posixpath.join(image.get("filepath", ""), image["filename"])
                yield where, Photo(name, [told(each, tokens) for each in image["sentences"]], image.get("split"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} lacks what it should have: {error}") from error
    if captions:
        raise DataError(f"{path} has captions of image {next(iter(captions))}, which is none of its images")


def told(sentence: dict[str, Any], tokens: Tokens) -> str:
    """Return the text of one of Karpathy's sentences."""
    if "raw" in sentence and not (tokens == "given" and "tokens" in sentence):
        return sentence["raw"]
    return " ".join(sentence["tokens"])


def from_lines(path: str, text: str) -> Iterator[tuple[str, Photo]]:
    """Yield the images of a token file: lines ``name#number<TAB>caption``."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found = LINE.fullmatch(line.rstrip("\r"))
            if not found:
                raise DataError(f"{path}, line {number} must be name#number<TAB>caption, got {line[:60]!r}")
            yield f"{path}, line {number}", Photo(found[1].strip(), [found[2]], None)


def from_table(path: str, text: str) -> Iterator[tuple[str, Photo]]:
    """Yield the images of a table of image, caption and, if need be, split, whose header is one or says their order."""
    first = text.lstrip().split("\n", 1)[0]
    for delimiter in ",;\t|":
        head = [cell.strip().lower() for cell in next(csv.reader([first], delimiter=delimiter), [])]
        titled = head if all({*head} & {*names} for names in HEADER[:2]) else None
        if len(head) > 1 and (titled or head[0].endswith(IMAGES)):
            break
    else:
        raise DataError(
            f"{path} must be JSON, lines name#number<TAB>caption, or a table of image and caption, got {first[:60]!r}"
        )
    columns: list[int | None] = [next((head.index(name) for name in names if name in head), None) for names in HEADER]
    if not titled:
        columns = [0, 1, 2 if len(head) > 2 else None]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not any(cell.strip() for cell in row) or [cell.strip().lower() for cell in row] == titled:
                continue
            if len(row) != len(head):
                advice = f"; a caption with {delimiter!r} must stand in quotes" if len(row) > len(head) else ""
                raise DataError(f"{where} must have {len(head)} columns, got {len(row)}{advice}")
            name, caption, split = ("" if k is None else row[k] for k in columns)
            yield where, Photo(name.strip(), [caption], split.strip() or None)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} is wrong: {error}") from error


# -------------------------------------------------------------------------------------------------------------- samples


class Encoded:
    """The words of the captions of images, in arrays, which forked workers share.

    Args:
        images: The numbers of each caption of each image.
        end: The number that ends a caption.
    """

    def __init__(self, images: Iterable[Iterable[Sequence[int]]], end: int):
        words, captions, firsts = array("i"), array("q", [0]), array("q", [0])
        for several in images:
            for caption in several:
                words.extend(caption)
                captions.append(len(words))
            firsts.append(len(captions) - 1)
        self.images, self.captions, self.words = (np.array(each) for each in (firsts, captions, words))
        self.end = end

    def __getitem__(self, image: int) -> list[np.ndarray]:
        """Return the captions of an image."""
        bounds = self.captions[self.images[image] : self.images[image + 1] + 1]
        return [self.words[a:b] for a, b in pairwise(bounds)]

    @property
    def lengths(self) -> np.ndarray:
        """How many words the captions of each image have, on average."""
        return np.diff(self.captions[self.images]) / np.diff(self.images)

    @property
    def cut(self) -> np.ndarray:
        """Of which image each caption is that does not end."""
        images = np.repeat(np.arange(len(self.images) - 1), np.diff(self.images))
        return images[self.words[self.captions[1:] - 1] != self.end]


@dataclass(frozen=True)
class Described(Split):
    """Images of one split with their captions; the target of each is its index.

    Args:
        captions: Of each image.
        words: Of each caption.
        several: How many captions of an image come at a time in training.
        maps: What an encoder has made of the images, if that is wanted in their place.
        rows: Which of the maps is of which image.
    """

    captions: list[list[str]]
    words: Encoded
    several: int
    maps: Features | None = None
    rows: np.ndarray | None = None


class CaptionSamples(Samples):
    """The images of a split with their captions; arguments as of :class:`~visattn.data.images.Samples`.

    In training an image comes with ``several`` of its captions. They follow from (seed, epoch, index): an image's own
    order of its captions is gone through again and again, so that all are seen as often.
    """

    split: Described

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = super().__getitem__(key)
        if self.names or sample.image is None:
            return sample
        if not self.train:
            return sample._replace(target=(self.split.captions[index], self.split.name(index)))
        seen = int(sample.target)  # another one where this cannot be read
        return sample._replace(target=(self.drawn(seen, epoch), seen))

    def drawn(self, image: int, epoch: int) -> list[np.ndarray]:
        """Return captions of an image in an epoch, the longest first."""
        captions, several = self.split.words[image], self.split.several
        order = np.random.default_rng((self.seed, image)).permutation(len(captions))
        chosen = order[(epoch * several + np.arange(several)) % len(captions)]
        return sorted((captions[k] for k in chosen), key=len, reverse=True)

    def read(self, index: int) -> Any:
        if self.names or self.split.maps is None or self.split.rows is None:
            return super().read(index)
        return self.split.maps[int(self.split.rows[index])]

    def transform(self, image: Any, seed: Sequence[int]) -> Tensor | Unfinished:
        return image.float() if isinstance(image, Tensor) else super().transform(image, seed)

    def batch(self, pairs: list[tuple[Any, Any]]) -> Any:
        if self.names:
            return super().batch(pairs)
        images = default_collate([image for image, _ in pairs])
        firsts, seconds = zip(*(target for _, target in pairs), strict=True)
        if not self.train:
            return ReferenceBatch(images, list(firsts), list(seconds))
        lengths = np.array([[len(caption) for caption in captions] for captions in firsts])
        words = np.full((*lengths.shape, lengths.max()), self.split.words.end)
        words[np.arange(lengths.max()) < lengths[..., None]] = np.concatenate([*chain(*firsts)])
        return CaptionBatch(images, torch.from_numpy(words), torch.from_numpy(lengths), torch.tensor(seconds))


class Bucketed(Shuffled):
    """As :class:`~visattn.data.images.Shuffled`, but a batch has captions of about the same length.

    Args:
        samples: The images.
        batch_size: How many come at a time.
        pool: Among how many batches, one after the other in the shuffled order, images are put in order of length.
        options: As of ``DistributedSampler``.
    """

    def __init__(self, samples: CaptionSamples, *, batch_size: int, pool: int, **options: Any):
        super().__init__(samples, **options)
        self.lengths = samples.split.words.lengths
        self.batch_size = batch_size
        self.pool = pool

    def indices(self) -> list[int]:
        indices = np.array(super().indices())
        whole = len(indices) // self.batch_size * self.batch_size
        starts = range(0, whole, self.batch_size * self.pool)
        pools = [indices[start : min(start + self.batch_size * self.pool, whole)] for start in starts]
        ordered = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate([indices[:0], *ordered]).reshape(-1, self.batch_size)
        batches = np.random.default_rng((self.seed, self.epoch)).permutation(batches)
        return np.concatenate([batches.ravel(), indices[whole:]]).tolist()


# ----------------------------------------------------------------------------------------------------------- the module


def listing(left: dict[str, list[str]]) -> str:
    """Say what is left out, how much, and an example."""
    return ", ".join(f"{what} ({len(names):,}, such as {names[0]!r})" for what, names in left.items() if names)


class Captions(Images):
    """Photos with captions, from Karpathy's JSON, COCO's, Flickr's token files, or a table of one's own.

    What the file of captions holds says its form: ``{"images": [{"filename", "split", "sentences": [{"raw",
    "tokens"}]}]}`` (Karpathy) · ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`` (COCO)
    · lines ``name.jpg#0<TAB>caption`` (Flickr8k, Flickr30k) · a table of image, caption and, where it has one, split.
    Each may be compressed with gzip. Images are found by their path, or by their name where only one has it.

    What cannot be used is counted and told, once: images that are not there, that have no caption or are in no split,
    captions without a word, captions that are cut. Where ``val`` is missing, images are held out for it; where ``test``
    is, ``val`` serves for both.

    Training gives :class:`CaptionBatch`: images, ``captions_per_image`` captions of each as numbers of words, and how
    long they are. Evaluation gives :class:`ReferenceBatch`: images, their captions as text, and their names. For
    prediction, batches are (images, names).

    With ``cache``, :meth:`fill` is to be called before the first batch, by oneself or by what ``wanted`` is set to;
    batches then have the maps of a frozen encoder in place of the images.

    Args:
        captions: A file of captions; or a file for each split: ``train``, ``val``, ``test``.
        images: The folder or archive that has the images.
        splits: For each split, a file with the names of its images, one a line; images in none of them are left out.
        restval: Whether images of Karpathy's ``restval`` are trained with, as is usual for COCO.
        val_fraction: Share of the images that is held out where there is no ``val``.
        captions_per_image: How many captions of an image come at a time; an image with fewer repeats some, one with
            more brings others in the next epoch.
        longest: How many words of a caption are read at most, without the one that ends it.
        tokens: ``"plain"``: captions are lower case without punctuation; ``"given"``: lower case, and otherwise as the
            file has cut them (Karpathy's ``tokens``, else at blanks).
        min_count: How often a word must occur in the training captions to be known.
        max_words: How many words are known at most, the most frequent ones.
        tokenizer: A tokenizer's file (Hugging Face's ``tokenizer.json``) that is used in place of words.
        tokenizer_end: The token of such a file that ends a caption; left out, found.
        pool: Among how many batches images are put in order of the length of captions, so that less is padded; 1: none.
        cache: A folder for the maps of a frozen encoder; not among the images.
        predict_root: A folder or archive to predict; left out, the test split.
        size: Height and width of the input, or one number for both.
        in_chans: Channels of the input: 1 for grey, 3 for RGB. Images are converted.
        mean: Mean of each channel, on the scale from 0 to 1.
        std: Standard deviation of each channel.
        interpolation: How images are resized.
        crop_pct: Share of an image's shortest side that evaluation keeps: all of it, since captions tell of all of it.
        augment: What chance does to training images; ``true``: crops and colours, but no mirror, ``false``: nothing.
        augment_on: Whether colours change in the ``"workers"``, or on the ``"device"`` that trains.
        batch_size: Images in a batch, on each device.
        workers: Processes that load images, on each device; left out, one for each core, at most 8.
        pin_memory: Whether batches are put where a GPU fetches them faster; left out, where there is a GPU.
        strict: Whether an image that is missing or unreadable is an error. Otherwise it is named, skipped and counted.
        seed: Where the random numbers start: which images are held out, their order, their captions.
        buffer: Of shards: among how many images, that lie one after another, the order is drawn.

    Raises:
        ValueError: If a value is out of its range; as its subclass ``DataError`` if something is wrong with the data.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> temporary = TemporaryDirectory()
        >>> folder = temporary.name
        >>> for k in range(20):
        ...     Image.new("L", (8, 8), k).save(f"{folder}/{k}.png")
        >>> rows = "\\n".join(f"{k}.png,A grey square." for k in range(20))
        >>> _ = Path(folder, "captions.csv").write_text("image,caption\\n" + rows)
        >>> data = Captions(f"{folder}/captions.csv", folder, captions_per_image=1, batch_size=4, workers=0)
        >>> data.setup()
        >>> images, words, lengths, *_ = next(iter(data.train_dataloader()))
        >>> images.shape, words.shape, data.vocabulary.decode(words[0, 0].tolist())
        (torch.Size([4, 3, 224, 224]), torch.Size([4, 1, 4]), 'a grey square')
        >>> temporary.cleanup()
    """

    kind = CaptionSamples
    vocabulary: Vocabulary
    """Numbers for words. May be set before ``setup``, to that of a checkpoint."""
    wanted: Callable[[], None] | None = None
    """What is called once before the first batch of maps, to have them made: it calls :meth:`fill`."""

    def __init__(
        self,
        captions: str | dict[str, str],
        images: str,
        *,
        splits: dict[str, str] | None = None,
        restval: bool = True,
        val_fraction: float = 0.1,
        captions_per_image: int = 5,
        longest: int = 20,
        tokens: Tokens = "plain",
        min_count: int = 5,
        max_words: int | None = None,
        tokenizer: str | None = None,
        tokenizer_end: str | None = None,
        pool: int = 1,
        cache: str | None = None,
        predict_root: str | None = None,
        size: int | tuple[int, int] | None = None,
        in_chans: Literal[1, 3] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: Interpolation | None = None,
        crop_pct: float | None = 1.0,
        augment: Augment | bool = False,
        augment_on: AugmentOn = "workers",
        batch_size: int = 32,
        workers: int | None = None,
        pin_memory: bool | None = None,
        strict: bool = False,
        seed: int = 0,
        buffer: int = BUFFER,
    ):
        super().__init__(
            images,
            predict_root=predict_root,
            size=size,
            in_chans=in_chans,
            mean=mean,
            std=std,
            interpolation=interpolation,
            crop_pct=crop_pct,
            augment=augment,
            augment_on=augment_on,
            val_fraction=val_fraction,
            batch_size=batch_size,
            workers=workers,
            pin_memory=pin_memory,
            strict=strict,
            seed=seed,
            buffer=buffer,
        )
        counts = {"captions_per_image": captions_per_image, "longest": longest, "pool": pool, "min_count": min_count}
        for name, count in (counts | {"max_words": 1 if max_words is None else max_words}).items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, files in (("captions", captions), ("splits", splits)):
            if isinstance(files, dict) and (not files or not files.keys() <= {"train", "val", "test"}):
                raise ValueError(f"{name} must name files of train, val and test, got {', '.join(files) or 'none'}")
        if tokenizer_end and not tokenizer:
            raise ValueError(f"tokenizer_end must be left out without tokenizer, got {tokenizer_end!r}")
        if cache and augment:
            raise ValueError("cache must be left out with augment: maps are made once, of images as they are")
        if cache and Path(cache).resolve().is_relative_to(Path(images).resolve()):
            raise ValueError(f"cache must not lie among the images in {images}, got {cache}")
        self.files = captions if isinstance(captions, dict) else {None: captions}
        self.lists = splits or {}
        self.restval = restval
        self.captions_per_image = captions_per_image
        self.longest = longest
        self.tokens: Tokens = tokens
        self.min_count = min_count
        self.max_words = max_words
        self.tokenizer = tokenizer
        self.tokenizer_end = tokenizer_end
        self.pool = pool
        self.cache = cache

    def source(self) -> Source:
        """Return the splits with their captions, and tell what is left out."""
        left: dict[str, list[str]] = defaultdict(list)
        self.place = placed(self.root)
        photos = self.found(self.place, left)
        groups: dict[str, list[int]] = defaultdict(list)
        for position, photo in sorted(photos.items()):
            photo.captions[:] = self.spoken(photo, left)
            split = "train" if photo.split == "restval" and self.restval else photo.split
            if split in ("restval", UNLISTED):
                left["images of no split"].append(photo.name)
            elif not photo.captions:
                left["images without a caption"].append(photo.name)
            else:
                groups[split or "train"].append(position)
        if not groups:
            raise DataError(f"{self.called}: nothing is left without {listing(left)}")
        if "train" in groups and "val" not in groups:
            groups["train"], groups["val"] = self.held_out(groups["train"])
        captions = {name: [photos[k].captions for k in positions] for name, positions in groups.items()}
        self.vocabulary = self.learned(captions.get("train"))
        splits: dict[str, Split] = {}
        for name, positions in groups.items():
            words = ((self.vocabulary.encode(c, self.longest) for c in several) for several in captions[name])
            encoded = Encoded(words, self.vocabulary.end)
            if name == "train":
                names = [photos[positions[k]].name for k in encoded.cut]
                left[f"what follows {self.longest} words of a caption"] = names
            given = np.array(positions), np.arange(len(positions)), captions[name], encoded, self.captions_per_image
            splits[name] = Described(self.place, *given)
        if any(left.values()):
            warnings.warn(f"{self.called}: left out {listing(left)}", stacklevel=3)
        return Source([], splits, augment=UPRIGHT)

    @property
    def called(self) -> str:
        """What holds the captions."""
        return ", ".join(self.files.values())

    def found(self, place: Files, left: dict[str, list[str]]) -> dict[int, Photo]:
        """Return what captions are of, by its position among the images."""
        images = place.images()
        names: dict[str, list[str]] = defaultdict(list)
        for path in images:
            names[posixpath.basename(path)].append(path)
        listed = self.listed(images)
        told = {given: read(file, self.tokens) for given, file in self.files.items()}
        exact = {path for several in told.values() for photo in several if (path := normal(photo.name)) in images}
        meant: dict[str, str] = {}
        photos: dict[int, Photo] = {}
        for given, file in self.files.items():
            for photo in told[given]:
                path = normal(photo.name)
                if path not in images:
                    others = [other for other in names[posixpath.basename(path)] if other not in exact]
                    if len(others) > 1:
                        raise DataError(f"{file} has {photo.name!r}, which {' and '.join(others[:2])} may be")
                    if not others:
                        left[f"images that are not in {self.root}"].append(photo.name)
                        continue
                    (path,) = others
                    if (other := meant.setdefault(path, photo.name)) != photo.name:
                        raise DataError(f"{file} has {other!r} and {photo.name!r}, which {path} may be")
                split = listed.get(path, UNLISTED) if listed else given or photo.split
                known = photos.setdefault(images[path], Photo(path, [], split))
                if known.split != split:
                    raise DataError(f"{file} has {photo.name!r} in {split or 'train'}, it was in {known.split} before")
                known.captions.extend(photo.captions)
        missing = left[f"images that are not in {self.root}"]
        if missing and (self.strict or not photos):
            none = "none of its images" if not photos else "not all of its images"
            raise DataError(f"{self.called}: {none} is in {self.root}, such as {missing[0]!r}")
        left["images without a caption"] += [path for path, position in images.items() if position not in photos]
        return photos

    def listed(self, images: Iterable[str]) -> dict[str, str]:
        """Return the split of each image that is on a list: by its path or else by its name, with its ending or not."""
        paths: dict[str, list[str]] = defaultdict(list)
        names: dict[str, list[str]] = defaultdict(list)
        for path in images:
            for known, called in ((paths, path), (names, posixpath.basename(path))):
                known[called].append(path)
                known[posixpath.splitext(called)[0]].append(path)
        listed: dict[str, str] = {}
        for split, file in self.lists.items():
            try:
                lines = Path(file).expanduser().read_text("utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"splits: {file} cannot be read ({error})") from error
            for line in filter(None, map(str.strip, lines)):
                path = normal(line)
                for each in paths.get(path) or names.get(posixpath.basename(path)) or ():
                    if listed.setdefault(each, split) != split:
                        raise DataError(f"splits: {line!r} is in {split} and in {listed[each]}")
        return listed

    def spoken(self, photo: Photo, left: dict[str, list[str]]) -> list[str]:
        """Return the captions of an image that have a letter or digit."""
        spoken = [caption for caption in photo.captions if any(map(str.isalnum, caption))]
        left["empty captions"] += [photo.name] * (len(photo.captions) - len(spoken))
        return spoken

    def held_out(self, positions: list[int]) -> tuple[list[int], list[int]]:
        """Return images without and with only those that are held out."""
        count = round(len(positions) * self.val_fraction)
        if not 0 < count < len(positions):
            raise DataError(f"val_fraction={self.val_fraction} holds out {count} of the {len(positions)} images")
        chosen = np.random.default_rng(self.seed).permutation(len(positions))
        return [positions[k] for k in np.sort(chosen[count:])], [positions[k] for k in np.sort(chosen[:count])]

    def learned(self, train: list[list[str]] | None) -> Vocabulary:
        """Return the vocabulary: what was given, a tokenizer's, or the words of the training captions."""
        if given := getattr(self, "vocabulary", None):
            return given
        if self.tokenizer:
            return Tokenizer.read(self.tokenizer, end=self.tokenizer_end)
        if train is None:
            raise DataError(f"{self.called} has no train split to take words from: set vocabulary, or name tokenizer")
        return Words.of(chain(*train), min_count=self.min_count, max_words=self.max_words, tokens=self.tokens)

    def references(self, called: str) -> list[list[list[int]]]:
        """Return the numbers of all captions of each image of a split, whole, in the order of its indices."""
        split: Any = super().samples(called).split
        return [[self.vocabulary.encode(caption) for caption in several] for several in split.captions]

    def fill(self, look: Callable[[Tensor], Tensor], **about: Any) -> None:
        """Have the maps of all images made, or take them from ``cache`` where that was done; batches then have them.

        Of several processes, call it in one first, then in the others.

        Args:
            look: Returns the maps (b, c, h, w) of images, on whatever device.
            about: What they depend on, in plain values, such as the encoder's name and the
                :func:`~visattn.data.features.digest` of its weights. Preprocessing and images are added.

        Raises:
            ValueError: If there is no ``cache``; as ``DataError`` if it holds something else.
        """
        if not self.cache:
            raise ValueError("cache must name a folder for the maps")
        if not self.splits:
            self.setup()
        ours = {name: split for name, split in self.splits.items() if isinstance(split, Described)}
        positions = np.unique(np.concatenate([split.positions for split in ours.values()]))
        names = (self.place.path(int(k)) for k in positions)

        def batches(start: int) -> Loader:
            split = Split(self.place, positions[start:], np.arange(start, len(positions)))
            samples = Samples("the images", split, self.preprocess, strict=self.strict)
            return self.loader(samples, Once(samples, num_replicas=1, rank=0))

        about |= {"preprocess": asdict(self.preprocess), "images": digest(names)}
        maps = fill(Path(self.cache).expanduser(), look, batches, count=len(positions), about=about)
        for name, split in ours.items():
            self.splits[name] = replace(split, maps=maps, rows=np.searchsorted(positions, split.positions))

    def samples(self, *called: str, train: bool = False, names: bool = False) -> Samples:
        if self.cache and not names and self.wanted:
            wanted, self.wanted = self.wanted, None
            wanted()
        samples = super().samples(*called, train=train, names=names)
        if self.cache and not names and isinstance(samples.split, Described) and samples.split.maps is None:
            raise DataError(f"cache={self.cache!r} must be filled before there are batches")
        return samples

    def train_dataloader(self) -> Loader:
        if self.pool == 1:
            return super().train_dataloader()
        samples = self.samples("train", train=True)
        options: dict[str, Any] = {"batch_size": self.batch_size, "pool": self.pool, "seed": self.seed}
        options |= {"shards": samples.shards, "buffer": self.buffer}
        return self.loader(samples, Bucketed(samples, **options, **self.processes()))  # type: ignore[arg-type]
