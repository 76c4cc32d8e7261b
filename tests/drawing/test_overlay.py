import numpy as np
import pytest

from visattn.drawing import overlay, upsample
from visattn.drawing.figure import canvas
from visattn.drawing.overlay import ticks


def delta(height, width, row, column):
    values = np.zeros((height, width), np.float32)
    values[row, column] = 1
    return values


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (2, 4), (2, 0)])
@pytest.mark.parametrize("size", [(96, 160), (160, 96), (75, 333)])
def test_a_peak_lands_on_the_centre_of_its_cell(row, column, size):
    smooth = upsample(delta(3, 5, row, column), size)
    assert smooth.shape == size
    peaks = np.argwhere(smooth >= smooth.max() - 1e-6)
    cell = np.array([size[0] / 3, size[1] / 5])
    assert (peaks // cell == (row, column)).all()
    if (row, column) == (1, 3):  # inside; at the rim the peak is a plateau
        assert np.abs(peaks + 0.5 - (1.5, 3.5) * cell).max() <= 1


def test_smooth_is_within_the_range_and_linear_ramps_stay_linear_inside():
    rough = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    smooth = upsample(rough, (70, 50))
    assert rough.min() <= smooth.min()
    assert smooth.max() <= rough.max()
    ramp = upsample(np.arange(8, dtype=np.float32)[None].repeat(8, 0), (64, 80))
    inside = slice(20, 60)
    np.testing.assert_allclose(ramp[30, inside], ((np.arange(80) + 0.5) / 10 - 0.5)[inside], atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (160, 96)])
def test_the_hottest_pixel_of_the_picture_is_where_the_map_peaks(height, width):
    figure = canvas(4.0, 4.0)
    axes = figure.subplots()
    overlay(axes, np.zeros((height, width, 3), np.uint8), delta(6, 10, 1, 7) if width > height else delta(10, 6, 7, 1))
    figure.canvas.draw()
    left, bottom, right, top = axes.get_window_extent().extents
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)[::-1]  # rows from below, as the extents
    inside = pixels[round(bottom) + 1 : round(top) - 1, round(left) + 1 : round(right) - 1]
    row, column = np.unravel_index(inside.sum(2).argmax(), inside.shape[:2])
    x, y = axes.transData.inverted().transform((round(left) + 1 + column, round(bottom) + 1 + row))
    wanted = (1.5 * 16, 7.5 * 16) if width > height else (7.5 * 16, 1.5 * 16)
    assert (y, x) == pytest.approx(wanted, abs=2)


def test_scale_says_the_values_and_the_cross_stands_at_the_query():
    figure = canvas(4.0, 4.0)
    axes = figure.subplots()
    overlay(axes, np.zeros((32, 48, 3), np.uint8), delta(2, 3, 1, 2) * 0.3 + 0.2, query=(24.0, 8.0))
    assert [text.get_text() for text in axes.child_axes[0].get_yticklabels()] == ["0.200", "0.350", "0.500"]
    assert all((line.get_xdata()[0], line.get_ydata()[0]) == (8, 24) for line in axes.lines)
    assert len(axes.lines) == 2


def test_scale_of_equal_small_and_skewed_values():
    assert ticks(0.5, 0.5, 0.5) == ([0.5], ["0.5"])
    assert ticks(1e-9, 5e-7, 1e-6)[1] == ["1.00e-09", "5.00e-07", "1.00e-06"]
    assert ticks(0.0, 0.01, 1.0) == ([0.0, 1.0], ["0.00", "1.00"])  # the mean too near an end to be written
    assert ticks(-3.0, 0.0, 3.0)[1] == ["-3.00", "0.00", "3.00"]
