import gzip
import itertools
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from scipy.interpolate import RBFInterpolator
from scipy.stats import chisquare, kstest

from visattn.data.canvas import (
    CORNERS,
    PRESETS,
    Canvas,
    CanvasBatch,
    Canvases,
    Chance,
    Layout,
    Preset,
    convex,
    homography,
    lattice,
    mapped,
    mixed,
    pixel_centres,
    thin_plate,
)
from visattn.data.sources import DataError, Pixels, Split, open_source
from visattn.data.transforms import Preprocess


@pytest.fixture(scope="module")
def digits() -> Split:
    return open_source("digits").splits["train"]


def canvases(split: Split, preset: str = "plain", called: str = "train", **options) -> Canvases:
    return Canvases(called, split, PRESETS[preset], **{"classes": 10, "train": True, **options})


def laid(split: Split, *, classes: int = 10, seed: int = 0, **options) -> Canvases:
    return Canvases("train", split, Layout(**options), classes=classes, seed=seed, train=True)


def pictures(pixels: np.ndarray) -> Split:
    """Ten pictures at most, each of a class of its own."""
    return Pixels(pixels.astype(np.uint8), "pictures").split(np.arange(len(pixels)))


def noise() -> Split:
    return pictures(np.random.default_rng(0).integers(26, 256, (10, 28, 28)))


def mnist(root: Path, train: np.ndarray, test: np.ndarray) -> str:
    """Files of the MNIST family."""
    for name, pixels in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(len(pixels)) % 10)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (root / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return str(root)


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    """The value at a point of an image with black around it, coordinates in [-1, 1]."""
    column, row = (x + 1) / 2 * image.shape[1] - 0.5, (y + 1) / 2 * image.shape[0] - 0.5
    value = 0.0
    for i, j in itertools.product(
        range(math.floor(row), math.floor(row) + 2), range(math.floor(column), math.floor(column) + 2)
    ):
        if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
            value += image[i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return value


# --------------------------------------------------------------------------------------------------------- presets


def test_presets_have_the_papers_ranges():
    told = {
        name: (p.size, p.digits, p.place, p.rotate, p.scale, p.warp, p.jitter, p.patches and (p.patches, p.patch_size))
        for name, p in PRESETS.items()
    }
    one = (1, 1)
    assert told == {
        "plain": (28, 1, "centre", 0, one, "affine", 0, 0),
        "rotated": (28, 1, "centre", 90, one, "affine", 0, 0),
        "rotated_scaled_translated": (42, 1, "anywhere", 45, (0.7, 1.2), "affine", 0, 0),
        "projective": (28, 1, "centre", 0, (0.75, 1), "projective", 5, 0),
        "elastic": (28, 1, "centre", 0, (0.75, 1), "elastic", 1.5, 0),
        "translated": (60, 1, "anywhere", 0, one, "affine", 0, 0),
        "cluttered_transformer": (60, 1, "anywhere", 0, one, "affine", 0, (6, 6)),
        "cluttered_recurrent": (60, 1, "anywhere", 0, one, "affine", 0, (4, 8)),
        "cluttered_large": (100, 1, "anywhere", 0, one, "affine", 0, (8, 8)),
        "pairs": (100, 2, "anywhere", 0, one, "affine", 0, 0),
        "sums": (100, 2, "anywhere", 0, one, "affine", 0, 0),
        "sequences": (100, 3, "anywhere", 0, one, "affine", 0, 0),
        "colocalised": (84, 1, "anywhere", 0, one, "affine", 0, (16, 6)),
        "addition": (42, 2, "anywhere", 45, (0.7, 1.2), "affine", 0, 0),
    }
    assert {*PRESETS} == {*get_args(Preset)}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_holds_all_that_is_known(preset, digits):
    layout, made = PRESETS[preset], canvases(digits, preset)
    for count in (5, 1, 0):
        batch = made.batch(range(count))
        k, kind = layout.digits, {"affine": (2, 3), "projective": (3, 3), "elastic": (16, 2)}[layout.warp]
        assert batch.images.shape == (count, 2 if preset == "addition" else 1, layout.height, layout.width)
        assert batch.transform.shape == (count, k, *kind)
        assert batch.boxes.shape == (count, k, 4)
        assert batch.digit_labels.shape == (count, k)
        assert batch.labels.shape == ((count, 4) if preset == "sequences" else (count,))
        assert {part.dtype for part in batch} == {torch.float32, torch.int64}
        assert batch.images.dtype == batch.transform.dtype == torch.float32
    batch = made.batch(range(200))
    assert batch.images.amin() == 0
    assert 0.9 < batch.images.amax() <= 1
    x0, y0, x1, y1 = batch.boxes[batch.digit_labels >= 0].T
    for first, behind, end in ((x0, x1, layout.width), (y0, y1, layout.height)):
        assert first.min() >= 0
        assert behind.max() <= end
        assert (first < behind).all()


def test_every_canvas_shows_its_digit(digits):
    batch = canvases(digits, "cluttered_recurrent").batch(range(50))
    assert torch.equal(batch.digit_labels[:, 0], torch.from_numpy(digits.targets[:50]))
    assert torch.equal(batch.labels, batch.digit_labels[:, 0])


# ---------------------------------------------------------------------------------------------------------- chance


def test_chance_is_splitmix_and_uniform():
    assert mixed(np.zeros(1, np.uint64)) == 0xE220A8397B1DCDAF  # its first number from seed 0
    numbers = Chance(3, 1, np.arange(500)).uniform(400)
    assert kstest(numbers.flatten(), "uniform").pvalue > 0.01
    assert numbers.min() > 0
    assert numbers.max() < 1
    table = numbers - 0.5
    for a, b in (
        (table[1:], table[:-1]),
        (table[:, 1:], table[:, :-1]),
        (table, Chance(4, 1, np.arange(500)).uniform(400) - 0.5),
    ):
        assert abs((a * b).mean() * 12) < 0.01
    assert kstest(Chance(5, np.arange(1000)).normal(20).flatten(), "norm").pvalue > 0.01


def test_chance_of_a_sample_follows_from_its_place_alone():
    many, one = Chance(7, np.arange(9)), Chance(7, np.array([4]))
    for shape in ((3,), (2, 2), (5, 1)):
        assert torch.equal(many.uniform(*shape)[4], one.uniform(*shape)[0])
    assert not torch.equal(Chance(7, 0, np.arange(9)).uniform(3), Chance(0, 7, np.arange(9)).uniform(3))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_canvas_follows_from_seed_epoch_and_index_alone(preset, digits):
    made = canvases(digits, preset)
    together, shuffled, alone = made.batch(range(6), 2), made.batch([5, 3, 0], 2), made.batch([3], 2)
    for whole, some, one in zip(together, shuffled, alone, strict=True):
        assert torch.equal(whole[[5, 3, 0]], some)
        assert torch.equal(whole[[3]], one)
    assert all(torch.equal(a, b) for a, b in zip(canvases(digits, preset).batch(range(6), 2), together, strict=True))
    if preset != "plain":
        for other in (
            made.batch(range(6), 3),
            canvases(digits, preset, seed=1).batch(range(6), 2),
            canvases(digits, preset, "val").batch(range(6), 2),
        ):
            assert (other.images != together.images).flatten(1).any(1).all()


def test_evaluation_is_the_same_in_every_epoch(digits):
    made = canvases(digits, "cluttered_large", "val", train=False)
    assert torch.equal(made.batch(range(4), 0).images, made.batch(range(4), 7).images)


def test_clutter_moves_no_digit(digits):
    bare, more = (laid(digits, size=60, place="anywhere", patches=n).batch(range(20)) for n in (0, 9))
    assert torch.equal(bare.boxes, more.boxes)
    assert torch.equal(bare.transform, more.transform)
    assert (bare.images <= more.images).all()


# ------------------------------------------------------------------------------------------- places, clutter, overlap


def test_digits_are_put_pixel_by_pixel_added_and_clipped():
    split = noise()
    batch = laid(split, size=(50, 70), digits=3, place="anywhere").batch(range(10))
    overlaps = 0
    for sample in range(10):
        canvas = np.zeros((50, 70))
        for label, box, transform in zip(
            *(part[sample] for part in (batch.digit_labels, batch.boxes, batch.transform)), strict=True
        ):
            column, row, right, bottom = box.tolist()
            assert (right - column, bottom - row) == (28, 28)
            corners = torch.tensor([[column, row], [right, bottom]]) * 2 / torch.tensor([70, 50]) - 1
            torch.testing.assert_close(
                mapped(corners, transform), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-5, rtol=0
            )
            canvas[row:bottom, column:right] += split.place.pixels[label] / 255
        overlaps += (canvas > 1).any()
        np.testing.assert_allclose(batch.images[sample, 0], canvas.clip(0, 1), atol=1e-6)
    assert overlaps


def test_digits_lie_in_the_first_and_the_last_row_and_column_as_often_as_elsewhere():
    made = laid(pictures(np.full((2, 28, 28), 255)), size=(30, 31), place="anywhere")
    boxes = torch.cat([made.batch([0, 1], epoch).boxes[:, 0, :2] for epoch in range(600)])
    counts = np.zeros((3, 4))
    np.add.at(counts, (boxes[:, 1].numpy(), boxes[:, 0].numpy()), 1)
    assert chisquare(counts.flatten()).pvalue > 0.01


def test_patches_are_whole_crops_of_others_from_everywhere_to_everywhere():
    rows, columns = np.mgrid[:28, :28]
    made = laid(pictures(np.stack((0 * rows, 8 * rows + 1, 8 * columns + 1))), size=30, patches=1, patch_size=26)
    goals, sources = np.zeros((5, 5)), np.zeros((2, 3))
    for epoch in range(600):
        image = (made.batch([0], epoch).images[0, 0] * 255).round().int().numpy()
        (top, left), (bottom, right) = np.argwhere(image).min(0), np.argwhere(image).max(0) + 1
        assert (bottom - top, right - left) == (26, 26)
        patch = image[top:bottom, left:right]
        down = int(patch[1, 0] != patch[0, 0])
        np.testing.assert_array_equal(patch, patch[0, 0] + 8 * np.mgrid[:26, :26][1 - down])
        goals[top, left] += 1
        sources[down, (patch[0, 0] - 1) // 8] += 1
    assert chisquare(goals.flatten()).pvalue > 0.01
    assert chisquare(sources.flatten()).pvalue > 0.01


def test_patches_never_come_from_the_digit_itself():
    black = pictures(np.stack((np.full((28, 28), 200), np.zeros((28, 28)))))
    images = torch.cat([laid(black, size=60, patches=3).batch([0], epoch).images for epoch in range(30)])
    assert (images.flatten(1).sum(1) * 255 / 200).round().unique().tolist() == [784]


def test_every_patch_and_channel_has_its_own(digits):
    white = pictures(np.stack((np.zeros((28, 28)), np.full((28, 28), 255))))
    images = laid(white, size=200, patches=5, patch_size=3).batch([0]).images
    assert images.sum() == 5 * 9
    images = laid(noise(), size=200, digits=2, separate=True, patches=7, patch_size=3).batch(range(10)).images
    assert ((images > 0).flatten(2).sum(2) > 28 * 28 + 3 * 9).all()
    assert (images[:, 0] != images[:, 1]).flatten(1).any(1).all()


# ------------------------------------------------------------------------------------------------------------ warps


@pytest.mark.parametrize("preset", ["rotated", "rotated_scaled_translated", "projective", "elastic", "addition"])
def test_a_canvas_is_its_digit_where_the_transform_says(preset, digits):
    made = canvases(digits, preset)
    batch = made.batch(range(3), 1)
    height, width = batch.images.shape[2:]
    chosen = [0, 1, 2] if preset != "addition" else None
    points = pixel_centres(height, width)
    for sample in range(3):
        for k, transform in enumerate(batch.transform[sample].double()):
            if chosen is None and k:
                continue  # which digit is the second is not told
            image = made.digits[sample].numpy() / 255
            if transform.shape == (16, 2):
                where = RBFInterpolator(lattice().numpy(), transform.numpy(), kernel="thin_plate_spline")(
                    points.numpy()
                )
            else:
                ends = np.array([transform.numpy() @ (x, y, 1) for x, y in points.tolist()])
                where = ends if ends.shape[1] == 2 else np.where(ends[:, 2:] > 1e-4, ends[:, :2] / ends[:, 2:], 9)
            seen = np.array([bilinear(image, x, y) for x, y in where]).reshape(height, width)
            np.testing.assert_allclose(batch.images[sample, k], seen, atol=2e-4)
            rows, columns = np.nonzero(batch.images[sample, k].numpy() > 25.5 / 255)
            assert batch.boxes[sample, k].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_angles_scales_and_places_are_uniform_in_the_papers_ranges(digits):
    made = canvases(digits, "rotated_scaled_translated")
    forth = torch.cat([made.batch(range(1000), epoch).transform for epoch in range(2)])[:, 0].double()
    turn, shift = forth[:, :, :2] * 28 / 42, forth[:, :, 2]
    scale = turn.det() ** -0.5
    torch.testing.assert_close(
        turn @ turn.mT * scale[:, None, None] ** 2, torch.eye(2).double().expand_as(turn), atol=1e-5, rtol=0
    )
    angle = torch.atan2(turn[:, 1, 0], turn[:, 0, 0])
    assert kstest(scale, "uniform", (0.7, 0.5)).pvalue > 0.01
    assert kstest(angle, "uniform", (-math.pi / 4, math.pi / 2)).pvalue > 0.01
    middle = (-torch.linalg.solve(turn * 42 / 28, shift) + 1) * 21  # of the digit, in pixels
    for axis in (0, 1):
        assert kstest((middle[:, axis] - 14 * scale) / (42 - 28 * scale), "uniform").pvalue > 0.01
    rotated = canvases(digits, "rotated").batch(range(1000)).transform[:, 0]
    assert kstest(torch.atan2(rotated[:, 1, 0], rotated[:, 0, 0]), "uniform", (-math.pi / 2, math.pi)).pvalue > 0.01
    assert rotated[:, :, 2].abs().max() < 1e-6


def test_a_wide_canvas_bends_no_angle(digits):
    transform = laid(digits, size=(40, 90), place="anywhere", rotate=180.0).batch(range(20)).transform[:, 0, :, :2]
    turn = transform * 28 / torch.tensor([90, 40])  # in pixels
    torch.testing.assert_close(turn @ turn.mT, torch.eye(2).expand_as(turn), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn.det(), torch.ones(20))


def test_points_of_a_thin_plate_are_moved_normally_and_so_are_corners(digits):
    made = laid(digits, warp="elastic", jitter=1.5)
    moved = (made.batch(range(1000)).transform[:, 0] - lattice()) * 14
    assert kstest(moved.flatten(), "norm", (0, 1.5)).pvalue > 0.01
    made = laid(digits, warp="projective", jitter=5.0)
    transform = made.batch(range(1000)).transform[:, 0].double().inverse()
    corners = F.pad(CORNERS, (0, 1), value=1) @ transform.mT
    moved = (corners[..., :2] / corners[..., 2:] - CORNERS) * 14
    assert convex(moved + 14 * CORNERS).all()
    assert moved.std() == pytest.approx(5, rel=0.03)  # but for what is not convex, 3 in 1,000
    assert moved.mean() == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("warp", ["projective", "elastic"])
def test_a_warp_that_moves_nothing_is_none(warp, digits):
    options = {"size": (40, 50), "place": "anywhere", "rotate": 60.0, "scale": (0.5, 1.2)}
    plain, warped = (laid(digits, warp=w, **options).batch(range(20)) for w in ("affine", warp))
    torch.testing.assert_close(plain.images, warped.images, atol=1e-4, rtol=0)
    assert torch.equal(plain.boxes, warped.boxes)


def test_turning_a_right_angle_turns_the_picture_clockwise():
    image = torch.rand(1, 1, 9, 9, dtype=torch.float64)
    where = mapped(pixel_centres(9, 9), torch.tensor([[0.0, 1, 0], [-1, 0, 0]], dtype=torch.float64))
    turned = F.grid_sample(image, where.reshape(1, 9, 9, 2), align_corners=False)
    torch.testing.assert_close(turned, image.rot90(-1, (2, 3)))
    assert not torch.allclose(turned, image.rot90(1, (2, 3)))


def test_what_is_known_puts_a_digit_upright_again(digits):
    made = laid(digits, size=60, place="anywhere", rotate=90.0, scale=(1.5, 2.0))
    batch = made.batch(range(20))
    there = F.pad(batch.transform[:, 0], (0, 0, 0, 1))
    there[:, 2, 2] = 1
    upright = F.grid_sample(
        batch.images, F.affine_grid(there.inverse()[:, :2], (20, 1, 28, 28), align_corners=False), align_corners=False
    )
    assert (upright[:, 0] - made.digits[:20] / 255).abs().mean() < 0.02
    assert (batch.images[:, 0, 16:44, 16:44] - made.digits[:20] / 255).abs().mean() > 0.1


def test_even_wild_corners_span_something(digits):
    batch = laid(digits, warp="projective", jitter=200.0).batch(range(500))
    assert batch.transform.isfinite().all()
    ends = F.pad(CORNERS, (0, 1), value=1) @ batch.transform[:, 0].double().inverse().mT
    assert convex(14 * ends[..., :2] / ends[..., 2:]).all()


def test_thin_plate_equals_scipy():
    chance = torch.Generator().manual_seed(0)
    for control in (lattice(), torch.randn(9, 2, generator=chance, dtype=torch.float64)):
        values = torch.randn(len(control), 2, generator=chance, dtype=torch.float64)
        points = 2 * torch.randn(500, 2, generator=chance, dtype=torch.float64)
        expected = RBFInterpolator(control.numpy(), values.numpy(), kernel="thin_plate_spline")(points.numpy())
        torch.testing.assert_close(thin_plate(control, points) @ values, torch.from_numpy(expected), atol=1e-10, rtol=0)
        torch.testing.assert_close(thin_plate(control, control), torch.eye(len(control)).double(), atol=1e-12, rtol=0)


def test_the_lattice_goes_row_by_row():
    assert lattice()[[0, 1, 4, 15]].tolist() == pytest.approx(np.array([[-1, -1], [-1 / 3, -1], [-1, -1 / 3], [1, 1]]))
    assert pixel_centres(2, 4)[[0, 1, 4]].tolist() == [[-0.75, -0.5], [-0.25, -0.5], [-0.75, 0.5]]


def test_a_homography_takes_corners_to_their_ends_and_hides_what_is_beyond_the_horizon():
    ends = CORNERS + 0.3 * torch.randn(20, 4, 2, dtype=torch.float64)
    matrix = homography(ends)
    torch.testing.assert_close(mapped(CORNERS, matrix), ends)
    torch.testing.assert_close(homography(CORNERS), torch.eye(3).double())
    tilted = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.float64)
    assert mapped(torch.tensor([[0.5, -0.5], [0.5, -1.0], [0.5, -1.5]]), tilted).tolist() == [
        [1, -1],
        [1e4, 1e4],
        [1e4, 1e4],
    ]


@pytest.mark.parametrize(
    ("corners", "well"),
    [
        ([(0, 0), (9, 0), (9, 9), (0, 9)], True),
        ([(0, 0), (9, 0), (3, 3), (0, 9)], False),  # dented
        ([(0, 0), (9, 0), (0, 9), (9, 9)], False),  # crossed
        ([(0, 0), (0, 9), (9, 9), (9, 0)], False),  # mirrored
        ([(0, 0), (9, 0), (9, 9), (4.5, 4.5)], False),  # three in line
    ],
)
def test_a_quadrilateral_is_convex_or_not(corners, well):
    assert convex(torch.tensor(corners)) == well


# ---------------------------------------------------------------------------------------------------------- targets


def test_pairs_are_numbered_in_any_order_and_named(digits):
    data = Canvas("pairs", seed=1)
    data.setup()
    assert data.num_classes == len(data.labels) == 55
    numbers = {pair: number for number, pair in enumerate((a, b) for a in range(10) for b in range(a, 10))}
    batch = data.splits["train"].batch(range(500))
    expected = [numbers[min(pair), max(pair)] for pair in batch.digit_labels.tolist()]
    assert batch.labels.tolist() == expected
    assert set(expected) == set(range(55))
    assert [data.labels[n] for n in (0, 1, 9, 10, 54)] == ["0, 0", "0, 1", "0, 9", "1, 1", "9, 9"]


def test_ordered_targets_are_read_from_left_to_right():
    data = Canvas("pairs", target="ordered", digits=3)
    data.setup()
    assert (data.num_classes, data.labels[407]) == (1000, "4, 0, 7")
    batch = data.splits["train"].batch(range(300))
    assert batch.labels.tolist() == [100 * a + 10 * b + c for a, b, c in batch.digit_labels.tolist()]
    left = batch.transform[..., 0, 2]
    assert (left.diff(dim=1) <= 0).all()  # the further to the right a digit lies, the more is taken away


@pytest.mark.parametrize("preset", ["sums", "addition"])
def test_sums_are_sums(preset):
    data = Canvas(preset)
    data.setup()
    batch = data.splits["train"].batch(range(500))
    assert torch.equal(batch.labels, batch.digit_labels.sum(1))
    assert (data.num_classes, data.labels[17]) == (19, "17")
    assert set(batch.labels.tolist()) == set(range(19))


def test_sequences_are_read_from_left_to_right_and_end():
    data = Canvas("sequences", batch_size=500)
    data.setup()
    assert (data.num_classes, data.targets, data.labels[0], data.labels[-1]) == (11, 4, "0", "end")
    batch = data.splits["train"].batch(range(900))
    for told, digits, boxes in zip(
        *(part.tolist() for part in (batch.labels, batch.digit_labels, batch.boxes)), strict=True
    ):
        there = [digit for digit in digits if digit >= 0]
        assert digits == there + [-1] * (3 - len(there))
        assert told == there + [10] * (4 - len(there))
        assert [any(box) for box in boxes] == [digit >= 0 for digit in digits]
    lengths = (batch.digit_labels >= 0).sum(1)
    assert chisquare(lengths.bincount()[1:]).pvalue > 0.01
    first, second = (batch.transform[lengths > 1][:, k, 0, 2] for k in (0, 1))
    assert (second <= first).all()  # the further to the right a digit lies, the more is taken away
    assert batch.labels[:, 0].tolist() == data.splits["train"].split.targets[:900].tolist()
    images, labels = next(iter(data.val_dataloader()))
    assert labels.shape == (len(images), 4)


def test_what_is_not_there_is_not_seen():
    made = laid(noise(), size=(50, 200), digits=3, fewest=1, place="anywhere", target="sequence")
    batch = made.batch(range(10))
    inked = (batch.boxes[..., 2] - batch.boxes[..., 0]) * (batch.boxes[..., 3] - batch.boxes[..., 1])
    assert torch.equal(inked > 0, batch.digit_labels >= 0)
    for image, boxes in zip(batch.images[:, 0], batch.boxes.tolist(), strict=True):
        elsewhere = image.clone()
        for left, top, right, bottom in boxes:
            elsewhere[top:bottom, left:right] = 0
        assert image.any()
        assert not elsewhere.any()
    turned = laid(noise(), size=90, digits=3, fewest=1, place="anywhere", rotate=20.0, target="sequence").batch(
        range(10)
    )
    assert torch.equal(turned.boxes.any(-1), turned.digit_labels >= 0)


def test_a_sequence_of_fixed_length_shows_what_its_number_does(digits):
    options = {"size": 100, "digits": 2, "place": "anywhere"}
    ordered, told = (laid(digits, target=target, **options).batch(range(50)) for target in ("ordered", "sequence"))
    assert torch.equal(ordered.images, told.images)
    assert torch.equal(told.labels, F.pad(told.digit_labels, (0, 1), value=10))
    assert torch.equal(ordered.labels, told.labels[:, 0] * 10 + told.labels[:, 1])


def test_digits_in_channels_of_their_own_keep_their_order(digits):
    batch = canvases(digits, "addition").batch(range(100))
    assert torch.equal(batch.digit_labels[:, 0], torch.from_numpy(digits.targets[:100]))
    assert 0.3 < (batch.boxes[:, 0, 0] < batch.boxes[:, 1, 0]).float().mean() < 0.7


# ------------------------------------------------------------------------------------------------------ data module


def test_splits_are_disjoint_and_so_is_their_clutter(tmp_path):
    root = mnist(tmp_path, np.full((200, 28, 28), 10), np.full((30, 28, 28), 255))
    data = Canvas("cluttered_large", root=root, patches=20, batch_size=30)
    seen = {}
    for name in ("train", "val", "test"):
        batches = list(getattr(data, f"{name}_dataloader")())
        seen[name] = {round(float(v) * 255) for images, _ in batches for v in images.unique()}
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 180, "val": 20, "test": 30}
    assert seen["test"] == {0, 255}
    assert seen["train"] | seen["val"] < set(range(0, 250, 10))
    parts = [set(data.splits[name].split.positions.tolist()) for name in ("train", "val")]
    assert len(parts[0] | parts[1]) == 200


def test_where_there_is_one_split_two_are_held_out():
    data = Canvas("plain", val_fraction=0.2)
    data.setup()
    positions = [split.split.positions.tolist() for split in data.splits.values()]
    assert sorted(itertools.chain(*positions)) == [*range(1797)]
    assert {name: len(split) for name, split in data.splits.items()} == {"test": 359, "val": 287, "train": 1151}


@pytest.mark.parametrize("preset", ["cluttered_recurrent", "elastic"])
def test_batches_do_not_depend_on_workers_but_on_the_epoch(preset):
    alone, helped = (Canvas(preset, batch_size=500, workers=w) for w in (0, 2))
    loaders = [data.train_dataloader() for data in (alone, helped)]
    seen = []
    for epoch in (0, 1):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        one, two = (list(loader) for loader in loaders)
        assert len(one) == len(two) == 2  # of 1,458 canvases, the rest is dropped
        for (x, y), (u, v) in zip(one, two, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
        seen.append(one[0])
    assert not torch.equal(seen[0][1], seen[1][1]), "the order is the same in both epochs"
    for loader in (alone.val_dataloader(), alone.test_dataloader()):
        images, labels = next(iter(loader))
        assert len(images) == len(loader.dataset)
        again = loader.dataset.batch(range(len(images)))
        assert torch.equal(images, again.images)
        assert torch.equal(labels, again.labels)


def test_batches_are_normalised_as_told_and_as_a_pretrained_model_expects():
    plain, told, expects = Canvas("translated"), Canvas("translated", mean=[0.2], std=[0.5]), Canvas("translated")
    expects.preprocess = Preprocess((3, 224, 224), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = []
    for data in (plain, told, expects):
        images.append(next(iter(data.val_dataloader()))[0])
    assert plain.preprocess == Preprocess((1, 60, 60), (0.0,), (1.0,))
    torch.testing.assert_close(images[1], (images[0] - 0.2) / 0.5)
    assert expects.preprocess == Preprocess((3, 60, 60), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (expects.in_chans, images[2].shape) == (3, (64, 3, 60, 60))
    torch.testing.assert_close(images[2][:, 2:], (images[0] - 0.3) / 0.6)
    grey = Canvas("translated", in_chans=1)
    grey.preprocess = expects.preprocess
    grey.setup()
    assert grey.preprocess.mean == pytest.approx((0.2,))
    apart = Canvas("addition")
    apart.setup()
    assert (apart.preprocess, apart.in_chans, apart.multi_label) == (None, 2, False)


def test_batches_may_hold_all_or_names():
    data = Canvas("pairs", described=True, mean=[0.5], std=[0.5], batch_size=7)
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, CanvasBatch)
    again = data.splits["val"].batch(range(7))
    torch.testing.assert_close(batch.images, again.images * 2 - 1)
    assert torch.equal(batch.boxes, again.boxes)
    images, names = next(iter(data.predict_dataloader()))
    assert images.shape == (7, 1, 100, 100)
    assert names[0] == f"digits, image {data.splits['test'].split.positions[0]}"
    assert isinstance(next(iter(data.test_dataloader())), CanvasBatch)
    image, label = Canvas("plain").canvases("val")[4]
    assert image.shape == (1, 28, 28)
    assert label.shape == ()


def test_small_digits_get_the_form_of_mnists(digits):
    made = canvases(digits)
    assert made.digits.shape[1:] == (28, 28)
    assert (made.digits[:, [0, -1]].float().mean(), made.digits[:, :, [0, -1]].float().mean()) < (1, 1)
    sides = (made.boxes[:, 2:] - made.boxes[:, :2]).float().amax(1)
    assert 17 < sides.mean() < 22
    shrunk = F.interpolate(made.digits[:9, None].float(), (12, 12), mode="area")[:, 0, 2:-2, 2:-2] / 255
    pixels = torch.from_numpy(digits.place.pixels[:9]) / 255
    assert torch.corrcoef(torch.stack((shrunk.flatten(), pixels.flatten())))[0, 1] > 0.95
    untouched = noise()
    assert np.array_equal(canvases(untouched).digits, untouched.place.pixels)


def test_mnist_and_fashion_mnist_lie_where_they_are(shared):
    for root in ("MNIST", "FashionMNIST"):
        data = Canvas("cluttered_large", root=root, directory=str(shared / "data"), batch_size=256)
        images, labels = next(iter(data.train_dataloader()))
        assert images.shape == (256, 1, 100, 100)
        assert len(data.splits["test"]) == 10_000
        assert len(data.splits["train"]) + len(data.splits["val"]) == 60_000
        assert len(labels.unique()) == data.num_classes == 10


def test_a_classifier_trains_on_it(tmp_path):
    from visattn.tasks import Classification

    for data in (Canvas("cluttered_recurrent", batch_size=8), Canvas("addition", batch_size=8)):
        task = Classification("resnet18", backbone_args={"channels": [8, 8, 8, 8]})
        pl.Trainer(
            fast_dev_run=True,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(task, data)
        assert task.num_classes == data.num_classes
        assert task.labels == data.labels


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "clutterd"}, "preset must be one of plain, .*, addition, got 'clutterd'"),
        ({"patches": -1}, "patches must not be negative, got -1"),
        ({"jitter": -1.0}, "jitter must not be negative, got -1.0"),
        ({"size": 0}, "size, digits and patch_size must be at least 1, got 0, 1 and 8"),
        ({"digits": 0}, "size, digits and patch_size must be at least 1, got 60, 0 and 8"),
        ({"patch_size": 0}, "size, digits and patch_size must be at least 1, got 60, 1 and 0"),
        ({"rotate": 200.0}, "rotate must lie between 0 and 180, got 200.0"),
        ({"scale": (1.2, 0.7)}, r"scale must be two positive factors, the lesser first, got \(1.2, 0.7\)"),
        ({"place": "left"}, "place must be one of centre, anywhere, got 'left'"),
        ({"warp": "bent"}, "warp must be one of affine, projective, elastic, got 'bent'"),
        ({"target": "product"}, "target must be one of ordered, pair, sum, sequence, got 'product'"),
        ({"target": "pair"}, "target='pair' needs two digits, got digits=1"),
        ({"preset": "sums", "fewest": 1}, "fewest must be left out without target='sequence', got 1"),
        ({"preset": "sequences", "fewest": 0}, "fewest must lie between 1 and digits=3, got 0"),
        ({"preset": "sequences", "fewest": 4}, "fewest must lie between 1 and digits=3, got 4"),
        (
            {"preset": "addition", "in_chans": 3},
            "in_chans, mean and std must be left out where each digit has a channel",
        ),
        ({"val_fraction": 0.5}, "val_fraction must lie between 0 and 0.5, got 0.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, said, unchecked):
    with pytest.raises(ValueError, match=said):
        Canvas(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 27}, "size must be at least 28 for digits of 28 pixels scaled by up to 1, got 27"),
        ({"size": (60, 27)}, "size must be at least 28 for digits of 28 pixels scaled by up to 1, got 27"),
        (
            {"size": 33, "scale": (0.5, 1.2)},
            "size must be at least 34 for digits of 28 pixels scaled by up to 1.2, got 33",
        ),
        (
            {"size": 60, "patches": 1, "patch_size": 29},
            "patch_size must be at most 28, as high and wide as digits, got 29",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, said, digits):
    with pytest.raises(ValueError, match=said):
        laid(digits, **options)


def test_too_few_digits_are_refused(digits):
    for options, count, needed in (({}, 0, 1), ({"digits": 2}, 1, 2), ({"patches": 1}, 1, 2)):
        with pytest.raises(DataError, match=f"train must have at least {needed} images for such canvases, got {count}"):
            laid(pictures(np.zeros((count, 28, 28))), **options)
    assert laid(pictures(np.zeros((1, 28, 28)))).batch([0]).boxes.tolist() == [[[0, 0, 0, 0]]]
    for index in (-1, 1797):
        with pytest.raises(IndexError, match=f"index must lie between 0 and 1796, got {index}"):
            canvases(digits).batch([0, index])


def test_only_grey_images_in_memory_and_sums_only_of_digits(tmp_path):
    colour = Pixels(np.zeros((4, 32, 32, 3), np.uint8), "colour").split(np.zeros(4))
    with pytest.raises(DataError, match="a canvas needs grey images in memory: digits, MNIST, FashionMNIST or KMNIST"):
        laid(colour)
    (tmp_path / "FashionMNIST").mkdir()
    root = mnist(tmp_path / "FashionMNIST", *np.zeros((2, 20, 28, 28)))
    with pytest.raises(DataError, match=r"target='sum' needs digits, got T-shirt/top, .*, Ankle boot"):
        Canvas("sums", root=root).setup()
    with pytest.raises(DataError, match=f"MNIST is not in directory='{tmp_path / 'none'}'"):
        Canvas(root="MNIST", directory=str(tmp_path / "none")).setup()
