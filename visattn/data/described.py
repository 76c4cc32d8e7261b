"""Digits on a canvas with a sentence that says which they are and where, or with questions about them."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from visattn.data.canvas import Canvas, CanvasBatch, Canvases, Chance, Layout
from visattn.data.captions import CaptionBatch, ReferenceBatch
from visattn.data.images import Once
from visattn.data.sources import DataError, Split
from visattn.data.vocabulary import Words

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOTHING = "nothing"
SAYING = ("a", "an", "above", "left", "of", *DIGITS)
ASKING = ("what", "is", "above", "below", "left", "right", "of", "the", *DIGITS)
FAR = 1 << 20  # farther than any digit


class QuestionBatch(NamedTuple):
    """Canvases with questions about them."""

    images: Float[Tensor, "b c h w"]
    words: Int[Tensor, "b r t"]
    """Questions about each canvas; behind the last word of a question, what ends one."""
    lengths: Int[Tensor, "b r"]
    """How many words each has."""
    answers: Int[Tensor, "b r"]
    """The class of the digit that is the answer; behind these classes, that there is nothing."""
    boxes: Int[Tensor, "b r 4"]
    """Where the answer is seen, as in :class:`~visattn.data.canvas.CanvasBatch`; zeros where there is nothing."""
    names: list[str]
    """What the canvases are called."""


class Scenes(Canvases):
    """Canvases whose digits lie in the cells of a grid, at most one in each, at any whole pixels that keep it inside.

    Digits are in reading order: row by row from the top, each from left to right. As
    :class:`~visattn.data.canvas.Canvases`, and:

    Args:
        cells: Rows and columns of the grid.
        count: How many canvases there are; None: as many as there are digits.
        distinct: Whether no two digits of a canvas are of one class.

    Raises:
        DataError: If there are no images of some class, for distinct ones.
        ValueError: If a digit does not fit into a cell, or not so many into the grid.
    """

    def __init__(
        self,
        called: str,
        split: Split,
        layout: Layout,
        *,
        cells: tuple[int, int],
        count: int | None = None,
        distinct: bool = False,
        **options: Any,
    ):
        self.count = len(split) if count is None else count
        super().__init__(called, split, layout, **options)
        rows, columns = cells
        self.cell = layout.height // rows, layout.width // columns
        needs = tuple(self.digits.shape[1:])
        if min(self.cell[0] - needs[0], self.cell[1] - needs[1]) < 0:
            least = rows * needs[0], columns * needs[1]
            raise ValueError(f"size must be at least {least} for {rows} × {columns} digits, got {layout.size}")
        if layout.digits > rows * columns:
            raise ValueError(f"digits must be at most {rows * columns}, one for each cell, got {layout.digits}")
        self.of_class = self.targets.argsort(stable=True)  # the images of 0, then those of 1, and so on
        self.counts = self.targets.bincount(minlength=self.classes)
        if distinct and not layout.digits <= int((self.counts > 0).sum()) == self.classes:
            raise DataError(
                f"{called} must have images of {self.classes} classes, at least as many as digits of a canvas"
            )
        self.cells = cells
        self.distinct = distinct

    def __len__(self) -> int:
        return self.count

    def chosen(self, first: Tensor, chance: Chance) -> Tensor:
        return super().chosen(chance.below(len(self.digits), 1), chance)

    def others(self, first: Tensor, count: int, chance: Chance) -> Tensor:
        if not self.distinct:
            return super().others(first, count, chance)
        further = 1 + chance.uniform(self.classes - 1).argsort(1)[:, :count]
        classes = (self.targets[first] + further) % self.classes
        return self.of_class[self.counts.cumsum(0)[classes] - 1 - chance.below(self.counts[classes], count)]

    def placed(self, chance: Chance, absent: Tensor) -> tuple[Tensor, Tensor]:
        (rows, columns), k = self.cells, self.layout.digits
        chosen = chance.uniform(rows * columns).argsort(1)[:, :k]
        chosen = chosen.masked_fill(absent, rows * columns).sort(1).values.masked_fill(absent, 0)
        canvas, digit, cell = (
            torch.tensor(sides[::-1])
            for sides in ((self.layout.height, self.layout.width), self.digits.shape[1:], self.cell)
        )
        corner = torch.stack((chosen % columns, chosen // columns), -1) * cell + chance.below(cell - digit + 1, k, 2)
        shift = (canvas - 2 * corner - digit) / digit
        turn = torch.diag(canvas / digit).expand(*corner.shape, 2)
        return corner, torch.cat((turn, shift[..., None]), -1).float()

    def __getitems__(self, keys: "Sequence[int | tuple[int, int]]") -> Any:
        made = super().__getitems__(keys)
        if not isinstance(made, CanvasBatch):
            return made
        epochs, indices = zip(*(key if isinstance(key, tuple) else (0, key) for key in keys), strict=True)
        return self.told_of(made, indices, epochs[0] if self.train else 0)

    def name(self, index: int) -> str:
        return f"{self.called} {index}"

    def told_of(self, made: CanvasBatch, indices: Sequence[int], epoch: int) -> Any:
        """Return a batch, of canvases and what is told of them."""
        raise NotImplementedError

    def lines(self, boxes: Int[Tensor, "b k 4"]) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b k"]]:
        """Return the row and column of the grid in which digits are."""
        return boxes[..., 1] // self.cell[0], boxes[..., 0] // self.cell[1]


class DescribedCanvases(Scenes):
    """The canvases of a split with a sentence about each: see :class:`DescribedCanvas`."""

    vocabulary: ClassVar[Words] = Words(SAYING)

    def told_of(self, made: CanvasBatch, indices: Sequence[int], epoch: int) -> Any:
        words, lengths, boxes = (each[:, None] for each in self.described(made))
        if self.train:
            return CaptionBatch(made.images, words, lengths, torch.tensor(indices), boxes)
        references = [[self.vocabulary.decode(each)] for each in words[:, 0].tolist()]
        return ReferenceBatch(made.images, references, [*map(self.name, indices)], words, boxes)

    def described(self, made: CanvasBatch) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b"], Int[Tensor, "b t 4"]]:
        """Return the sentence about each canvas, with how many words it has, and the box of what each word names."""
        there, (row, _) = made.digit_labels >= 0, self.lines(made.boxes)
        follows = there & (torch.arange(there.shape[1]) > 0)
        below = follows & (row > row.roll(1, 1))
        beside = follows & ~below
        name = made.digit_labels.clamp_min(0) + self.vocabulary.index[DIGITS[0]]
        a, an, above, left, of, eight = (
            torch.full_like(name, self.vocabulary.index[word]) for word in (*SAYING[:5], "eight")
        )
        slots = torch.stack((above, left, of, torch.where(name == eight, an, a), name), 2).flatten(1)
        said = torch.stack((below, beside, beside, there, there), 2).flatten(1)
        boxes = made.boxes.new_zeros(*there.shape, 5, 4)
        boxes[:, :, 4] = made.boxes
        words, lengths = in_line(slots, said, self.vocabulary.end)
        where = boxes.new_zeros(*words.shape, 4)
        where[torch.arange(words.shape[1]) < lengths[:, None]] = boxes.flatten(1, 2)[said]
        return words, lengths + 1, where


class QuestionedCanvases(Scenes):
    """The canvases of a split with questions about each: see :class:`QuestionedCanvas`.

    As :class:`Scenes`, and:

    Args:
        questions: How many there are about a canvas.
        nothing: Share of those whose answer is that there is nothing.
    """

    vocabulary: ClassVar[Words] = Words(ASKING)

    def __init__(self, *given: Any, questions: int, nothing: float, **options: Any):
        super().__init__(*given, distinct=True, **options)
        self.questions = questions
        self.nothing = nothing

    def told_of(self, made: CanvasBatch, indices: Sequence[int], epoch: int) -> Any:
        place = zlib.crc32(f"questions of {self.called}".encode())
        chance = Chance(self.seed, place, epoch, np.array(indices))
        return QuestionBatch(made.images, *self.asked(made, chance), [*map(self.name, indices)])

    def asked(self, made: CanvasBatch, chance: Chance) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return questions about each canvas, with how many words each has, their answers, and where these are."""
        labels, k, there = made.digit_labels, self.layout.digits, made.digit_labels >= 0
        nearest, found = self.neighbours(made.boxes, there)
        nothing = chance.uniform(self.questions, 1, 1) < self.nothing
        fits = (found[:, None].flatten(2) != nothing.flatten(2)) & there.repeat(1, 4)[:, None]
        fits = fits | (there.repeat(1, 4)[:, None] & ~fits.any(2, keepdim=True))
        chosen = chance.uniform(self.questions, 4 * k).masked_fill(~fits, -1).argmax(2)  # a side, and a digit
        side, digit = chosen // k, chosen % k
        found, nearest = (each.flatten(1).gather(1, chosen) for each in (found, nearest))
        answers = labels.gather(1, nearest).masked_fill(~found, len(DIGITS))
        boxes = made.boxes.take_along_dim(nearest[..., None], 1) * found[..., None]

        known = ("what", "is", "above", "of", "the", DIGITS[0])
        what, is_, above, of, the, zero = (self.vocabulary.index[word] for word in known)
        fixed = [torch.full_like(side, each) for each in (what, is_, of, the)]
        slots = torch.stack((*fixed[:2], above + side, *fixed[2:], zero + labels.gather(1, digit)), 2)
        said = torch.ones_like(slots, dtype=torch.bool)
        said[..., 3] = side > 1
        words, lengths = in_line(slots.flatten(0, 1), said.flatten(0, 1), self.vocabulary.end)
        return words.unflatten(0, side.shape), lengths.unflatten(0, side.shape), answers, boxes

    def neighbours(
        self, boxes: Int[Tensor, "b k 4"], there: Bool[Tensor, "b k"]
    ) -> tuple[Int[Tensor, "b 4 k"], Bool[Tensor, "b 4 k"]]:
        """Return which digit is next above, below, left and right of each, and whether there is one."""
        down, right = (line[:, None] - line[..., None] for line in self.lines(boxes))
        steps = torch.stack((-down, down, -right, right), 1)
        aside = torch.stack((right, right, down, down), 1)
        possible = (steps > 0) & (aside == 0) & there[:, None, None] & there[:, None, :, None]
        distance, nearest = torch.where(possible, steps, FAR).min(3)
        return nearest, distance < FAR


def in_line(
    slots: Int[Tensor, "b s"], said: Bool[Tensor, "b s"], end: int
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b"]]:
    """Return the words that are said, one behind the other and at least one end behind them, and how many they are."""
    lengths = said.sum(1)
    words = slots.new_full((len(slots), int(lengths.max()) + 1 if len(slots) else 1), end)
    words[torch.arange(words.shape[1]) < lengths[:, None]] = slots[said]
    return words, lengths


class DescribedCanvas(Canvas):
    """Digits on a canvas with a sentence that says which they are and where.

    The digits lie in the cells of a grid, none over another. They are told in reading order, row by row from the top,
    each from left to right: ``above`` stands between rows and ``left of`` between digits of a row, so that ``a two left
    of a five above a nine`` has two and five side by side, and the nine in a row below. There is one such sentence for
    a canvas, and any other is wrong.

    Training has new canvases in every epoch; those of evaluation are fixed by the seed. Their digits are those of their
    split alone: where ``val`` or ``test`` is missing, a share of the training digits is held out for it. The test also
    has canvases with ``more`` digits.

    Training gives :class:`~visattn.data.captions.CaptionBatch`, evaluation
    :class:`~visattn.data.captions.ReferenceBatch`, both with the box of the digit that each word names. For prediction,
    batches are (images, names).

    Args:
        root: The digits: digits (scikit-learn's, always there), MNIST, or a folder of such files.
        directory: Where a known set lies or is downloaded to.
        download: Whether to download a known set that is not there.
        size: Height and width of the canvas, or one number for both.
        cells: Rows and columns of the grid.
        digits: How many digits there are, from the first number to the second.
        more: How many there are in the second test; None: there is no such test.
        canvases: How many canvases an epoch of training has; None: as many as there are digits to train with.
        evaluated: How many canvases an evaluation has; None: as many as it has digits.
        in_chans: Channels of the input, 1 or 3 alike; left out, what a pretrained model expects, else 1.
        mean: Mean of each channel, on the scale from 0 to 1; left out, what a pretrained model expects, else 0.
        std: Standard deviation of each channel; left out, what a pretrained model expects, else 1.
        val_fraction: Share of each class that is held out for each of ``val`` and ``test`` that is missing.
        batch_size: Canvases in a batch, on each device.
        workers: Processes that make canvases, on each device.
        seed: Where the random numbers start: which digits are held out, their order, and what is on the canvases.

    Raises:
        ValueError: If a value is out of its range; as its subclass ``DataError`` if something is wrong with the data.

    Example:
        >>> data = DescribedCanvas(batch_size=16)
        >>> data.setup()
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.images.shape, batch.words.shape[:2], batch.boxes.shape[3]
        (torch.Size([16, 1, 96, 96]), torch.Size([16, 1]), 4)
        >>> next(iter(data.val_dataloader())).references[0]
        ['a zero above a five left of a four']
    """

    vocabulary: Words
    """Numbers for the words of sentences, whatever the digits are."""

    kind: ClassVar[type[DescribedCanvases | QuestionedCanvases]] = DescribedCanvases

    def __init__(
        self,
        root: str = "digits",
        *,
        directory: str = "data",
        download: bool = False,
        size: int | tuple[int, int] = 96,
        cells: tuple[int, int] = (3, 3),
        digits: tuple[int, int] = (1, 3),
        more: tuple[int, int] | None = (4, 6),
        canvases: int | None = None,
        evaluated: int | None = None,
        in_chans: Literal[1, 3] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
    ):
        for name, count in {"canvases": canvases, "evaluated": evaluated, "cells": min(cells)}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, bounds in {"digits": digits, "more": more or digits}.items():
            if not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"{name} must be two numbers from 1 on, the lesser first, got {tuple(bounds)}")
            if bounds[1] > cells[0] * cells[1]:
                raise ValueError(f"{name} must be at most {cells[0] * cells[1]}, one for each cell, got {bounds[1]}")
        super().__init__(
            "sequences",
            root=root,
            directory=directory,
            download=download,
            size=size,
            fewest=digits[0],
            digits=digits[1],
            in_chans=in_chans,
            mean=mean,
            std=std,
            val_fraction=val_fraction,
            described=True,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
        )
        self.cells = cells
        self.more = more
        self.counts = {"train": canvases} | dict.fromkeys(("val", "test", "more"), evaluated)
        self.vocabulary = self.kind.vocabulary

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        super().setup(stage)
        if self.more:
            layout = replace(self.layout, fewest=self.more[0], digits=self.more[1])
            self.splits["more"] = self.made("more", self.splits["test"].split, layout, classes=len(DIGITS))

    def made(self, called: str, split: Split, layout: Layout, *, classes: int, **options: Any) -> Canvases:
        if self.labels[:-1] != [*map(str, range(len(DIGITS)))]:
            raise DataError(f"root must hold the digits from 0 to 9 to be described, got {', '.join(self.labels[:-1])}")
        known = {"cells": self.cells, "count": self.counts[called]}
        return super().made(called, split, layout, classes=classes, **known | self.options | options)

    @property
    def options(self) -> dict[str, Any]:
        """What else the canvases are told."""
        return {}

    def test_dataloader(self) -> Any:
        """Return what loads the test, and that with more digits, if there is one."""
        if not self.more:
            return super().test_dataloader()
        canvases = self.canvases("more")
        return [super().test_dataloader(), self.loader(canvases, Once(canvases, **self.processes()))]


class QuestionedCanvas(DescribedCanvas):
    """Digits on a canvas with questions about them, such as ``what is above the seven``.

    As :class:`DescribedCanvas`, but no two digits of a canvas are of one class, so that each question is about one
    digit: what is next to it, ``above`` or ``below`` it in its column of the grid, ``left of`` or ``right of`` it in
    its row, whatever cells lie empty between. The answer is a digit, or ``nothing``. Batches are
    :class:`QuestionBatch`, for prediction those of the test.

    Args:
        questions: How many questions there are about a canvas.
        nothing: Share of the questions whose answer is ``nothing``, as long as there are such questions, and others.

    Raises:
        ValueError: As :class:`DescribedCanvas`, or if an option is out of its range.

    Example:
        >>> data = QuestionedCanvas(batch_size=16)
        >>> data.setup()
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.words.shape[:2], batch.answers.shape, data.labels[7:]
        (torch.Size([16, 4]), torch.Size([16, 4]), ['seven', 'eight', 'nine', 'nothing'])
        >>> data.vocabulary.decode(next(iter(data.val_dataloader())).words[0, 0].tolist())
        'what is left of the eight'
    """

    kind = QuestionedCanvases

    def __init__(
        self,
        root: str = "digits",
        *,
        directory: str = "data",
        download: bool = False,
        size: int | tuple[int, int] = 96,
        cells: tuple[int, int] = (3, 3),
        digits: tuple[int, int] = (2, 5),
        more: tuple[int, int] | None = None,
        questions: int = 4,
        nothing: float = 0.2,
        canvases: int | None = None,
        evaluated: int | None = None,
        in_chans: Literal[1, 3] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            root,
            directory=directory,
            download=download,
            size=size,
            cells=cells,
            digits=digits,
            more=more,
            canvases=canvases,
            evaluated=evaluated,
            in_chans=in_chans,
            mean=mean,
            std=std,
            val_fraction=val_fraction,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
        )
        if questions < 1:
            raise ValueError(f"questions must be at least 1, got {questions}")
        if not 0 <= nothing <= 1:
            raise ValueError(f"nothing must lie between 0 and 1, got {nothing}")
        self.questions = questions
        self.nothing = nothing

    @property
    def options(self) -> dict[str, Any]:
        return {"questions": self.questions, "nothing": self.nothing}

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.labels = [*DIGITS, NOTHING]

    def predict_dataloader(self) -> DataLoader:
        return self.loader(self.canvases("test"), None)  # Lightning divides it itself
