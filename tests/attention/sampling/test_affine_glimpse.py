import math

import pytest
import torch
from torch.nn import functional as F

from visattn.attention.sampling.affine_glimpse import AffineGlimpse
from visattn.attention.sampling.retina import Retina


def test_is_the_library():
    images, where = torch.randn(3, 2, 9, 12).double(), torch.randn(3, 6).double()
    sensor = AffineGlimpse(5)
    grid = F.affine_grid(where.view(3, 2, 3), [3, 2, 5, 5], align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(sensor(sensor.prepare(images), where)[:, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("points", [1, 2, 3])
def test_averages_the_points_of_a_pixel(points):
    images = torch.randn(2, 3, 6, 6).double()
    where = AffineGlimpse(1).transform.identity.double().expand(2, -1)
    sensor = AffineGlimpse(6 // points, points=points)
    glimpse = sensor(sensor.prepare(images), where)[:, 0]
    torch.testing.assert_close(glimpse, F.avg_pool2d(images, points), rtol=0, atol=1e-12)


def test_two_points_pass_over_nothing_at_a_quarter_of_the_resolution():
    stripes = torch.arange(64.0).remainder(4).lt(2).float().expand(1, 1, 64, 64).contiguous()  # a half on average
    whole = AffineGlimpse(1).transform.identity[None]
    errors = []
    for points in (1, 2):
        sensor = AffineGlimpse(16, points=points)
        shifted = whole + torch.tensor([[0, 0, 1 / 64, 0, 0, 0]])
        errors.append((sensor(sensor.prepare(stripes), shifted)[..., 1:-1] - 0.5).abs().max().item())
    assert errors[0] > 0.4
    assert errors[1] < 1e-5


def test_a_crop_is_the_first_patch_of_a_retina():
    images, where = torch.randn(2, 3, 12, 20).double(), 1.6 * torch.rand(2, 2).double() - 0.8
    retina, affine = Retina(5), AffineGlimpse(5)
    zero = torch.zeros(2).double()
    matrix = torch.stack((zero + 5 / 20, zero, where[:, 0], zero, zero + 5 / 12, where[:, 1]), 1)
    patch = retina(retina.prepare(images), where)
    torch.testing.assert_close(affine(affine.prepare(images), matrix), patch, rtol=0, atol=1e-12)
    torch.testing.assert_close(affine.corners(matrix, (12, 20)), retina.corners(where, (12, 20)))


def test_a_quarter_turn_turns_the_corners():
    turn = torch.tensor([[0.0, -1, 0, 1, 0, 0]])
    assert AffineGlimpse(4).corners(turn, (6, 8))[0, 0].tolist() == [[8, 0], [8, 6], [0, 6], [0, 0]]
    image = torch.randn(1, 1, 4, 4)
    glimpse = AffineGlimpse(4)((image,), turn)
    torch.testing.assert_close(glimpse[:, 0], image.rot90(1, (2, 3)))
    assert (glimpse[:, 0] - image.rot90(-1, (2, 3))).abs().max() > 0.1


def test_refuses_a_singular_matrix():
    where = torch.eye(2, 3).flatten().repeat(3, 1)
    where[1, 0] = 0
    where[2, 2] = math.inf
    with pytest.raises(ValueError, match=r"where must be those of a regular matrix, got .* first, in rows \[1, 2\]"):
        AffineGlimpse(4).refuse_astray(where)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 4, "points": 0}])
def test_refuses_less_than_one(options):
    with pytest.raises(ValueError, match="size and points must be at least 1, got"):
        AffineGlimpse(**options)
