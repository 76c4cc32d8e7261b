import pytest
import torch

from visattn.explain import blended, deletion, emptied, enlarged, insertion

PARTS = torch.tensor([[1.0, 8.0], [2.0, 5.0]])


def total(there: torch.Tensor) -> torch.Tensor:
    """A linear model, whose parts are known."""
    return (there * PARTS).sum((1, 2))


def test_a_linear_model_falls_by_its_greatest_part_first():
    curve = deletion(total, PARTS, steps=4)
    assert curve.scores.tolist() == [16, 8, 3, 1, 0]
    assert curve.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.area == (16 / 2 + 8 + 3 + 1 + 0 / 2) / 4
    rises = insertion(total, PARTS, steps=4)
    assert rises.scores.tolist() == [0, 8, 13, 15, 16]
    assert curve.area + rises.area == 16  # of a linear model what is left and what was taken make the whole
    assert deletion(total, -PARTS, steps=4).scores.tolist() == [16, 15, 13, 8, 0]


def test_no_order_falls_faster_than_that_of_the_parts_nor_slower_than_the_opposite():
    areas = [deletion(total, torch.rand(2, 2), steps=4).area for _ in range(30)]
    assert deletion(total, PARTS, steps=4).area <= min(areas) < max(areas) <= deletion(total, -PARTS, steps=4).area


def test_steps_take_whole_things_and_are_no_more_than_there_are():
    parts = torch.arange(7.0)
    curve = deletion(lambda left: left.sum(1).float(), parts, steps=3)
    assert curve.scores.tolist() == [7, 5, 2, 0]
    torch.testing.assert_close(curve.shares, torch.tensor([0, 2, 5, 7]) / 7)
    assert len(deletion(lambda left: left.sum(1).float(), parts, steps=100).scores) == 8


def test_among_equal_weights_chance_decides_and_the_generator_is_chance():
    def order(seed: int) -> list[int]:
        taken = []
        deletion(lambda left: taken.append(left) or left.sum(1).float(), torch.ones(9), steps=9, generator=chance(seed))
        return taken[0].sum(0).tolist()

    def chance(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(1, 10))


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (PARTS, {"steps": 0}, "steps must be at least 1, got 0"),
        (PARTS * torch.nan, {}, "weights must be finite, got NaN or infinity"),
    ],
)
def test_bad_input_is_refused(weights, options, message):
    for curve in (deletion, insertion):
        with pytest.raises(ValueError, match=message):
            curve(total, weights, **options)


def test_what_takes_the_place_of_an_image():
    image = torch.rand(3, 20, 30)
    assert not emptied(image, "zero").any()
    torch.testing.assert_close(emptied(image, "mean"), image.mean((1, 2), keepdim=True).expand(3, 20, 30))
    blurred = emptied(image, "blur")
    assert blurred.std() < image.std() / 4
    torch.testing.assert_close(blurred.mean(), image.mean(), rtol=0.05, atol=0)


def test_another_baseline_is_refused(unchecked):
    with pytest.raises(ValueError, match="baseline must be one of blur, mean, zero, got 'noise'"):
        emptied(torch.rand(3, 20, 30), "noise")


def test_cells_cover_the_image_where_the_grid_does_not_divide_it_too():
    image, empty = torch.ones(1, 7, 5), torch.zeros(1, 7, 5)
    cells = torch.eye(6).view(6, 2, 3)
    shown = blended(image, empty, cells)
    assert torch.equal(shown.sum(0), image)  # every pixel lies in one cell
    assert shown[0, 0, 0, 0] == shown[5, 0, 6, 4] == 1
    assert torch.equal(blended(image, empty, torch.full((1, 1, 1), 0.25)), torch.full((1, 1, 7, 5), 0.25))


def test_an_enlarged_map_has_its_peak_in_its_greatest_cell():
    weights = torch.rand(3, 4)
    large = enlarged(weights, (30, 40))
    row, column = divmod(int(large.argmax()), 40)
    assert row // 10 * 4 + column // 10 == int(weights.argmax())
