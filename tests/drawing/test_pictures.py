import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visattn.attention.sampling.grids import identity
from visattn.drawing import draw_maps, overview

PHOTO = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def gates(count):
    return {f"layer{i}/SpatialGate": torch.rand(1, 1, 4, 6) for i in range(count)}


def titles(figure):
    return [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes if axes.get_title(loc="left")]


def test_writes_a_picture_for_each_map(tmp_path):
    maps = {"layer1.0/SqueezeExcitation": torch.rand(1, 64, 1, 1), "layer3.2/NonLocal": torch.rand(1, 24, 24)}
    paths = draw_maps(Image.fromarray(PHOTO), maps, tmp_path / "new" / "maps")
    assert [path.name for path in paths] == ["layer1.0-SqueezeExcitation.png", "layer3.2-NonLocal.png"]
    assert sorted(paths) == sorted((tmp_path / "new" / "maps").iterdir())
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 20
    assert not np.array_equal(*(np.asarray(Image.open(path).resize((50, 50))) for path in paths))


def test_overview_shows_every_map_with_its_name_in_order():
    maps = {"stem/SqueezeExcitation": torch.rand(1, 8, 1, 1), **gates(3)}
    figure = overview(PHOTO, maps, title="photo.jpg: cat 0.93")
    assert titles(figure) == ["stem", "layer0", "layer1", "layer2"]
    assert [text.get_text() for text in figure.texts] == ["photo.jpg: cat 0.93"]


def test_a_warp_has_its_picture_and_its_lattice_in_the_overview(tmp_path):
    maps = {"conv1/AffineTransformer": 0.5 * identity((8, 12))[None], "layer1/SpatialGate": torch.rand(1, 1, 4, 6)}
    paths = draw_maps(PHOTO, maps, tmp_path)
    assert [path.name for path in paths] == ["conv1-AffineTransformer.png", "layer1-SpatialGate.png"]
    figure = overview(PHOTO, maps)
    assert titles(figure) == ["conv1", "layer1"]
    panel = figure.axes[1]
    assert panel.get_title(loc="left").split("\n")[1:] == ["AffineTransformer", "8×12, 0% folded over, magnified 2×"]
    assert np.array_equal(panel.images[0].get_array(), PHOTO)
    outline = panel.collections[1].get_segments()[0]
    np.testing.assert_allclose([outline.min(0), outline.max(0)], [[24, 16], [72, 48]], atol=1e-4)


@pytest.mark.parametrize(("count", "shown"), [(19, 19), (20, 19), (100, 19)])
def test_overview_of_many_chooses_evenly_and_says_how_many_it_leaves_out(count, shown):
    figure = overview(PHOTO, gates(count))
    chosen = [int(title.removeprefix("layer")) for title in titles(figure)]
    assert len(chosen) == shown
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
    assert (f"19 of {count} maps, {count - 19} left out" in figure.texts[0].get_text()) == (count > 19)


def test_overview_without_maps_is_the_image():
    figure = overview(PHOTO, {})
    assert len(figure.axes) == 1
    assert np.array_equal(figure.axes[0].images[0].get_array(), PHOTO)


def test_nothing_is_written_outside_a_panel():
    note = torch.rand(1, 12, 29, 29).softmax(-1)
    figure = overview(PHOTO, {f"stages.3.blocks.{i}/MultiHeadAttention": note for i in range(8)})
    figure.canvas.draw()
    whole = figure.bbox
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_drawing_needs_no_display_and_leaves_pyplot_alone():
    code = "import sys, visattn.drawing; assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
