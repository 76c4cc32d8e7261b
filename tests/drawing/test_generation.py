import numpy as np
import pytest
import torch
from PIL import Image

from visattn.drawing import draw_generation, draw_samples, film_generation
from visattn.drawing.generation import GAP, WINDOW

LOGITS = torch.tensor([-30.0, 0.0, 30.0])


def canvases(count, steps, channels=1, size=(6, 8)):
    """Canvases of one shade each: black first, then grey, then white, and over again."""
    shade = LOGITS[torch.arange(count * steps) % 3].view(count, steps, 1, 1, 1)
    return shade.expand(-1, -1, channels, *size)


def square(x, y, side, count=1, steps=1):
    ends = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    return torch.tensor(ends).float().expand(count, steps, -1, -1)


def middles(sheet, rows, columns, size=(6, 8)):
    """The colours in the middles of the images on a sheet."""
    factor = round(112 / max(size))
    high, wide = (factor * side for side in size)
    pixels = np.asarray(sheet)
    assert pixels.shape == (rows * (high + GAP) + GAP, columns * (wide + GAP) + GAP, 3)
    y, x = (GAP + side // 2 + np.arange(n) * (side + GAP) for n, side in ((rows, high), (columns, wide)))
    return pixels[y[:, None], x]


def test_a_sheet_has_images_in_rows_and_nothing_behind_the_last():
    found = middles(draw_samples(canvases(7, 1)[:, 0]), 3, 3)
    assert found[..., 0].tolist() == [[0, 128, 255], [0, 128, 255], [0, 255, 255]]
    assert (found == found[..., :1]).all()


def test_colours_are_shown_as_such_and_other_channels_as_their_mean():
    colours = torch.stack((torch.full((6, 8), 30.0), torch.zeros(6, 8), torch.full((6, 8), -30.0)))
    assert middles(draw_samples(colours[None]), 1, 1)[0, 0].tolist() == [255, 128, 0]
    assert middles(draw_samples(colours[None, :2]), 1, 1)[0, 0].tolist() == [191] * 3


@pytest.mark.parametrize(
    ("steps", "columns", "chosen"), [(3, 10, [1, 2, 3]), (64, 5, [1, 17, 32, 48, 64]), (9, 1, [9]), (1, 4, [1])]
)
def test_a_figure_has_a_column_for_each_step_that_is_chosen(steps, columns, chosen):
    shown = canvases(2, steps)
    figure = draw_generation(shown, columns=columns, title="seven")
    texts = [text.get_text() for text in figure.texts]
    assert texts == [f"step {chosen[0]}", *map(str, chosen[1:]), "seven"]
    found = middles(figure.axes[0].images[0].get_array(), 2, len(chosen))[..., 0]
    expected = (shown[:, np.array(chosen) - 1, 0, 0, 0].sigmoid() * 255).round()
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("title", ["", "step 100000 of training"])
def test_texts_stand_above_their_columns_and_not_over_each_other(title):
    figure = draw_generation(canvases(2, 12), columns=6, title=title)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    assert figure.axes[0].get_window_extent().size == pytest.approx(
        np.asarray(figure.axes[0].images[0].get_array()).shape[1::-1], abs=1
    )
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert all(box.y0 >= figure.axes[0].get_window_extent().y1 - 1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_window_is_drawn_where_its_corners_are():
    factor = 112 // 8
    figure = draw_generation(canvases(1, 1), square(2, 1, 3))
    pixels = np.asarray(figure.axes[0].images[0].get_array())[GAP:-GAP, GAP:-GAP]
    rows, columns = np.nonzero((pixels == WINDOW).all(-1))
    assert (rows.min(), rows.max()) == (factor * 1, factor * 4 - 1)
    assert (columns.min(), columns.max()) == (factor * 2, factor * 5 - 1)
    assert (pixels[factor * 2 + 5, factor * 3 + 5] == 0).all()  # inside
    whole = draw_generation(canvases(1, 1), square(-3, -2, 30))
    pixels = np.asarray(whole.axes[0].images[0].get_array())
    assert (pixels[GAP, GAP:-GAP] == WINDOW).all()
    assert (pixels[GAP:-GAP, -GAP - 1] == WINDOW).all()
    assert (pixels[:GAP] == 255).all()
    beyond = draw_generation(canvases(1, 1), square(-50, -50, 20))
    assert not (np.asarray(beyond.axes[0].images[0].get_array()) == WINDOW).all(-1).any()


def test_a_film_shows_all_steps_and_at_last_no_windows(tmp_path):
    file = film_generation(canvases(3, 4), tmp_path / "film.gif", square(2, 1, 3, 3, 4), seconds=0.1)
    with Image.open(file) as film:
        assert film.n_frames == 5
        for step in range(5):
            film.seek(step)
            frame = film.convert("RGB")
            found = middles(frame, 2, 2)[..., 0].flatten()
            expected = canvases(3, 4)[:, min(step, 3), 0, 0, 0].sigmoid() * 255
            np.testing.assert_allclose(found, [*expected.round(), 255], atol=2)
            red = (np.abs(np.asarray(frame).astype(int) - WINDOW).max(-1) < 12).sum()
            assert (red > 100) == (step < 4)


def test_a_film_without_windows(tmp_path):
    with Image.open(film_generation(canvases(2, 3), tmp_path / "film.gif")) as film:
        assert film.n_frames >= 3


def test_refuses_no_columns():
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        draw_generation(canvases(1, 1), columns=0)
