import numpy as np
import pytest
import torch
from PIL import Image

from visattn.data.transforms import Preprocess
from visattn.explain import pointing, seen

SIZE = (40, 80)  # cells of 10 × 10 in a map of 4 × 8


def at(row: int, column: int) -> torch.Tensor:
    weights = torch.zeros(4, 8)
    weights[row, column] = 1
    return weights


def box(*sides: float) -> torch.Tensor:
    return torch.tensor([sides], dtype=torch.float32)


def test_the_middle_of_the_greatest_cell_is_in_the_box_or_not():
    assert pointing(at(1, 6), box(60, 10, 70, 20), SIZE) == 1  # x is the column
    assert pointing(at(1, 6), box(10, 60, 20, 70), SIZE) == 0
    assert pointing(at(1, 6), box(66, 10, 80, 20), SIZE) == 0
    assert pointing(at(1, 6), torch.cat((box(0, 0, 5, 5), box(60, 10, 70, 20))), SIZE) == 1


def test_a_box_may_be_missed_by_a_tolerance_in_any_direction():
    assert pointing(at(0, 0), box(8, 9, 20, 20), SIZE, tolerance=4.99) == 0  # (5, 5) to (8, 9): 3, 4, 5
    assert pointing(at(0, 0), box(8, 9, 20, 20), SIZE, tolerance=5.0) == 1


def test_where_all_weights_are_alike_the_hits_are_those_of_chance():
    assert pointing(torch.ones(4, 8), box(0, 0, 40, 40), SIZE) == 0.5
    assert pointing(at(0, 0) + at(3, 7), box(0, 0, 10, 10), SIZE) == 0.5


@pytest.mark.parametrize(
    ("boxes", "options", "message"),
    [
        (torch.zeros(0, 4), {}, r"boxes must be some, each with an area, got \[\]"),
        (box(3, 0, 3, 9), {}, r"boxes must be some, each with an area, got \[\[3.0, 0.0, 3.0, 9.0\]\]"),
        (box(0, 0, 9, 9), {"tolerance": -1.0}, "tolerance must not be negative, got -1.0"),
    ],
)
def test_bad_input_is_refused(boxes, options, message):
    with pytest.raises(ValueError, match=message):
        pointing(torch.ones(4, 8), boxes, SIZE, **options)


@pytest.mark.parametrize("crop", [1.0, 0.8])
@pytest.mark.parametrize("photo", [(120, 90), (60, 200), (33, 77)])
def test_a_box_is_seen_where_the_transform_puts_what_is_in_it(photo, crop):
    transform = Preprocess((1, 64, 96), mean=(0.0,), std=(1.0,), interpolation="nearest", crop_pct=crop)
    height, width = photo
    x0, y0, x1, y1 = width // 3, height // 3, width // 3 + 20, height // 3 + 15
    pixels = np.zeros(photo, np.uint8)
    pixels[y0:y1, x0:x1] = 255
    rows, columns = transform(Image.fromarray(pixels))[0].nonzero().unbind(1)
    lit = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()
    torch.testing.assert_close(seen(box(x0, y0, x1, y1), photo, transform)[0], lit, rtol=0, atol=1.5)


def test_a_box_that_is_cropped_away_is_left_out():
    transform = Preprocess((3, 50, 50), mean=(0.5,) * 3, std=(0.2,) * 3)
    found = seen(torch.cat((box(0, 0, 20, 100), box(40, 10, 90, 30))), (100, 200), transform)
    assert found.tolist() == [[0, 5, 20, 15]]
