import numpy as np
import pytest

from visattn.drawing.explanation import draw_explanation

PHOTO = np.full((60, 90, 3), 120, np.uint8)
SHARES = np.linspace(0, 1, 5, dtype=np.float32)
MAPS = {"map, 2×3": np.eye(2, 3, dtype=np.float32), "another": np.ones((2, 3), np.float32)}
CURVES = {"deletion": {"map": (SHARES, 1 - SHARES), "shuffled": (SHARES, 1 - SHARES**2)}}


def test_picture_maps_and_curves_stand_side_by_side():
    figure = draw_explanation(PHOTO, MAPS, CURVES, title="dog 0.90", boxes=[(10.0, 20.0, 30.0, 50.0)])
    photo, first, second, curve = figure.axes
    assert [axes.get_title() for axes in (first, second, curve)] == ["map, 2×3", "another", "deletion"]
    assert photo.lines[0].get_xydata().tolist() == [[10, 20], [30, 20], [30, 50], [10, 50], [10, 20]]
    assert [line.get_ydata().tolist() for line in curve.lines] == [(1 - SHARES).tolist(), (1 - SHARES**2).tolist()]
    assert [text.get_text() for text in curve.get_legend().get_texts()] == ["map: 0.50", "shuffled: 0.66"]
    assert figure.texts[0].get_text() == "dog 0.90"
    sides = {
        (round(axes.get_position().width, 4), round(axes.get_position().height, 4)) for axes in (photo, first, second)
    }
    assert len(sides) == 1


def test_maps_alone_and_curves_alone_are_drawn():
    assert len(draw_explanation(PHOTO, {}, CURVES).axes) == 2
    assert not any(axes.lines for axes in draw_explanation(PHOTO, MAPS, {}).axes if axes.get_title())


@pytest.mark.parametrize(
    ("maps", "curves", "message"),
    [
        ({}, {}, "maps or curves must be some, got none"),
        ({}, {"deletion": dict.fromkeys("abcd", (SHARES, SHARES))}, "curves must have at most 3 lines, got 4"),
    ],
)
def test_refuses_what_cannot_be_drawn(maps, curves, message):
    with pytest.raises(ValueError, match=message):
        draw_explanation(PHOTO, maps, curves)
