import numpy as np
import pytest
import torch

from visattn.attention.sampling.grids import identity
from visattn.drawing import draw_alignment

INPUTS = np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3), np.uint8)
OUTPUTS = np.random.default_rng(1).integers(0, 256, (6, 2, 5, 7, 3), np.uint8)
GRIDS = torch.stack([shift + 0.5 * identity((5, 7))[0] for shift in torch.linspace(-0.5, 0.5, 12)])
GRIDS = GRIDS.unflatten(0, (6, 2)).numpy()
CLASSES = {"cat": [0, 2, 5], "hippopotamus amphibius": [1]}


def shown(axes):
    return np.asarray(axes.images[0].get_array()) if axes.images else None


def test_a_column_has_the_means_of_a_class_and_its_examples():
    figure = draw_alignment(INPUTS, OUTPUTS, GRIDS, CLASSES, examples=2, title="step 7")
    columns = [figure.axes[:9], figure.axes[9:]]
    assert [column[0].get_title() for column in columns] == ["cat", "hippopotamu…"]
    for column, members in zip(columns, CLASSES.values(), strict=True):
        assert np.array_equal(shown(column[0]), np.mean([INPUTS[i] for i in members], 0).round())
        for head in (0, 1):
            assert np.array_equal(shown(column[1 + head]), np.mean([OUTPUTS[i, head] for i in members], 0).round())
        for panels, image in zip((column[3:6], column[6:9]), members, strict=False):
            assert np.array_equal(shown(panels[0]), INPUTS[image])
            assert np.array_equal(shown(panels[1]), OUTPUTS[image, 0])
            assert np.array_equal(shown(panels[2]), OUTPUTS[image, 1])
            for head in (0, 1):
                outline = panels[0].collections[2 * head + 1].get_segments()[0]
                middle = (GRIDS[image, head].mean((0, 1)) + 1) / 2 * (12, 8)
                np.testing.assert_allclose((outline.min(0) + outline.max(0)) / 2, middle, atol=1e-4)
    assert [shown(axes) for axes in columns[1][6:]] == [None] * 3
    names = ["mean input", "mean output\nof head 1", "mean output\nof head 2"]
    names += ["input", "output\nof head 1", "output\nof head 2"] * 2
    assert [text.get_text() for text in figure.texts] == ["step 7", *names]


@pytest.mark.parametrize("examples", [0, 1])
def test_panels_are_of_one_size_and_nothing_is_written_outside(examples):
    title = "step 400000   12.3% folded over   determinant -0.123"
    figure = draw_alignment(INPUTS, OUTPUTS[:, :1], GRIDS[:, :1], CLASSES, examples=examples, title=title)
    assert len(figure.axes) == 2 * (2 + 2 * examples)
    figure.canvas.draw()
    sizes = np.array([axes.get_position(original=True).size for axes in figure.axes])
    np.testing.assert_allclose(sizes, sizes[:1].repeat(len(sizes), 0))
    boxes = [each.get_window_extent() for each in (*figure.axes, *figure.texts)]
    whole = figure.bbox
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
