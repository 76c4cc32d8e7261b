import numpy as np
import pytest

from visattn.drawing import bars
from visattn.drawing.bars import top_bars
from visattn.drawing.pictures import canvas


@pytest.mark.parametrize("channels", [1, 64, 2048])
def test_every_channel_has_its_bar_from_the_mean(channels):
    values = np.random.default_rng(0).random(channels).astype(np.float32)
    for order, wanted in ((True, values), (False, np.sort(values)[::-1])):
        axes = canvas(4.0, 2.0).subplots()
        bars(axes, values, order=order)
        heights, edges, baseline = axes.patches[0].get_data()
        assert np.array_equal(heights, wanted)
        assert baseline == pytest.approx(values.mean())
        assert (edges[0], edges[-1]) == (-0.5, channels - 0.5)
        low, high = axes.get_ylim()
        assert low < values.min() <= values.max() < high


def test_top_bars_name_their_channels():
    values = np.linspace(0, 1, 40, dtype=np.float32)
    values[7] = 2
    axes = canvas(4.0, 2.0).subplots()
    top_bars(axes, values, 3)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["7", "39", "38"]
    assert [bar.get_y() + bar.get_height() for bar in axes.patches] == pytest.approx([2, 1, 38 / 39])
