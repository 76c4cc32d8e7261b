import numpy as np
import pytest

from visattn.drawing.words import draw_words

PHOTO = np.full((60, 90, 3), 120, np.uint8)
WORDS = ["a", "dog", "<end>"]


def one_hot(*cells: int, regions: int = 6) -> np.ndarray:
    return np.eye(regions, dtype=np.float32)[list(cells)]


def test_each_word_is_hot_where_it_was_read():
    figure = draw_words(PHOTO, WORDS, one_hot(0, 4, 5), (2, 3), title="a dog")
    photo, *heats, matrix = figure.axes
    assert [axes.get_title() for axes in heats] == WORDS
    assert photo.get_title() == ""
    for axes, (row, column) in zip(heats, ((0, 0), (1, 1), (1, 2)), strict=True):
        hot = axes.images[1].get_array()
        peak = np.unravel_index(hot.argmax(), hot.shape)
        assert (peak[0] * 2 // 60, peak[1] * 3 // 90) == (row, column)
        assert axes.images[1].get_clim() == (0, 1)  # one scale for all
    assert np.array_equal(matrix.images[0].get_array(), one_hot(0, 4, 5))
    assert [label.get_text() for label in matrix.get_yticklabels()] == WORDS
    assert figure.texts[0].get_text() == "a dog"


def test_what_is_read_beside_the_map_is_said():
    figure = draw_words(PHOTO, WORDS, one_hot(0, 6, 5, regions=7), (2, 3))
    assert [axes.get_title() for axes in figure.axes[1:4]] == [
        "a  0 % beside",
        "dog  100 % beside",
        "<end>  0 % beside",
    ]
    assert not figure.axes[2].images[1].get_array().any()


def test_many_words_go_on_below():
    words = [f"word{k}" for k in range(10)]
    narrow, wide = (draw_words(PHOTO, words, one_hot(*[0] * 10), (2, 3), columns=k) for k in (4, 11))
    assert narrow.get_size_inches()[1] > wide.get_size_inches()[1]
    tops = {round(axes.get_position().y1, 3) for axes in narrow.axes[:-1]}
    assert len(tops) == 3


@pytest.mark.parametrize(
    ("words", "weights", "options", "message"),
    [
        ([], one_hot(), {}, "words must be some, with weights for each, got 0 with 0"),
        (WORDS, one_hot(0), {}, "words must be some, with weights for each, got 3 with 1"),
        (WORDS, one_hot(0, 1, 2, regions=5), {}, "weights must be of at least the 6 positions of the map, got 5"),
        (WORDS, one_hot(0, 1, 2), {"columns": 0}, "columns must be at least 1, got 0"),
    ],
)
def test_refuses_what_does_not_fit(words, weights, options, message):
    with pytest.raises(ValueError, match=message):
        draw_words(PHOTO, words, weights, (2, 3), **options)
