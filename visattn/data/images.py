"""Images with labels, from wherever they lie, as batches for training and evaluation."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pytorch_lightning as pl
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from visattn.data.shards import ShardError, Shards, holds_shards, open_shards
from visattn.data.sources import DataError, Source, Split, download, open_source
from visattn.data.transforms import (
    Augment,
    Augmentation,
    DeviceAugmentation,
    Interpolation,
    Preprocess,
    Unfinished,
    as_seen,
    spread,
)

ATTEMPTS = 20  # how many images in a row may be unreadable before training gives up
AugmentOn = Literal["workers", "device"]
BUFFER = 4096  # images, among which the order of those in shards is drawn


class Sample(NamedTuple):
    """An image and what it shows (its class, its labels, or its name), and images that could not be read, with why."""

    image: Tensor | Unfinished | None
    target: Any
    unreadable: dict[str, str]


class Samples(Dataset):
    """The images of a split, transformed.

    An index may come with an epoch. The random numbers of a training image follow from (seed, epoch, index), so the
    pixels depend neither on the order, nor on the workers, nor on the processes. In training an unreadable image is
    replaced by one drawn from the same numbers; else it is left out.

    Args:
        called: What the split is called in messages.
        split: The images.
        preprocess: What evaluation does to an image, and the form in which training leaves it.
        augmentation: What chance does in training; None: nothing.
        seed: Where the random numbers start.
        train: Whether unreadable images are replaced.
        strict: Whether an unreadable image is an error.
        names: Whether an image comes with its name and not with its target.
    """

    def __init__(
        self,
        called: str,
        split: Split,
        preprocess: Preprocess,
        *,
        augmentation: Augmentation | DeviceAugmentation | None = None,
        seed: int = 0,
        train: bool = False,
        strict: bool = False,
        names: bool = False,
    ):
        self.called = called
        self.split = split
        self.preprocess = preprocess
        self.augmentation = augmentation
        self.seed = seed
        self.train = train
        self.strict = strict
        self.names = names
        self.unreadable: dict[str, str] = {}
        """Images that could not be read so far, by name, with why."""

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        seed = self.seed, epoch, index
        unreadable = {}
        for attempt in range(ATTEMPTS if self.train else 1):
            if attempt:
                index = int(np.random.default_rng((*seed, attempt)).integers(len(self.split)))
            try:
                image = self.read(index)
            except Exception as error:  # decoders raise anything at damaged bytes
                unreadable[self.split.name(index)] = f"{type(error).__name__}: {error}"
            else:
                target = self.split.name(index) if self.names else torch.as_tensor(self.split.targets[index])
                return Sample(self.transform(image, seed), target, unreadable)
        return Sample(None, None, unreadable)

    @property
    def shards(self) -> np.ndarray | None:
        """In which shard the image of each index lies, where they lie in any."""
        place = self.split.place
        return place.shard[self.split.positions] if isinstance(place, Shards) else None

    def read(self, index: int) -> Any:
        """Return an image as it is before :meth:`transform`."""
        return as_seen(self.split.read(index), self.preprocess.input_size[0])

    def transform(self, image: Any, seed: Sequence[int]) -> Tensor | Unfinished:
        return self.augmentation(image, seed) if self.augmentation else self.preprocess(image)

    def collate(self, samples: list[Sample]) -> tuple[Any, dict[str, str]]:
        """Return the batch of the samples that have an image, None where none has, and what was unreadable."""
        pairs = [(sample.image, sample.target) for sample in samples if sample.image is not None]
        unreadable = {name: why for sample in samples for name, why in sample.unreadable.items()}
        return self.batch(pairs) if pairs else None, unreadable

    def batch(self, pairs: list[tuple[Any, Any]]) -> Any:
        """Return images and targets as one batch."""
        return default_collate(pairs)


class Resumable(DataLoader):
    """Batches that go on within an epoch, also with another number of workers.

    What a sample is follows from (seed, epoch, index), so their state is how many were given, of those prepared.
    """

    epoch = given = 0
    """The epoch that was begun last, and how many of its batches were given."""
    resumed: tuple[int, int] | None = None
    """Which epoch goes on, and after how many batches."""

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = state["epoch"], state["batches"]
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(state["epoch"])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given = 0
        if isinstance(self.sampler, Shuffled):
            self.epoch = self.sampler.epoch
            if self.resumed and self.resumed[0] == self.epoch:
                self.given = self.resumed[1]
            self.sampler.start = self.given * (self.batch_size or 1)
        return self.counted(super().__iter__())

    def counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.given += 1
            yield batch


class Loader(Resumable):
    """Batches of :class:`Samples`; warns of each unreadable image by name and counts them at the end of the epoch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self.readable(super().__iter__())

    def readable(self, batches: Iterator[Any]) -> Iterator[Any]:
        samples: Samples = self.dataset  # type: ignore[assignment]
        unreadable: set[str] = set()
        given = 0
        for batch, failed in batches:
            for name, why in failed.items():
                if samples.strict:
                    raise DataError(f"cannot read {name} ({why})")
                lost = why.startswith(ShardError.__name__)  # and all that is in it, which is named once
                if (why not in samples.unreadable.values()) if lost else (name not in samples.unreadable):
                    what = f"the images of a shard, such as {name}," if lost else f"{name}, which"
                    warnings.warn(f"skipped {what} cannot be read ({why})", stacklevel=2)
                samples.unreadable[name] = why
            unreadable |= failed.keys()
            if batch is None and samples.train:
                raise DataError(f"{ATTEMPTS} images of {samples.called} in a row cannot be read: {', '.join(failed)}")
            given += batch is not None
            if self.given == len(self):  # before the last batch: whoever counts batches asks for no more
                if unreadable:
                    epoch = f", epoch {self.sampler.epoch}" if isinstance(self.sampler, Shuffled) else ""
                    warnings.warn(
                        f"{samples.called}{epoch}: {len(unreadable)} of {len(samples.split)} images could not be read "
                        f"and were {'replaced by others' if samples.train else 'left out'}",
                        stacklevel=2,
                    )
                if not given:
                    raise DataError(f"none of the {len(samples.split)} images of {samples.called} can be read")
            if batch is not None:
                yield batch


class Shuffled(DistributedSampler):
    """Pairs (epoch, index) in an order that follows from the seed and the epoch, as many for every process.

    Images in shards come shard after shard, in an order drawn anew in each epoch, every process from a stretch of them
    that is its own. Within it an image moves by less than a buffer, so that only the shards in that are wanted at a
    time.

    Args:
        dataset: What has the indices.
        shards: In which shard each of them lies.
        buffer: By how many places an image moves at most.
        options: As of ``DistributedSampler``.
    """

    start = 0
    """How many are left out, which an earlier run has had."""

    def __init__(self, dataset: Any, *, shards: np.ndarray | None = None, buffer: int = 1, **options: Any):
        super().__init__(dataset, **options)
        self.shards = shards
        self.buffer = buffer

    def __iter__(self) -> Iterator[Any]:
        return islice(((self.epoch, index) for index in self.indices()), self.start, None)

    def indices(self) -> list[int]:
        """Return the indices of this process in the order of the epoch."""
        if self.shards is None:
            return list(super().__iter__())
        chance = np.random.default_rng((self.seed, self.epoch))
        turns = chance.permutation(int(self.shards.max()) + 1)
        indices = np.resize(np.argsort(turns[self.shards], kind="stable"), self.total_size)
        stretch = indices[self.rank * self.num_samples : (self.rank + 1) * self.num_samples]
        chance = np.random.default_rng((self.seed, self.epoch, self.rank))
        return stretch[np.argsort(np.arange(len(stretch)) + self.buffer * chance.random(len(stretch)))].tolist()


class Once(DistributedSampler):
    """Every index exactly once over all processes, so that some may get one more than others."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def opened(root: str, *, directory: str, labelled: bool = True) -> Source:
    """Return what lies in shards, or anywhere else."""
    if holds_shards(root):
        return open_shards(root, labelled=labelled)
    return open_source(root, directory=directory, labelled=labelled)


class Images(pl.LightningDataModule):
    """Images with labels: a folder, an archive, MNIST's files or a known set, split, transformed and batched.

    A folder, or a tar or zip laid out as one, has class folders, or ``train``, ``val`` and ``test`` with class folders
    in each; a ``classes.txt`` of lines ``folder<TAB>words`` names and orders the classes. A ``labels.csv`` of lines
    ``filename,label1|label2`` gives images many labels instead. Where only one of ``val`` and ``test`` is there, it
    serves for both; where neither is, a share of each class is held out. Nothing is written beside the data.

    A compressed tar is unpacked into memory; a plain tar and a zip are read in place.

    Options of the input that are left unset come from :attr:`preprocess`, where that was set before :meth:`setup` (to
    what a pretrained model expects), else from what suits the images.

    Batches are (images, targets), the targets classes or, with many labels, rows of zeros and ones; for prediction
    they are (images, names).

    Args:
        root: A folder, an archive, a folder of shards or its URL, or the name of a known set: digits (scikit-learn's,
            always there), MNIST, FashionMNIST, KMNIST, CIFAR10, CIFAR100 or ImageNet.
        directory: Where a known set lies or is downloaded to.
        download: Whether to download a known set that is not there.
        predict_root: A folder, archive or known set to predict, labelled or not; left out, the test split.
        size: Height and width of the input, or one number for both.
        in_chans: Channels of the input: 1 for grey, 3 for RGB. Images are converted.
        mean: Mean of each channel, on the scale from 0 to 1.
        std: Standard deviation of each channel.
        interpolation: How images are resized.
        crop_pct: Share of an image's shortest side that evaluation keeps.
        augment: What chance does to training images; ``true``: what suits the images (digits are never mirrored),
            ``false``: nothing.
        augment_on: Where that happens: all of it in the ``"workers"``; or only crops and rotations, and the rest on the
            ``"device"`` that trains, for the whole batch, where workers are too slow for it.
        val_fraction: Share of each class that is held out where the data come without ``val`` and ``test``.
        train_per_class: Train with only so many images of each class, drawn by the seed.
        val_per_class: Evaluate with only so many images of each class, drawn by the seed.
        batch_size: Images in a batch, on each device.
        workers: Processes that load images, on each device; left out, one for each core, at most 8.
        pin_memory: Whether batches are put where a GPU fetches them faster; left out, where there is a GPU.
        strict: Whether an unreadable image is an error. Otherwise it is named, skipped and counted.
        seed: Where the random numbers start: which images are held out or drawn, their order, their augmentation.
        buffer: Of shards: among how many images, that lie one after another, the order is drawn.

    Raises:
        ValueError: If a value is out of its range; as its subclass ``DataError`` if something is wrong with the data.

    Example:
        >>> data = Images("digits", batch_size=16, workers=0)
        >>> data.setup()
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, targets.shape, data.num_classes
        (torch.Size([16, 1, 32, 32]), torch.Size([16]), 10)
    """

    kind: ClassVar[type[Samples]] = Samples
    """What a loader draws from."""
    preprocess: Preprocess
    """How evaluation and inference prepare an image. May be set before ``setup``, which then only overrides options."""
    labels: list[str]
    """What each class is called."""
    multi_label: bool
    """Whether an image may have many labels."""

    def __init__(
        self,
        root: str = "digits",
        *,
        directory: str = "data",
        download: bool = False,
        predict_root: str | None = None,
        size: int | tuple[int, int] | None = None,
        in_chans: Literal[1, 3] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: Interpolation | None = None,
        crop_pct: float | None = None,
        augment: Augment | bool = True,
        augment_on: AugmentOn = "workers",
        val_fraction: float = 0.2,
        train_per_class: int | None = None,
        val_per_class: int | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        pin_memory: bool | None = None,
        strict: bool = False,
        seed: int = 0,
        buffer: int = BUFFER,
    ):
        super().__init__()
        for name, count in (("train_per_class", train_per_class), ("val_per_class", val_per_class)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {buffer}")
        if augment_on not in get_args(AugmentOn):
            raise ValueError(f"augment_on must be workers or device, got {augment_on!r}")
        self.root = root
        self.directory = directory
        self.download = download
        self.predict_root = predict_root
        options = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
        self.options = {name: value for name, value in options.items() if value is not None}
        self.size = (size, size) if isinstance(size, int) else size
        self.channels = in_chans
        self.augment = augment
        self.augment_on = augment_on
        self.val_fraction = val_fraction
        self.per_class = {"train": train_per_class, "val": val_per_class, "test": val_per_class}
        self.batch_size = batch_size
        self.workers = workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.strict = strict
        self.seed = seed
        self.buffer = buffer
        self.splits: dict[str, Split] = {}

    @property
    def in_chans(self) -> int:
        """Channels of the input."""
        return self.preprocess.input_size[0]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        channels, height, width = self.preprocess.input_size
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.labels)

    def prepare_data(self) -> None:
        if self.download:
            download(self.root, self.directory)

    def setup(self, stage: str | None = None) -> None:
        if not self.splits:
            source = self.source()
            self.labels, self.multi_label = source.labels, source.multi_label
            self.splits = self.divided(source.splits)
            self.preprocess = self.prepared(getattr(self, "preprocess", None), source.input_size)
            if self.augment is True:
                self.augment = source.augment
            elif self.augment and self.augment.flip is None:
                self.augment = replace(self.augment, flip=source.augment.flip)
        if self.predict_root and "predict" not in self.splits:
            found = opened(self.predict_root, directory=self.directory, labelled=False).splits
            self.splits["predict"] = next(found[name] for name in ("predict", "test", "train") if name in found)

    def source(self) -> Source:
        """Return what lies there."""
        return opened(self.root, directory=self.directory)

    def divided(self, splits: dict[str, Split]) -> dict[str, Split]:
        """Return the splits, something held out, and no more of each class than was asked for."""
        if splits.keys() == {"train"}:
            train, held = splits["train"].hold_out(self.val_fraction, self.seed)
            if not len(held):
                what = f"none of the {len(train)} images of {self.root}"
                raise DataError(f"val_fraction={self.val_fraction} holds out {what}")
            splits = {"train": train, "val": held}
        for name, split in splits.items():
            if (most := self.per_class[name]) is not None:
                if self.multi_label:
                    raise ValueError(f"{name}_per_class={most} needs images with one label each; {self.root} has many")
                splits = {**splits, name: split.at_most(most, self.seed)}
        return splits

    def prepared(self, given: Preprocess | None, suits: tuple[int, int, int]) -> Preprocess:
        """Return the preprocessing: the options, then what was given, then what suits the images."""
        channels, height, width = given.input_size if given else suits
        input_size = (self.channels or channels, *(self.size or (height, width)))
        if given:
            mean, std = spread(given.mean, input_size[0]), spread(given.std, input_size[0])
        elif input_size[0] == 3:
            mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        else:
            mean, std = (0.5,), (0.5,)
        fields: dict[str, Any] = {"input_size": input_size, "mean": mean, "std": std} | self.options
        return replace(given, **fields) if given else Preprocess(**fields)

    def samples(self, *called: str, train: bool = False, names: bool = False) -> Samples:
        """Return the first split there is of these."""
        if not self.splits:
            self.setup()
        found = next((name for name in called if name in self.splits), None)
        if found is None:
            raise DataError(f"{self.root} has no {called[0]} split, only {', '.join(self.splits)}")
        return self.kind(
            found,
            self.splits[found],
            self.preprocess,
            augmentation=self.augmentation if train else None,
            seed=self.seed,
            train=train,
            strict=self.strict,
            names=names,
        )

    @cached_property
    def augmentation(self) -> Augmentation | DeviceAugmentation | None:
        """What chance does to a training image, and where; known after :meth:`setup`."""
        if not isinstance(self.augment, Augment):
            return None
        return (DeviceAugmentation if self.augment_on == "device" else Augmentation)(self.augment, self.preprocess)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not (isinstance(batch, (list, tuple)) and isinstance(batch[0], Unfinished)):
            return batch
        assert isinstance(self.augmentation, DeviceAugmentation)
        images = self.augmentation.finish(batch[0])
        return batch._replace(images=images) if hasattr(batch, "_replace") else [images, *batch[1:]]

    def loader(self, samples: Samples, sampler: DistributedSampler | None) -> Loader:
        workers = self.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(8, max(1, cores // (self.trainer.num_devices if self.trainer else 1)))
        return Loader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=samples.collate,
            pin_memory=self.pin_memory,
            persistent_workers=workers > 0,
            drop_last=isinstance(sampler, Shuffled) and len(sampler) >= self.batch_size,
        )

    def processes(self) -> dict[str, Any]:
        """Return how many processes train together, and which of them this is."""
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}

    def train_dataloader(self) -> Loader:
        samples = self.samples("train", train=True)
        options: dict[str, Any] = {"shards": samples.shards, "buffer": self.buffer, "seed": self.seed}
        return self.loader(samples, Shuffled(samples, **options, **self.processes()))

    def val_dataloader(self) -> Loader:
        samples = self.samples("val", "test")
        return self.loader(samples, Once(samples, **self.processes()))

    def test_dataloader(self) -> Loader:
        samples = self.samples("test", "val")
        return self.loader(samples, Once(samples, **self.processes()))

    def predict_dataloader(self) -> Loader:
        return self.loader(self.samples("predict", "test", "val", names=True), None)  # Lightning divides it itself
