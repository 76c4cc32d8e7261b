import math

import numpy as np
import pytest
import torch

from visattn.attention.sampling.grids import identity, jacobian
from visattn.attention.sampling.thin_plate import ThinPlate, lattice
from visattn.attention.sampling.transforms import Affine, Projective, Similarity
from visattn.attention.sampling.warp import sample
from visattn.drawing import Warp, draw_warp, read_maps, sampled
from visattn.drawing.figure import canvas
from visattn.drawing.warp import draw_arrows, draw_lattice, look_around, read_off

PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
AFFINE = torch.tensor([[0.7, -0.4, 0.15, 0.3, 0.8, -0.1]])


def axes_of():
    return canvas(3.0, 3.0).subplots()


def drawn_lattice(grids, **options):
    """The lines and the outline of each head, and the axes."""
    axes = axes_of()
    draw_lattice(axes, PHOTO, grids.numpy(), **options)
    thin, bold = axes.collections[::2], axes.collections[1::2]
    lines = [[path.vertices for path in each.get_paths()] for each in thin]
    return lines, [each.get_paths()[0].vertices for each in bold], axes


def plate(size, span):
    """A plate with moved control points, its grid, and where they lie and come from."""
    points = lattice(4, 4, span=span)
    made = ThinPlate(points)
    ends = made.identity.view(16, 2) + 0.1 * torch.randn(16, 2)
    return made(ends.view(1, 32), size)[0].numpy(), points.numpy(), ends.numpy()


# --- reading a grid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (28, 28), (2, 9)])
def test_a_straight_grid_is_read_exactly_between_pixels_and_to_its_edges(size):
    transform, points = Affine(), 2.2 * torch.rand(1, 50, 2) - 1.1
    grid = transform(AFFINE, size)[0].numpy()
    wanted = transform.points(AFFINE, points)[0].numpy()
    np.testing.assert_allclose(read_off(grid, points[0].numpy()), wanted, atol=2e-6)


def test_a_grid_is_read_at_the_centres_of_its_pixels_as_it_is():
    grid = np.random.default_rng(0).standard_normal((5, 7, 2))
    np.testing.assert_allclose(read_off(grid, identity((5, 7), dtype=torch.float64)[0].numpy()), grid, atol=1e-12)


def test_a_single_pixel_comes_from_one_place():
    assert np.array_equal(read_off(np.full((1, 1, 2), 0.3), np.array([[-1.0, 0.5]])), [[0.3, 0.3]])


# --- the lattice ------------------------------------------------------------------------------------------------------


def test_where_nothing_moves_the_lattice_is_straight_even_and_as_large_as_the_image():
    (lines,), (outline,), axes = drawn_lattice(identity((8, 12)), cells=6)
    rows, columns = lines[:3], lines[3:]
    assert (len(rows), len(columns)) == (3, 5)
    for number, row in enumerate(rows, 1):
        np.testing.assert_allclose(row[:, 1], 20 * number / 4, atol=1e-5)
        np.testing.assert_allclose(row[[0, -1], 0], [0, 30], atol=1e-5)
    for number, column in enumerate(columns, 1):
        np.testing.assert_allclose(column[:, 0], 30 * number / 6, atol=1e-5)
        np.testing.assert_allclose(column[[0, -1], 1], [0, 20], atol=1e-5)
    np.testing.assert_allclose(np.array([outline.min(0), outline.max(0)]), [[0, 0], [30, 20]], atol=1e-5)
    assert tuple(axes.lines[0].get_xydata()[0]) == pytest.approx((0, 0), abs=1e-5)  # the dot


def test_a_turned_and_shifted_lattice_has_its_corners_where_the_transform_says():
    angle = math.radians(30)
    transform, theta = Similarity(), torch.tensor([[0.5 * math.cos(angle), 0.5 * math.sin(angle), 0.2, -0.1]])
    (lines,), (outline,), axes = drawn_lattice(transform(theta, (8, 12)))
    sides = np.cumsum([0, 2 * 12 + 1, 2 * 8 + 1, 2 * 12 + 1])
    ends = transform.points(theta, torch.tensor([[[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]]))[0]
    wanted = (ends.numpy() + 1) / 2 * (30, 20)
    np.testing.assert_allclose(outline[sides], wanted, atol=1e-4)
    np.testing.assert_allclose(outline[[*(sides[1:] - 1), -1]], wanted[[1, 2, 3, 0]], atol=1e-4)
    np.testing.assert_allclose(axes.lines[0].get_xydata()[0], wanted[0], atol=1e-4)
    for line in lines:
        ways = np.diff(line, axis=0)
        np.testing.assert_allclose(ways, ways[:1].repeat(len(ways), 0), atol=1e-4)


def test_every_head_has_its_own_lattice_and_colour():
    crops = torch.cat([0.5 * identity((4, 6)) + shift for shift in (-0.5, 0.5)])
    lines, outlines, axes = drawn_lattice(crops)
    assert len(lines) == 2
    np.testing.assert_allclose(outlines[1] - outlines[0], np.tile([15.0, 10.0], (len(outlines[0]), 1)), atol=1e-4)
    colours = [tuple(each.get_colors()[0]) for each in axes.collections]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_as_much_is_shown_around_the_image_as_the_lattice_needs_up_to_a_limit():
    for factor, beyond in ((0.5, 0), (1.4, 0.2), (9, 0.5)):
        _, _, axes = drawn_lattice(factor * identity((8, 12)))
        room = 0.02 * 30
        assert axes.get_xlim() == pytest.approx((-30 * beyond - room, 30 * (1 + beyond) + room), abs=1e-4)
        assert axes.get_ylim() == pytest.approx((20 * (1 + beyond) + room, -20 * beyond - room), abs=1e-4)
    axes = axes_of()
    look_around(axes, PHOTO, np.zeros((1, 2)), 0.25)
    assert (*axes.get_xlim(), *axes.get_ylim()) == pytest.approx((-7.5, 37.5, 25, -5))


def test_there_are_no_lines_beyond_the_horizon():
    grid = Projective()(torch.tensor([[1.0, 0, 0, 0, 1, 0, 1.5, 0]]), (8, 12))
    assert float(grid.abs().max()) > 100
    (lines,), (outline,), _ = drawn_lattice(grid)
    points = np.concatenate((*lines, outline))
    near = np.isfinite(points).all(1)
    assert 0.1 < near.mean() < 0.9
    assert np.abs(points[near]).max() < 51 * 30


# --- arrows -----------------------------------------------------------------------------------------------------------


def arrows(grid, **options):
    """Where arrows start and end, as shares of the image from -1 to 1."""
    axes = axes_of()
    draw_arrows(axes, PHOTO, grid, **options)
    (quiver,) = (each for each in axes.collections if hasattr(each, "U"))
    assert (quiver.angles, quiver.scale_units, quiver.scale) == ("xy", "xy", 1)
    starts = np.stack((quiver.X, quiver.Y), 1)
    np.testing.assert_allclose(axes.collections[0].get_offsets(), starts)
    return (2 * each / (30, 20) - 1 for each in (starts, starts + np.stack((quiver.U, quiver.V), 1)))


def test_arrows_lead_from_control_points_to_where_they_come_from():
    grid, points, ends = plate((28, 28), span=27 / 28)  # at centres of pixels
    first, last = arrows(grid, span=27 / 28)
    np.testing.assert_allclose(first, points, atol=1e-6)
    np.testing.assert_allclose(last, ends, atol=2e-6)


def test_arrows_of_points_on_the_edge_are_right_to_a_small_part_of_a_pixel():
    grid, points, ends = plate((60, 60), span=1.0)
    first, last = arrows(grid)
    np.testing.assert_allclose(first, points, atol=1e-6)
    assert np.abs(last - ends).max() < 0.1 * 2 / 60


def test_so_many_arrows_are_drawn_as_are_asked_for():
    first, last = arrows(identity((8, 12))[0].numpy(), points=(3, 5))
    assert first.shape == (15, 2)
    np.testing.assert_allclose(first, last, atol=1e-6)
    with pytest.raises(ValueError, match="rows and columns must be at least 2, got 1 and 4"):
        arrows(identity((8, 12))[0].numpy(), points=(1, 4))


# --- what is sampled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 30), (40, 60)])
def test_the_output_is_what_sampling_gives(size):
    grid = Affine()(AFFINE, size)
    figure = draw_warp(PHOTO, Warp("conv1/AffineTransformer", "", grid.numpy()))
    image = torch.tensor(PHOTO).permute(2, 0, 1)[None] / 255
    wanted = (sample(image, grid)[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.array_equal(figure.axes[2].images[0].get_array(), wanted)


def test_a_coarse_grid_warps_the_image_at_its_full_size():
    assert np.array_equal(sampled(PHOTO, identity((4, 6))[0].numpy()), PHOTO)
    coarse, fine = (Affine()(AFFINE, size)[0].numpy() for size in ((4, 6), (20, 30)))
    difference = sampled(PHOTO, coarse).astype(int) - sampled(PHOTO, fine)
    assert np.abs(difference).max() <= 1


# --- the whole picture ------------------------------------------------------------------------------------------------


def test_areas_are_the_determinants_and_what_is_folded_over_stays_blank():
    grid = identity((8, 12)).clone()
    grid[:, :, 6:] = grid[:, :, 6:].flip(2)
    figure = draw_warp(PHOTO, Warp("x", "", grid.numpy()), areas=True)
    cells = figure.axes[3].images[0].get_array()
    areas = jacobian(grid)[0].numpy()
    assert np.array_equal(np.ma.getmaskarray(cells), areas <= 0)
    assert np.array_equal(cells.compressed(), areas[areas > 0])
    assert np.ma.getmaskarray(cells).sum() == 7 * 5
    low, high = figure.axes[3].images[0].get_clim()
    assert low * high == pytest.approx(1)
    assert high >= areas.max()


@pytest.mark.parametrize("grid", [identity((8, 12)), identity((8, 12)).flip(2), identity((1, 5)), 0 * identity((3, 3))])
def test_warps_that_are_still_mirrored_or_flat_are_drawn(grid, tmp_path):
    draw_warp(PHOTO, Warp("x", "", grid.numpy()), areas=True).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_every_head_has_a_row_that_says_what_it_does():
    grids = torch.stack((0.5 * identity((4, 6))[0], identity((4, 6))[0]))
    (warp,) = read_maps({"conv1/AffineTransformer": grids[None]}, PHOTO.shape[:2])
    figure = draw_warp(PHOTO, warp)
    assert len(figure.axes) == 6
    assert [axes.texts[0].get_text() for axes in figure.axes[::3]] == [
        "1: 0% folded over, magnified 2×",
        "2: nothing moves",
    ]
    assert [axes.get_title() for axes in figure.axes] == [
        "sampled lattice",
        "where points come from",
        "what is sampled",
        *[""] * 3,
    ]
    assert figure.get_suptitle() == f"conv1/AffineTransformer\n{warp.note}"
