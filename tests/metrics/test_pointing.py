import itertools

import pytest
import torch

from visattn.metrics.pointing import points_into


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
