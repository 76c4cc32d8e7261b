"""Pairs of images that are of one class or not, out of any images with labels."""

from functools import cached_property

import numpy as np
from torch.utils.data import default_collate

from visattn.data.images import Images, Sample, Samples
from visattn.data.sources import DataError, Split


class PairSamples(Samples):
    """Pairs of the images of a split, as many of one class as of two; no image is in two of them.

    An index may come with an epoch: each has pairs of its own, which follow from (seed, epoch). The pixels of an image
    follow from (seed, epoch, image) as those of :class:`~visattn.data.images.Samples`; where one cannot be read, the
    pair is left out or, in training, has another image in its place. Arguments as there.

    Raises:
        DataError: If no two images are of one class, or no two are of different classes.
    """

    drawn: tuple[int, np.ndarray] | None = None
    """The pairs of the epoch that was last asked for."""

    def __len__(self) -> int:
        return 2 * self.half

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        first, second = (super(PairSamples, self).__getitem__((epoch, int(k))) for k in self.pairs(epoch)[index])
        unreadable = first.unreadable | second.unreadable
        if first.image is None or second.image is None:
            return Sample(None, None, unreadable)
        if self.names:
            return Sample(default_collate([first.image, second.image]), f"{first.target} | {second.target}", unreadable)
        same = (first.target == second.target).float()
        return Sample(default_collate([first.image, second.image]), same, unreadable)

    @property
    def shards(self) -> None:
        """None: the two images of a pair lie in any shards."""

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """Of every class: which it is, how many pairs it makes with itself, how many images are left for others."""
        counts = {int(k): int(n) for k, n in zip(*np.unique(self.split.targets, return_counts=True), strict=True)}
        own, due = {}, 0.5
        for k, n in counts.items():
            due += n / 4  # half of the images
            own[k] = min(n // 2, int(due))
            due -= own[k]
        rest = {k: n - 2 * own[k] for k, n in counts.items()}
        most = max(rest, key=lambda k: rest[k])
        rest[most] = min(rest[most], sum(rest.values()) - rest[most])  # each of them needs one of another class
        return [(k, own[k], rest[k]) for k in counts]

    @cached_property
    def half(self) -> int:
        """How many pairs are of one class, and how many are not."""
        own, rest = (sum(group[k] for group in self.groups) for k in (1, 2))
        if not min(own, rest // 2):
            counts = ", ".join(str(int((self.split.targets == group[0]).sum())) for group in self.groups)
            raise DataError(f"{self.called} must have images for pairs of one class and of two, got {counts} of each")
        return min(own, rest // 2)

    def pairs(self, epoch: int) -> np.ndarray:
        """Return the images of every pair of an epoch, in no order."""
        if self.drawn is None or self.drawn[0] != epoch:
            self.drawn = epoch, self.draw(np.random.default_rng((self.seed, epoch)))
        return self.drawn[1]

    def draw(self, chance: np.random.Generator) -> np.ndarray:
        """Draw pairs: of each class with itself, and of what is left with other classes."""
        targets = self.split.targets
        same, rest = [], []
        for label, own, others in self.groups:
            images = chance.permutation(np.flatnonzero(targets == label))
            same.append(images[: 2 * own].reshape(-1, 2))
            rest.append(images[2 * own : 2 * own + others])
        left = chance.permutation(np.concatenate(rest))
        different = left[: len(left) // 2 * 2].reshape(-1, 2)
        while len(alike := np.flatnonzero(targets[different[:, 0]] == targets[different[:, 1]])):
            for k in alike:  # give its second image to a pair that has neither class, if one is drawn
                other = chance.integers(len(different))
                ours, theirs = targets[different[k]], targets[different[other]]
                if ours[0] != theirs[1] and theirs[0] != ours[1]:
                    different[[k, other], 1] = different[[other, k], 1]
        pairs = (chance.permutation(each)[: self.half] for each in (np.concatenate(same), different))
        return chance.permutation(np.concatenate([*pairs]))


class Pairs(Images):
    """Pairs of images, half of one class, half not, from disjoint splits; no image is in two pairs of a split.

    What lies there is read, split and transformed as by :class:`~visattn.data.images.Images`, whose arguments these
    are, with one difference: where one of ``val`` and ``test`` is missing, a share of the training images is held out
    for it. Training draws new pairs in every epoch; those of evaluation follow from ``seed`` alone.

    Batches are (images, targets): images of shape (b, 2, c, h, w), and 1 for pairs of one class, 0 for others. For
    prediction they are (images, names).

    Raises:
        ValueError: As ``Images`` does; as ``DataError`` if the images have many labels or make no pairs.

    Example:
        >>> data = Pairs("digits", batch_size=16, workers=0)
        >>> data.setup()
        >>> images, same = next(iter(data.train_dataloader()))
        >>> images.shape, same.shape
        (torch.Size([16, 2, 1, 32, 32]), torch.Size([16]))
    """

    kind = PairSamples

    def divided(self, splits: dict[str, Split]) -> dict[str, Split]:
        if self.multi_label:
            raise DataError(f"pairs need images with one label each; {self.root} has many")
        for name in ("test", "val"):
            if name not in splits:
                train, held = splits["train"].hold_out(self.val_fraction, self.seed)
                splits = {**splits, "train": train, name: held}
        return super().divided(splits)
