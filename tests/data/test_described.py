import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visattn.data.canvas import mapped, pixel_centres
from visattn.data.captions import CaptionBatch, ReferenceBatch
from visattn.data.described import DescribedCanvas, QuestionBatch, QuestionedCanvas
from visattn.data.sources import DataError
from visattn.data.transforms import Preprocess

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def made(kind=DescribedCanvas, **options) -> DescribedCanvas:
    data = kind(**{"batch_size": 50} | options)
    data.setup()
    return data


def read(sentence: str) -> list[list[int]]:
    """Return the digits of each row, top to bottom, of which a sentence tells."""
    rows = []
    for row in sentence.split(" above "):
        rows.append([])
        for each in row.split(" left of "):
            article, name = each.split()
            assert article == ("an" if name[0] in "aeiou" and name != "one" else "a")
            rows[-1].append(NAMES.index(name))
    return rows


def test_a_sentence_is_true_of_its_canvas_and_no_other_is():
    data = made()
    for called, counts in (("val", {1, 2, 3}), ("more", {4, 5, 6})):
        canvases = data.splits[called]
        scene, batch = canvases.batch(range(150)), canvases.__getitems__(range(150))
        seen = set()
        for k in range(150):
            there = scene.digit_labels[k] >= 0
            boxes, labels = scene.boxes[k][there].tolist(), scene.digit_labels[k][there].tolist()
            order = sorted(range(len(labels)), key=lambda j: boxes[j][1])  # by their upper edges
            rows: list[list[int]] = []
            for j in order:
                above = boxes[rows[-1][0]] if rows else None
                if above and boxes[j][1] < above[3]:  # it begins before another ends
                    rows[-1].append(j)
                else:
                    rows.append([j])
            truth = [[labels[j] for j in sorted(row, key=lambda j: boxes[j][0])] for row in rows]
            (sentence,) = batch.references[k]
            assert read(sentence) == truth
            seen.add(len(labels))
        assert seen == counts


def test_rows_and_digits_of_a_row_lie_apart():
    data = made()
    scene = data.splits["more"].batch(range(170))
    for boxes, labels in zip(scene.boxes.tolist(), scene.digit_labels.tolist(), strict=True):
        found = [box for box, label in zip(boxes, labels, strict=True) if label >= 0]
        cells = {(y0 // 32, x0 // 32) for x0, y0, _, _ in found}
        assert len(cells) == len(found)  # at most one digit in each of 3 × 3 cells
        for x0, y0, x1, y1 in found:
            assert (x0 // 32, y0 // 32) == ((x1 - 1) // 32, (y1 - 1) // 32)
            assert x1 - x0 >= 5


def test_each_word_has_the_box_of_the_digit_that_it_names():
    data = made(batch_size=100)
    (batch,) = [next(iter(data.train_dataloader()))]
    assert isinstance(batch, CaptionBatch)
    named = 0
    for image, words, length, boxes in zip(batch.images, batch.words, batch.lengths, batch.boxes, strict=True):
        left = image[0].clone()
        for t, (word, (x0, y0, x1, y1)) in enumerate(zip(words[0].tolist(), boxes[0].tolist(), strict=True)):
            if t >= length[0] - 1 or data.vocabulary.word(word) not in NAMES:
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
                continue
            part = image[0, y0:y1, x0:x1] > 0.1
            assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()  # noqa: PT018
            left[y0:y1, x0:x1] = 0
            named += 1
        assert left.max() <= 0.1  # nothing bright is left that no word names
    assert named > 150


def test_a_box_shows_what_its_word_says():
    """Whoever has learned the digits one by one reads in the boxes what the words say."""
    from sklearn.neighbors import KNeighborsClassifier

    data = made(more=None)
    shown = {}
    for called in ("train", "val"):
        canvases = data.splits[called]
        scene = canvases.batch(range(len(canvases)))
        batch = canvases.__getitems__(range(len(canvases)))
        pixels, names = [], []
        for image, words, boxes in zip(scene.images, batch.words[:, 0].tolist(), batch.boxes[:, 0], strict=True):
            for word, box in zip(words, boxes, strict=True):
                if box.any():
                    x0, y0, x1, y1 = box.tolist()
                    pixels.append(F.interpolate(image[None, :, y0:y1, x0:x1], (12, 12)).flatten())
                    names.append(data.vocabulary.word(word))
        shown[called] = torch.stack(pixels).numpy(), names
    right = KNeighborsClassifier(3).fit(*shown["train"]).score(*shown["val"])
    assert right > 0.9


def test_batches_fit_and_end_where_they_say():
    data = made(batch_size=30)
    batch = next(iter(data.train_dataloader()))
    t = batch.words.shape[2]
    assert batch.images.shape == (30, 1, 96, 96)
    assert batch.words.shape == (30, 1, t)
    assert batch.boxes.shape == (30, 1, t, 4)
    assert batch.lengths.shape == (30, 1)
    assert batch.lengths.max() == t
    for words, length in zip(batch.words[:, 0], batch.lengths[:, 0].tolist(), strict=True):
        assert (words[: length - 1] != data.vocabulary.end).all()
        assert (words[: length - 1] != data.vocabulary.unknown).all()
        assert (words[length - 1 :] == data.vocabulary.end).all()
    held = next(iter(data.val_dataloader()))
    assert isinstance(held, ReferenceBatch)
    assert [[data.vocabulary.decode(each[0].tolist())] for each in held.words] == held.references
    assert len(set(held.names)) == 30
    images, names = next(iter(data.predict_dataloader()))
    assert images.shape == (30, 1, 96, 96)
    assert len(names) == 30


def test_training_is_made_afresh_and_evaluation_never():
    one, two, other = made(), made(), made(seed=1)
    loader = one.train_dataloader()
    epochs = []
    for number in (0, 1, 0):
        loader.sampler.set_epoch(number)
        epochs.append(next(iter(loader)))
    assert torch.equal(epochs[0].images, epochs[2].images)
    assert torch.equal(epochs[0].words, epochs[2].words)
    first, again = (one.splits["train"].batch(range(50), epoch) for epoch in (0, 1))
    assert (first.images != again.images).flatten(1).any(1).float().mean() > 0.9
    held = [next(iter(each.val_dataloader())) for each in (one, one, two, other)]
    assert held[0].references == held[1].references == held[2].references != held[3].references
    assert torch.equal(held[0].images, held[2].images)
    assert one.splits["val"].batch([3], 0).labels.equal(one.splits["val"].batch([3], 5).labels)


def test_a_canvas_does_not_depend_on_others_in_its_batch():
    canvases = made().splits["train"]
    together = canvases.__getitems__([(2, 5), (2, 9)])
    alone = canvases.__getitems__([(2, 9)])
    length = int(alone.lengths[0, 0])
    assert torch.equal(together.images[1], alone.images[0])
    assert torch.equal(together.words[1, 0, :length], alone.words[0, 0, :length])


def test_test_digits_come_from_the_test_split_alone():
    data = made(evaluated=300)
    positions = {name: {*split.split.positions.tolist()} for name, split in data.splits.items()}
    assert positions["more"] == positions["test"]
    assert not positions["train"] & positions["test"]
    assert not positions["train"] & positions["val"]
    assert not positions["val"] & positions["test"]
    assert sum(len(positions[name]) for name in ("train", "val", "test")) == 1797
    assert [len(data.splits[name]) for name in ("val", "test", "more")] == [300] * 3
    scene = data.splits["test"].batch(range(300))
    assert len({image.numpy().tobytes() for image in scene.images}) == 300  # the same digits, elsewhere


def test_an_epoch_has_as_many_canvases_as_asked_for():
    data = made(canvases=70, batch_size=10)
    assert sum(len(batch.images) for batch in data.train_dataloader()) == 70
    assert len(made(more=None).test_dataloader().dataset) == len(made().test_dataloader()[1].dataset)


def test_the_transform_says_where_digits_come_from():
    canvases = made().splits["val"]
    scene = canvases.batch(range(20))
    grid = mapped(pixel_centres(96, 96), scene.transform).reshape(-1, 96, 96, 2)
    chosen = canvases.digits[None].float() / 255
    for image, (x0, y0, x1, y1), where, label in zip(
        scene.images[:, 0],
        scene.boxes[:, 0].tolist(),
        grid.unflatten(0, (20, -1))[:, 0],
        scene.digit_labels,
        strict=True,
    ):
        shown = F.grid_sample(chosen, where[None], align_corners=False)[0, :, y0:y1, x0:x1]
        near = (shown - image[y0:y1, x0:x1]).abs().amax((1, 2))
        assert near.min() < 1e-3
        assert canvases.targets[near.argmin()] == label[0]


def test_digits_of_mnists_files_and_of_other_cells_fit(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", rng.integers(60, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    data = made(root=str(tmp_path), size=(60, 128), cells=(2, 4), digits=(8, 8), more=None)
    batch = data.splits["test"].batch(range(20))
    assert batch.images.shape == (20, 1, 60, 128)
    assert (batch.digit_labels >= 0).all()
    assert [len(row) for row in read(data.splits["test"].__getitems__([0]).references[0][0])] == [4, 4]


def test_a_pretrained_models_input_is_given():
    data = DescribedCanvas(batch_size=4)
    data.preprocess = Preprocess((3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    data.setup()
    images = next(iter(data.train_dataloader())).images
    assert images.shape == (4, 3, 96, 96)
    assert images.amin() == -1


# --- questions --------------------------------------------------------------------------------------------------------


def test_answers_are_what_lies_next_to_what_is_asked_for():
    data = made(QuestionedCanvas, digits=(2, 7))
    canvases = data.splits["test"]
    scene, batch = canvases.batch(range(150)), canvases.__getitems__(range(150))
    assert isinstance(batch, QuestionBatch)
    sides = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}
    said = set()
    for k in range(150):
        there = {
            ((x0 + x1) // 64, (y0 + y1) // 64): (label, [x0, y0, x1, y1])
            for label, (x0, y0, x1, y1) in zip(scene.digit_labels[k].tolist(), scene.boxes[k].tolist(), strict=True)
            if label >= 0
        }
        assert len({label for label, _ in there.values()}) == len(there)
        for r in range(4):
            length = int(batch.lengths[k, r])
            words = data.vocabulary.decode(batch.words[k, r].tolist()).split()
            assert len(words) == length
            assert (words[:2], words[-2], "of" in words) == (["what", "is"], "the", words[2] in ("left", "right"))
            (column, row) = next(place for place, (label, _) in there.items() if label == NAMES.index(words[-1]))
            right, down = sides[words[2]]
            answer, box = "nothing", [0, 0, 0, 0]
            for distance in (1, 2):
                if found := there.get((column + distance * right, row + distance * down)):
                    answer, box = NAMES[found[0]], found[1]
                    break
            assert data.labels[batch.answers[k, r]] == answer
            assert batch.boxes[k, r].tolist() == box
            said.add((words[2], words[-1]))
    assert len(said) == 40  # each side of each digit


@pytest.mark.parametrize(("nothing", "least", "most"), [(0.0, 0, 0.02), (0.2, 0.15, 0.25), (1.0, 0.99, 1)])
def test_so_many_answers_are_nothing(nothing, least, most):
    data = made(QuestionedCanvas, digits=(5, 5), canvases=500, nothing=nothing, questions=6, batch_size=500)
    batch = next(iter(data.train_dataloader()))
    assert batch.answers.shape == (500, 6)
    assert least <= (batch.answers == 10).float().mean() <= most
    assert torch.equal(batch.answers == 10, ~batch.boxes.any(-1))


def test_questions_are_new_in_each_epoch_of_training_alone():
    data = made(QuestionedCanvas)
    train, held = data.splits["train"], data.splits["val"]
    one, two, again = (train.__getitems__([(epoch, k) for k in range(30)]) for epoch in (0, 1, 0))
    assert torch.equal(one.words, again.words)
    assert not torch.equal(one.answers, two.answers)
    assert torch.equal(held.__getitems__(range(9)).words, held.__getitems__([(4, k) for k in range(9)]).words)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DescribedCanvas, {"digits": (2, 1)}, r"digits must be two numbers from 1 on, the lesser first, got \(2, 1\)"),
        (DescribedCanvas, {"digits": (0, 1)}, r"digits must be two numbers from 1 on, the lesser first, got \(0, 1\)"),
        (DescribedCanvas, {"more": (5, 4)}, r"more must be two numbers from 1 on, the lesser first, got \(5, 4\)"),
        (DescribedCanvas, {"canvases": 0}, "canvases must be at least 1, got 0"),
        (DescribedCanvas, {"evaluated": 0}, "evaluated must be at least 1, got 0"),
        (DescribedCanvas, {"cells": (0, 3)}, "cells must be at least 1, got 0"),
        (DescribedCanvas, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (QuestionedCanvas, {"questions": 0}, "questions must be at least 1, got 0"),
        (QuestionedCanvas, {"nothing": 1.5}, "nothing must lie between 0 and 1, got 1.5"),
    ],
)
def test_refuses_options_out_of_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DescribedCanvas, {"size": 80}, r"size must be at least \(84, 84\) for 3 × 3 digits, got 80"),
        (DescribedCanvas, {"more": (4, 10)}, "more must be at most 9, one for each cell, got 10"),
        (
            QuestionedCanvas,
            {"size": 128, "cells": (4, 4), "digits": (2, 11)},
            "train must have images of 10 classes, at least as",
        ),
    ],
)
def test_refuses_what_does_not_fit(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options).setup()


def test_refuses_what_are_no_digits():
    data = made()
    data.labels = [*"abcdefghij", "end"]
    with pytest.raises(DataError, match="root must hold the digits from 0 to 9 to be described, got a, b, c"):
        data.made("train", data.splits["val"].split, replace(data.layout), classes=10)
