import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from visattn import LocalSelfAttention
from visattn.drawing import draw_patterns
from visattn.drawing.patterns import LINES

SCRIPT = Path(__file__).parents[2] / "docs" / "modules" / "patterns.py"


def cells(axes) -> np.ma.MaskedArray:
    (image,) = axes.images
    return image.get_array()


def test_draws_the_pairs_that_are_read_and_no_others():
    weights = LocalSelfAttention(16, window=3).attend(torch.randn(1, 16, 4, 6))
    figure = draw_patterns({"local": weights}, (4, 6), query=(0, 5))
    matrix, reach = figure.axes
    mean = weights[0].mean(0).detach().numpy()
    assert np.array_equal(~np.ma.getmaskarray(cells(matrix)), mean > 0)
    np.testing.assert_allclose(cells(matrix).filled(0), mean / mean.max(1, keepdims=True), rtol=1e-5)
    assert np.array_equal(~np.ma.getmaskarray(cells(reach)), mean[5].reshape(4, 6) > 0)
    assert (matrix.get_title(), reach.get_xlabel()) == ("local", "reads 9 of 24")


@pytest.mark.parametrize(("query", "place"), [((2, 1), (2, 1)), (None, (2, 3))])
def test_frames_the_query_in_both(query, place):
    matrix, reach = draw_patterns({"all": torch.rand(1, 3, 24, 24)}, (4, 6), query=query).axes
    (band,), (cell,) = matrix.patches, reach.patches
    at = place[0] * 6 + place[1]
    assert (band.get_y() + band.get_height() / 2, band.get_width()) == (at, 24)
    assert (cell.get_y() + 0.5, cell.get_x() + 0.5) == place
    assert (cell.get_width(), cell.get_height()) == (1, 1)


def test_stands_side_by_side_in_order():
    patterns = {"one": torch.eye(12)[None], "two": torch.ones(1, 2, 12, 12), "three": torch.zeros(1, 12, 12)}
    figure = draw_patterns(patterns, (3, 4))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["one", "two", "three"]
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == ["reads 1 of 12", "reads 12 of 12", "reads 0 of 12"]
    figure.canvas.draw()
    lefts = [axes.get_position().x0 for axes in figure.axes[:3]]
    assert lefts == sorted(lefts)


def test_a_map_of_many_cells_is_drawn_without_lines_between_them():
    for side, lines in ((LINES, LINES - 1), (LINES + 1, 0)):
        _, reach = draw_patterns({"all": torch.ones(1, side, side)}, (1, side)).axes
        assert len(reach.lines) == lines


@pytest.mark.parametrize("shape", [(2, 12, 12), (1, 4, 15, 15)])
def test_refuses_weights_of_another_map_or_of_several_images(shape):
    message = r"all: weights must be of one image of 3×4 positions, got \(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=message):
        draw_patterns({"all": torch.ones(shape)}, (3, 4))


@pytest.mark.parametrize("query", [(3, 0), (0, -1)])
def test_refuses_a_query_outside_the_map(query):
    with pytest.raises(ValueError, match=rf"query must lie inside the map of 3×4, got \({query[0]}, {query[1]}\)"):
        draw_patterns({"all": torch.ones(1, 12, 12)}, (3, 4), query=query)


def test_refuses_to_draw_nothing():
    with pytest.raises(ValueError, match="patterns must name at least one, got none"):
        draw_patterns({}, (3, 4))


def test_the_picture_of_the_docs_is_what_its_script_draws():
    figure = runpy.run_path(str(SCRIPT))["figure"]()
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes[:7]]
    assert titles == ["local", "dilated", "strided", "strided", "axial", "axial", "criss-cross"]
    reads = [int(axes.get_xlabel().split()[1]) for axes in figure.axes[7:]]
    assert reads == [
        25,
        20,
        11,
        5,
        8,
        10,
        17,
    ]  # k² · a quarter · l + 1 · rows so far · a column · a row · both less one
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())
    assert imread(SCRIPT.with_suffix(".png")).shape == drawn.shape
