import numpy as np
import pytest
from PIL import Image

from visattn.drawing import film


def pictures(folder, *sizes):
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (0, 80 * number, 200)).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def test_a_film_has_a_frame_for_each_picture_and_the_last_one_stays(tmp_path):
    file = film(pictures(tmp_path, *[(30, 20)] * 3), tmp_path / "film.gif", seconds=0.2)
    with Image.open(file) as opened:
        assert (opened.n_frames, opened.size, opened.info["loop"]) == (3, (30, 20), 0)
        for number, stays in enumerate((200, 200, 600)):
            opened.seek(number)
            assert opened.info["duration"] == stays
            assert np.abs(np.asarray(opened.convert("RGB"))[5, 5].astype(int) - (0, 80 * number, 200)).max() <= 2


def test_pictures_of_another_size_are_fitted_in(tmp_path):
    file = film(pictures(tmp_path, (30, 20), (60, 60)), tmp_path / "film.gif")
    with Image.open(file) as opened:
        opened.seek(1)
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    assert pixels.shape == (20, 30, 3)
    assert pixels[10, 2].min() > 250  # what is left is white
    assert np.abs(pixels[10, 15] - (0, 80, 200)).max() <= 2


def test_refuses_a_film_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="pictures must be at least one, got none"):
        film([], tmp_path / "film.gif")
    with pytest.raises(ValueError, match=r"seconds must be positive, got 0\.0"):
        film(pictures(tmp_path, (3, 2)), tmp_path / "film.gif", seconds=0.0)
    assert not (tmp_path / "film.gif").exists()
