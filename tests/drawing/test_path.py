import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from visattn.attention.sampling.affine_glimpse import AffineGlimpse
from visattn.attention.sampling.gaussian_glimpse import GaussianGlimpse
from visattn.attention.sampling.retina import Retina
from visattn.data.transforms import Preprocess
from visattn.drawing import Scanpath, draw_glimpse, draw_path, film_path, follow, read_paths, reconstructed
from visattn.drawing.figure import canvas
from visattn.drawing.path import FINE, TRUE, draw_glimpses, draw_probabilities, draw_seen, factor_of, listed
from visattn.models import DeepRecurrentAttention, DifferentiableGlimpseClassifier, RecurrentAttention
from visattn.models.looker import Rollout

SIZE = (12, 16)
LITTLE = {"width": 16, "glimpse_width": 8, "location_width": 8}


def rollout(where, *, classes=3, logits=None, **rest):
    """A roll-out at these locations, (m t p)."""
    count, steps = where.shape[:2]
    nothing = torch.zeros(count, 0)
    weights = torch.zeros(count, steps)
    weights[:, -1] = 1
    known = {"weights": weights} | rest
    logits = torch.zeros(count, steps, classes) if logits is None else logits
    return Rollout(logits, where, nothing, nothing, nothing, known.pop("weights"), **known)


def path_of(sensor, where, image=None, **options):
    (path,) = read_paths(rollout(where[None]), sensor, torch.rand(1, 1, *SIZE) if image is None else image, **options)
    return path


def affine(*rows):
    return torch.tensor([rows]).float()


TURN = math.radians(30)
WHERE = {
    "retina": (Retina(4, scales=2), torch.tensor([[-0.5, 0.0], [0.3, -0.4], [0.9, 1.0]])),
    "odd": (Retina(3, scales=2, zoom=3), torch.tensor([[0.1, 0.2], [-1.0, -1.0]])),
    "gaussian": (GaussianGlimpse(3), torch.tensor([[0.2, -0.1, -1.0, -0.5, 0.7], [0.0, 0.3, -2.0, -1.2, -0.4]])),
    "affine": (
        AffineGlimpse(5),
        torch.tensor(
            [[0.4 * math.cos(TURN), -0.4 * math.sin(TURN), 0.3, 0.5 * math.sin(TURN), 0.5 * math.cos(TURN), 0.1]]
        ),
    ),
}


def axes_of(side=4.0):
    figure = canvas(side, side * SIZE[0] / SIZE[1], layout=None)
    return figure.add_axes((0, 0, 1, 1))


def rendered(axes):
    axes.figure.canvas.draw()
    return np.asarray(axes.figure.canvas.buffer_rgba())[..., :3].astype(int)


# --- what was seen ----------------------------------------------------------------------------------------------------


def painted(path, glimpses, factor):
    """The same by loops over points: the finest and then the latest patch that a point is in."""
    height, width = (factor * side for side in path.photo.shape[:2])
    out = np.zeros((height, width, 4), np.uint8)
    for row in range(height):
        for column in range(width):
            point, best = np.array([(column + 0.5) / factor, (row + 0.5) / factor]), None
            for step in range(glimpses):
                for corners, patch in zip(path.corners[step], path.patches[step], strict=True):
                    sides = np.stack((corners[1] - corners[0], corners[3] - corners[0]), 1)
                    a, b = np.linalg.solve(sides, point - corners[0])
                    if not (0 <= a < 1 and 0 <= b < 1):
                        continue
                    area, cell = abs(np.linalg.det(sides)), patch[int(b * len(patch)), int(a * len(patch))]
                    if cell[3] and (best is None or area <= best * 1.001):
                        best, out[row, column] = area, cell
    return out


@pytest.mark.parametrize("kind", WHERE)
@pytest.mark.parametrize("factor", [1, 3])
def test_what_was_seen_is_that_of_loops(kind, factor):
    path = path_of(*WHERE[kind])
    for glimpses in range(1, len(path.corners) + 1):
        found = reconstructed(path, glimpses, factor=factor)
        assert np.array_equal(found, painted(path, glimpses, factor))
        assert found[..., 3].any()


def test_of_whole_pixels_the_finest_are_those_of_the_image_and_coarse_ones_their_means():
    image = torch.rand(1, 1, *SIZE)
    where = torch.tensor([[4.0, 6.0], [10, 4]]) * 2 / torch.tensor(SIZE[::-1]) - 1
    path = path_of(Retina(4, scales=2), where, image)
    seen = reconstructed(path, 2)[..., 0]
    assert np.array_equal(seen[4:8, 2:6], path.photo[4:8, 2:6, 0])
    assert np.array_equal(seen[2:6, 8:12], path.photo[2:6, 8:12, 0])
    mean = (image[0, 0, 8:10, 0:2].mean() * 255).round()
    assert (seen[8:10, 0:2] == mean.numpy()).all()
    assert (reconstructed(path, 1)[2:6, 8:12, 3] == 0).all()  # not yet


def test_what_was_not_seen_stays_marked():
    path = path_of(Retina(4), torch.tensor([[-0.5, 0.0]]), torch.ones(1, 1, *SIZE))
    seen = reconstructed(path, 1)
    inside = np.zeros(SIZE, bool)
    inside[4:8, 2:6] = True
    assert np.array_equal(seen[..., 3] == 255, inside)
    axes = axes_of()
    draw_seen(axes, path, 1)
    pixels = rendered(axes)
    cells = pixels.reshape(SIZE[0], 30, SIZE[1], 30, 3).transpose(0, 2, 1, 3, 4).reshape(*SIZE, -1)
    assert (cells[inside] == 255).all()
    assert (cells[~inside].max(-1) < 220).all()
    assert (cells[~inside].max(-1) - cells[~inside].min(-1) > 20).mean() > 0.9  # hatched


def test_neither_strength_nor_the_edge_darkens_what_was_seen():
    white = torch.ones(1, 1, *SIZE)
    for sensor, where in (
        (GaussianGlimpse(4), torch.tensor([[0.0, 0.0, 0.0, -0.5, -3.0], [0.5, 0.0, 0.0, -0.5, 2.0]])),
        (Retina(4, scales=3), torch.tensor([[1.0, -1.0], [0.0, 0.0]])),
    ):
        path = path_of(sensor, where, white)
        opaque = path.patches[..., 3] > 0
        assert (path.patches[opaque] == 255).all()
    assert 0 < opaque.mean() < 1
    assert np.array_equal(reconstructed(path, 2)[..., 3].min(), 255)


def test_a_flat_patch_is_nowhere():
    path = path_of(*WHERE["retina"])
    path.corners[0, :] = path.corners[0, :1, :1]
    assert not reconstructed(path, 1).any()


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 1])
def test_a_box_has_its_corners_where_the_sensor_reads_first_and_last(scale):
    sensor, where = Retina(4, scales=2), torch.tensor([[0.0, 0.0]])
    side = 4 * 2**scale
    top, left = 6 - side // 2, 8 - side // 2
    for row, column, place in ((top, left, (0, 0)), (top + side - 1, left + side - 1, (-1, -1))):
        image = torch.zeros(1, 1, *SIZE)
        image[..., row, column] = 1
        patch = sensor(sensor.prepare(image), where)[0, scale, 0]
        assert patch[place] > 0
        assert patch.count_nonzero() == 1
    axes = axes_of()
    draw_glimpses(axes, path_of(sensor, where), 1, numbers=False)
    boxes = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 2]
    assert len(boxes) == 2
    ends = boxes[scale].min(0), boxes[scale].max(0)
    np.testing.assert_allclose(ends, [(left, top), (left + side, top + side)], atol=1e-6)


@pytest.mark.parametrize("shade", [0.0, 1.0])
def test_a_box_is_seen_on_dark_and_bright_pictures_around_the_pixels_that_are_read(shade):
    path = path_of(Retina(4), torch.tensor([[-0.25, 0.0]]), torch.full((1, 1, *SIZE), shade))
    axes = axes_of()
    draw_glimpses(axes, path, 1)
    pixels = rendered(axes)
    different = np.abs(pixels - 255 * shade).max(-1) > 25
    for x, y in ((4 * 30, 6 * 30 + 15), (8 * 30, 6 * 30 + 15), (6 * 30 + 15, 4 * 30), (6 * 30 + 15, 8 * 30)):
        assert different[y - 1 : y + 1, x - 1 : x + 1].all()
    assert not different[: 4 * 30 - 8].any()
    assert not different[:, : 4 * 30 - 8].any()
    assert not different[4 * 30 + 8 : 5 * 30, 4 * 30 + 8 : 8 * 30 - 8].any()  # the corner of what is read


def test_a_turned_window_is_drawn_turned():
    sensor, where = WHERE["affine"]
    axes = axes_of()
    draw_glimpses(axes, path_of(sensor, where), 1)
    wanted = sensor.corners(where, SIZE)[0, 0].numpy()
    drawn = axes.lines[0].get_xydata()
    for corner in wanted:
        assert np.abs(drawn - corner).max(1).min() < 1e-5
    assert np.abs(wanted[1] - wanted[0]).min() > 1


def test_boxes_are_drawn_as_far_as_they_are_inside():
    axes = axes_of()
    draw_glimpses(axes, path_of(Retina(4, scales=4), torch.tensor([[1.0, -1.0]])), 1, numbers=False)
    boxes = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 2]
    wanted = [[14, 0, 16, 2], [12, 0, 16, 4], [8, 0, 16, 8], [0, 0, 16, 12]]
    assert [[*box.min(0), *box.max(0)] for box in boxes] == wanted
    for box, (left, top, right, bottom) in zip(boxes, wanted, strict=True):  # and all around
        assert np.abs(np.diff(box, axis=0)).sum() == 2 * (right - left + bottom - top)


def test_the_path_is_numbered_and_leads_from_centre_to_centre():
    sensor, where = WHERE["retina"]
    path = path_of(sensor, where)
    axes = axes_of()
    draw_glimpses(axes, path, 3)
    centres = (where.numpy() + 1) / 2 * (16, 12)
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    np.testing.assert_allclose([text.xy for text in axes.texts], centres, atol=1e-5)
    ways = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 2]
    np.testing.assert_allclose(ways, [centres[:2], centres[1:]], atol=1e-5)
    colours = [line.get_color() for line in axes.lines if len(line.get_xydata()) == 1]
    assert len(set(colours)) == 3
    axes = axes_of()
    draw_glimpses(axes, path, 2, numbers=False)
    assert not axes.texts
    assert sum(len(line.get_xydata()) > 2 for line in axes.lines) == 2  # both patches of the second alone


def test_small_pictures_are_enlarged_without_blur():
    path = path_of(*WHERE["retina"])
    axes = axes_of()
    draw_glimpses(axes, path, 1)
    shown = np.asarray(axes.images[0].get_array())
    assert max(shown.shape) == FINE
    assert np.array_equal(shown, np.kron(path.photo, np.ones((FINE // 16, FINE // 16, 1))))
    assert axes.images[0].get_extent() == [0, 16, 12, 0]
    assert factor_of(np.zeros((224, 300, 3), np.uint8)) == 1


# --- probabilities ----------------------------------------------------------------------------------------------------


def thought(logits, **options):
    """A path of these logits, (t c)."""
    steps = len(logits)
    known = {name: options.pop(name)[None] for name in ("weights", "halting") if name in options}
    done = rollout(torch.zeros(1, steps, 2), logits=torch.tensor(logits).float()[None], **known)
    (path,) = read_paths(done, Retina(4), torch.rand(1, 1, *SIZE), **options)
    return path


def test_bars_are_probabilities_of_the_likeliest_classes_and_of_the_true_one():
    logits = np.log([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.6, 0.15, 0.1, 0.05]])
    path = thought(
        logits, labels=["ant", "bee", "cat", "dog", "a hippopotamus amphibius or so"], truth=torch.tensor([4])
    )
    assert listed(path, 3) == [1, 0, 4]
    axes = axes_of()
    draw_probabilities(axes, path, 0, top=3)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.2, 0.5, 0.05])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["bee", "ant", "a hippopotamus amphibiu… (true)"]
    assert [text.get_text() for text in axes.texts] == ["0.20", "0.50", "0.05"]
    assert axes.get_yticklabels()[2].get_color() == TRUE
    assert listed(thought(logits), 1) == [1]
    assert listed(thought(logits, truth=torch.tensor([4])), 1) == [1, 4]  # never less than decision and truth


def test_weights_and_halting_have_bars_of_their_own_where_there_are_any():
    logits = torch.zeros(3, 2).tolist()
    weights, halting = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.3, 0.1, 0.6])
    for options, names in (
        ({}, ["0", "1"]),
        ({"weights": weights}, ["0", "1", "weight"]),
        ({"weights": weights, "halting": halting}, ["0", "1", "weight", "stops here"]),
    ):
        axes = axes_of()
        draw_probabilities(axes, thought(logits, **options), 1)
        assert [text.get_text() for text in axes.get_yticklabels()] == names
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.5, 0.5, 0.3, 0.1][: len(names)])


def test_a_path_ends_where_the_network_stops():
    path = thought(torch.zeros(4, 2).tolist(), halting=torch.tensor([0.3, 0.3, 0.3, 0.1]))
    assert [len(part) for part in (path.corners, path.patches, path.probabilities, path.halting)] == [2] * 4
    assert path.weights is None


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        partial(RecurrentAttention, 5, size=SIZE, patch=4, scales=2, glimpses=3, **LITTLE),
        partial(RecurrentAttention, 5, size=SIZE, patch=4, glimpses=3, readout="attention", halting=True, **LITTLE),
        partial(DifferentiableGlimpseClassifier, 5, size=SIZE, patch=4, glimpses=3, width=16),
    ],
)
def test_follows_what_forward_does(make):
    network, images = make().eval(), torch.rand(4, 1, *SIZE)
    network.labels = [*"abcde"]
    paths = follow(network, images)
    with torch.no_grad():
        wanted = network(images).softmax(1)
    for path, image, probabilities in zip(paths, images, wanted, strict=True):
        np.testing.assert_allclose(path.probabilities[-1], probabilities, atol=1e-6)
        assert np.array_equal(path.photo[..., 0], (image[0] * 255).round().byte().numpy())
        assert path.labels == [*"abcde"]
    again = follow(network, images, policy="mean")
    assert all(np.array_equal(a.corners, b.corners) for a, b in zip(paths, again, strict=True))


def test_several_roll_outs_of_an_image_are_paths_of_their_own():
    network, images = RecurrentAttention(5, size=SIZE, patch=4, glimpses=2, **LITTLE).eval(), torch.rand(2, 1, *SIZE)
    first = torch.tensor([[-0.5, 0.0], [0.0, 0.0], [0.5, 0.0], [0.5, 0.5]])
    paths = follow(network, images, rollouts=2, policy="sample", first=first, truth=torch.tensor([3, 4]))
    assert [path.truth for path in paths] == [[3, 3], [3, 3], [4, 4], [4, 4]]
    for path, place, image in zip(paths, first, images.repeat_interleave(2, 0), strict=True):
        np.testing.assert_allclose(path.corners[0, 0].mean(0), (place.numpy() + 1) / 2 * (16, 12), atol=1e-5)
        assert np.array_equal(path.photo[..., 0], (image[0] * 255).round().byte().numpy())


def test_pixels_are_as_they_were_before_they_were_normalised():
    preprocess = Preprocess((3, *SIZE), mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.1))
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    network = RecurrentAttention(2, in_chans=3, size=SIZE, patch=4, glimpses=1, **LITTLE).eval()
    network.transform = preprocess
    (path,) = follow(network, preprocess(pixels)[None])
    assert np.array_equal(path.photo, pixels)
    assert np.array_equal(path.patches[0, 0, ..., :3], pixels[4:8, 6:10])


def test_of_several_targets_each_has_its_truth_and_its_decision():
    network = DeepRecurrentAttention(
        7, size=(20, 20), targets=2, glimpses=2, width=8, glimpse_width=8, filters=(2, 2, 2), context_filters=(2, 2, 2)
    ).eval()
    nn.init.normal_(network.classifier[-1].bias)
    images = torch.rand(1, 1, 20, 20)
    (path,) = follow(network, images, truth=torch.tensor([[6, 2]]))
    assert path.truth == [6, 6, 2, 2]
    with torch.no_grad():
        decided = network(images)[0].argmax(1).tolist()
    assert {6, 2, *decided} <= set(listed(path, 1))
    assert len(draw_path(path).axes) == 1 + 3 * 4


# --- whole pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "columns", "rows", "size"), [(1, 8, 1, SIZE), (3, 2, 2, (40, 12)), (4, 4, 1, (20, 50))]
)
def test_a_figure_has_all_of_the_path_and_a_column_for_each_glimpse_within_itself(steps, columns, rows, size):
    done = rollout(2 * torch.rand(1, steps, 2) - 1, halting=torch.eye(steps)[-1:])
    names = ["a class with a rather long name", "b", "c"]
    (path,) = read_paths(done, Retina(4, scales=2), torch.rand(1, 3, *size), labels=names)
    figure = draw_path(path, title="seven", columns=columns)
    assert len(figure.axes) == 1 + 3 * steps
    titles = [axes.get_title() for axes in figure.axes[1::3]]
    assert titles == [*map(str, range(1, steps + 1))]
    assert len({round(axes.get_position().y0, 4) for axes in figure.axes[1::3]}) == rows
    figure.canvas.draw()
    whole = figure.bbox.expanded(1.001, 1.001)
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.texts[0].get_window_extent()]
    assert all(
        box.x0 >= whole.x0 - 1 and box.y0 >= whole.y0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes
    )
    panels = [axes.get_window_extent() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(panels) for b in panels[:i])
    seen = [np.asarray(axes.images[0].get_array()) for axes in figure.axes[2::3]]
    for step, shown in enumerate(seen):
        assert np.array_equal(shown, reconstructed(path, step + 1, factor=factor_of(path.photo)))


def test_a_film_has_a_frame_for_each_glimpse_all_of_one_size(tmp_path):
    path = path_of(*WHERE["retina"])
    file = film_path(path, tmp_path / "path.gif", title="seven", seconds=0.2)
    draw_glimpse(path, 0, title="seven").savefig(tmp_path / "one.png")
    with Image.open(file) as film, Image.open(tmp_path / "one.png") as one:
        assert film.n_frames == 3
        assert film.size == one.size
        stays, frames = [], []
        for step in range(3):
            film.seek(step)
            stays.append(film.info["duration"])
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert stays == [200, 200, 600]
    assert all(np.abs(a - b).max() > 50 for a, b in pairwise(frames))


def test_refuses_what_cannot_be_followed():
    with pytest.raises(ValueError, match="network must look at one place after another, got Linear"):
        follow(nn.Linear(1, 1), torch.rand(1, 1, *SIZE))
    with pytest.raises(ValueError, match="network must be in eval mode to be followed"):
        follow(RecurrentAttention(2, size=SIZE, patch=4, **LITTLE), torch.rand(1, 1, *SIZE))
    done, images = rollout(torch.zeros(3, 2, 2)), torch.rand(2, 1, *SIZE)
    with pytest.raises(ValueError, match="rollout must have equally many rows for each of 2 images, got 3"):
        read_paths(done, Retina(4), images)
    with pytest.raises(ValueError, match=r"truth must be 1 for each of 1 images, got \(1, 2\)"):
        read_paths(done, Retina(4), images[:1], truth=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="labels must name each of the 3 classes, got 1"):
        read_paths(done, Retina(4), images[:1], labels=["a"])
    path: Scanpath = path_of(*WHERE["retina"])
    for options, values in (({"columns": 0}, "0 and 5"), ({"top": 0}, "8 and 0")):
        with pytest.raises(ValueError, match=f"columns and top must be at least 1, got {values}"):
            draw_path(path, **options)
