import itertools

import pytest
import torch

from visattn.metrics.pointing import pointing, points_into

SIZE = (40, 80)  # cells of 10 × 10 in a map of 4 × 8


def test_a_map_points_at_the_middle_of_its_greatest_region():
    for row, column in itertools.product(range(3), range(4)):
        weights = torch.zeros(3, 4)
        weights[row, column] = 1
        x, y = 10 * column + 5, 20 * row + 10  # on an image of 60 × 40
        boxes = torch.tensor([[x, y, x + 1, y + 1], [x - 1, y - 1, x + 1, y + 1], [x + 1, y, x + 2, y + 1]])
        boxes = torch.cat((boxes, torch.tensor([[x - 1, y, x, y + 1], [x, y - 1, x + 1, y], [0, 0, 0, 0]])))
        found = points_into(weights.flatten().expand(6, -1), boxes, (3, 4), (60, 40))
        assert found.tolist() == [True, True, False, False, False, False]


def test_what_stands_behind_the_map_does_not_count():
    weights, box = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.5]), torch.tensor([4, 0, 8, 4])
    assert points_into(weights, box, (2, 2), (8, 8))
    with pytest.raises(ValueError, match="weights must be of at least 6 positions, got 5"):
        points_into(weights, box, (2, 3), (8, 8))


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


def test_of_several_greatest_regions_the_first_counts_or_the_share_that_hits():
    weights, first, last = torch.ones(2, 2), torch.tensor([[0, 0, 4, 4]]), torch.tensor([[4, 4, 8, 8]])
    found = [points_into(weights.flatten(), each[0], (2, 2), (8, 8)).item() for each in (first, last)]
    assert found == [True, False]
    assert [pointing(weights, each.float(), (8, 8)) for each in (first, last)] == [0.25, 0.25]


def test_the_right_and_lower_border_of_a_box_belong_to_it_or_do_not():
    weights, border = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 0, 2, 4]])  # its middle is at (2, 2)
    assert not points_into(weights.flatten(), border[0], (1, 2), (4, 8))
    assert pointing(weights, border.float(), (4, 8)) == 1


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
