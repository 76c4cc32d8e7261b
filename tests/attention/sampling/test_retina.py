import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.sampling.retina import Retina, means

FORMS = ("pyramid", "point", "exact")
every_form = pytest.mark.parametrize("form", FORMS)


def look(sensor: Retina, images: Tensor, where: Tensor) -> Tensor:
    return sensor(sensor.prepare(images), where)


def at(x: float, y: float, size: tuple[int, int], dtype: torch.dtype = torch.double) -> Tensor:
    """The location of a point that is given in pixels from the upper left corner."""
    return torch.tensor([[2 * x / size[1] - 1, 2 * y / size[0] - 1]], dtype=dtype)


def cropped(image: Tensor, left: int, top: int, side: int) -> Tensor:
    """A square of whole pixels, one after the other, with zeros outside."""
    result = image.new_zeros(image.shape[0], side, side)
    for i in range(side):
        for j in range(side):
            if 0 <= top + i < image.shape[1] and 0 <= left + j < image.shape[2]:
                result[:, i, j] = image[:, top + i, left + j]
    return result


def in_loops(images: Tensor, where: Tensor, g: int, scales: int, zoom: int) -> Tensor:
    """Each patch of each image cropped from whole pixels by itself, and boxes averaged."""
    result = images.new_empty(len(images), scales, images.shape[1], g, g)
    for b, image in enumerate(images):
        for i in range(scales):
            side = g * zoom**i
            left, top = (
                math.floor((where[b, a].item() + 1) / 2 * images.shape[3 - a] - side / 2 + 0.5) for a in (0, 1)
            )
            result[b, i] = F.avg_pool2d(cropped(image, left, top, side), zoom**i)
    return result


def tent(image: Tensor, x: float, y: float) -> Tensor:
    """Linear interpolation between the centres of pixels, at a point in pixels from the corner; zeros outside."""
    rows = image.new_tensor([max(0.0, 1 - abs(y - n - 0.5)) for n in range(image.shape[1])])
    columns = image.new_tensor([max(0.0, 1 - abs(x - n - 0.5)) for n in range(image.shape[2])])
    return rows @ image @ columns


def interpolated(images: Tensor, where: Tensor, g: int, zooms: list[int], pools: list[int]) -> Tensor:
    """Each pixel of each patch by itself, from means over boxes of a side for each scale."""
    result = images.new_empty(len(images), len(zooms), images.shape[1], g, g)
    height, width = images.shape[2:]
    for b, image in enumerate(images):
        x, y = ((where[b, a].item() + 1) / 2 * side for a, side in ((0, width), (1, height)))
        for k, (zoom, pool) in enumerate(zip(zooms, pools, strict=True)):
            boxes = F.avg_pool2d(cropped(image, 0, 0, pool * math.ceil(max(height, width) / pool)), pool)
            for i in range(g):
                for j in range(g):
                    across, down = x + (j + 0.5 - g / 2) * zoom, y + (i + 0.5 - g / 2) * zoom
                    result[b, k, :, i, j] = tent(boxes, across / pool, down / pool)
    return result


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize(("size", "scales", "zoom"), [(4, 3, 2), (5, 3, 2), (3, 3, 3), (1, 4, 2), (2, 2, 4), (7, 1, 2)])
def test_exact_is_cropping_in_loops_to_the_last_bit(size, scales, zoom, dtype):
    images = torch.randn(6, 3, 9, 13, dtype=dtype)
    where = 2 * torch.rand(6, 2, dtype=dtype) - 1
    where[:4] = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])
    glimpse = look(Retina(size, scales=scales, zoom=zoom, form="exact"), images, where)
    assert torch.equal(glimpse, in_loops(images, where, size, scales, zoom))


@pytest.mark.parametrize("size", [3, 4])
def test_point_is_interpolation_in_loops(size):
    images, where = torch.randn(4, 2, 9, 13).double(), 2 * torch.rand(4, 2).double() - 1
    where[0] = 1
    expected = interpolated(images, where, size, [1, 2, 4], [1, 1, 1])
    ours = look(Retina(size, scales=3, form="point"), images, where)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("zoom", "pools"), [(2, [1, 1, 2, 4]), (3, [1, 3, 9]), (4, [1, 2, 8])], ids=["by 2", "by 3", "by 4"]
)
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("shape", [(16, 8), (9, 13)], ids=str)
def test_pyramid_is_interpolation_between_means_in_loops(shape, size, zoom, pools):
    images, where = torch.randn(3, 2, *shape).double(), 2 * torch.rand(3, 2).double() - 1
    where[0] = 1
    expected = interpolated(images, where, size, [zoom**i for i in range(len(pools))], pools)
    ours = look(Retina(size, scales=len(pools), zoom=zoom), images, where)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 28), (19, 30)], ids=str)
def test_interpolation_is_exact_at_whole_centres(shape):
    images = torch.randn(1, 3, *shape).double()
    for x, y in ((4, 8), (24, 12), (0, 0), (28, 16)):
        where = at(x, y, shape)
        exact = look(Retina(4, scales=4, form="exact"), images, where)
        torch.testing.assert_close(look(Retina(4, scales=4), images, where), exact, rtol=0, atol=1e-12)
        point = look(Retina(4, scales=4, form="point"), images, where)
        torch.testing.assert_close(point[:, :2], exact[:, :2], rtol=0, atol=1e-12)
        assert (point[:, 2:] - exact[:, 2:]).abs().max() > 0.1  # aliases
    odd = at(5.5, 7.5, shape)  # the centre of a pixel
    torch.testing.assert_close(
        look(Retina(5), images, odd), look(Retina(5, form="exact"), images, odd), rtol=0, atol=1e-12
    )
    thirds = at(10.5, 13.5, shape)
    both = (look(Retina(3, scales=2, zoom=3, form=form), images, thirds) for form in ("pyramid", "exact"))
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)


def test_a_pyramid_has_fewer_aliases_than_points():
    images = torch.rand(32, 1, 60, 60)
    where = torch.stack([at(*torch.randint(0, 61, (2,)).tolist(), (60, 60), torch.float)[0] for _ in range(32)])
    pyramid, point, exact = (look(Retina(12, scales=3, form=form), images, where)[:, 2] for form in FORMS)
    assert (pyramid - exact).abs().mean() < 0.6 * (point - exact).abs().mean()


@every_form
def test_a_patch_of_the_whole_image_is_the_image(form):
    images = torch.randn(2, 3, 7, 7).double()
    glimpse = look(Retina(7, form=form), images, torch.zeros(2, 2).double())
    torch.testing.assert_close(glimpse[:, 0], images, rtol=0, atol=1e-12)


@every_form
def test_locations_scale_with_height_and_width_and_patches_do_not(form):
    images = torch.zeros(1, 1, 40, 80)
    images[:, :, 19:21, 39:41] = 1  # at the centre
    images[:, :, 0, 79] = 1  # in the upper right corner
    sensor = Retina(4, scales=2, form=form)
    assert look(sensor, images, torch.zeros(1, 2)).sum((2, 3, 4)).round(decimals=4).tolist() == [[4, 1]]
    corner = look(sensor, images, torch.tensor([[1.0, -1.0]]))[0, :, 0]
    expected = torch.zeros(2, 4, 4)
    expected[0, 2, 1], expected[1, 2, 1] = 1, 0.25
    torch.testing.assert_close(corner, expected, rtol=0, atol=1e-4)


@every_form
@pytest.mark.parametrize("size", [3, 4])
def test_moving_image_and_location_changes_nothing(form, size):
    images = torch.zeros(1, 2, 40, 48).double()
    images[:, :, 12:20, 16:24] = torch.randn(2, 8, 8)
    sensor = Retina(size, scales=3, form=form)
    before = look(sensor, images, at(18.3, 15.1, (40, 48)))
    after = look(sensor, images.roll((4, -8), (2, 3)), at(18.3 - 8, 15.1 + 4, (40, 48)))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@every_form
def test_mirroring_mirrors_and_transposing_needs_the_location_transposed(form):
    images, where = torch.randn(2, 1, 12, 16).double(), 1.8 * torch.rand(2, 2).double() - 0.9
    sensor = Retina(4, scales=3, form=form)
    glimpse = look(sensor, images, where)
    mirrored = look(sensor, images.flip(3), where * where.new_tensor([-1, 1]))
    torch.testing.assert_close(mirrored, glimpse.flip(4), rtol=0, atol=1e-12)
    torch.testing.assert_close(look(sensor, images.mT, where.flip(1)), glimpse.mT, rtol=0, atol=1e-12)
    assert (look(sensor, images.mT, where) - glimpse.mT).abs().max() > 0.1


@pytest.mark.parametrize("size", [3, 4])
@every_form
def test_corners_surround_what_a_patch_sees(form, size):
    shape = (40, 60)
    sensor = Retina(size, scales=3, form=form)
    middle = 24.0 if size == 4 or form == "exact" else 24.5
    where = at(middle + (0.2 if form == "exact" else 0), 20, shape)
    quads = sensor.corners(where, shape)[0]
    for i, quad in enumerate(quads):
        (left, top), (right, _), (_, bottom), (last, _) = quad.round(decimals=6).tolist()
        assert right - left == bottom - top == size * 2**i
        assert last == left
        if form != "exact":
            torch.testing.assert_close(quad.mean(0), quad.new_tensor([middle, 20]))
            continue
        image = torch.zeros(1, 1, *shape).double()
        image[..., int(top) : int(bottom), int(left) : int(right)] = 1
        seen = look(sensor, image, where)[0, :, 0]
        assert (seen[i] == 1).all()
        assert (look(sensor, 1 - image, where)[0, i, 0] == 0).all()


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("shape", [(12, 18), (11, 18), (12, 13), (1, 1)], ids=str)
def test_means_have_zeros_beyond_the_edge(side, shape):
    x = torch.randn(2, 3, *shape).double()
    padded = F.pad(x, (0, -shape[1] % side, 0, -shape[0] % side))
    torch.testing.assert_close(means(x, side), F.avg_pool2d(padded, side), rtol=0, atol=1e-14)


def test_a_pyramid_is_made_once():
    images = torch.randn(2, 1, 60, 50)
    shapes = [level.shape[2:] for level in Retina(12, scales=4).prepare(images) if level.ndim == 4]
    assert shapes == [(60, 50), (30, 25), (15, 13)]
    for k, form in product((1, 2, 3), FORMS):
        prepared = Retina(12, scales=k, form=form).prepare(images)
        assert prepared[0] is images
        assert all(len(each) == 2 for each in prepared)  # images are left out by leaving out rows
        assert sum(each.ndim == 4 for each in prepared) == (2 if k == 3 and form == "pyramid" else 1)
    assert Retina(12, scales=3).prepare(images.bfloat16())[1].dtype == torch.float32


@every_form
def test_images_may_be_left_out_between_looks(form):
    images, where = torch.randn(4, 1, 9, 6), torch.zeros(2, 2)
    sensor, kept = Retina(3, scales=3, form=form), torch.tensor([2, 0])
    few = tuple(each[kept] for each in sensor.prepare(images))
    torch.testing.assert_close(sensor(few, where), look(sensor, images[kept], where))


def test_a_patch_may_be_larger_than_the_image_on_one_side():
    seen = look(Retina(8), torch.ones(1, 1, 6, 20).double(), torch.zeros(1, 2))
    torch.testing.assert_close(seen.sum((2, 3, 4)), seen.new_tensor([[48.0]]))
    seen = look(Retina(8, scales=3), torch.ones(1, 1, 8, 8).double(), torch.zeros(1, 2))
    torch.testing.assert_close(seen.sum((2, 3, 4)), seen.new_tensor([[64.0, 16.0, 4.0]]))
    with pytest.raises(ValueError, match="images must be as high or wide as a patch of 8, got 6 × 7"):
        Retina(8).prepare(torch.ones(1, 1, 6, 7))


def test_refuses_locations_outside():
    where = torch.tensor([[-1.0, 1.0], [0.0, 1.5], [0.0, 0.0]])
    with pytest.raises(ValueError, match=r"where must lie in \[-1, 1\], got \[0\.0, 1\.5\] first, in rows \[1\]"):
        Retina(4).refuse_astray(where)
    assert look(Retina(4), torch.ones(3, 1, 8, 8), where).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size and scales must be at least 1, got 0 and 1"),
        ({"size": 4, "scales": 0}, "size and scales must be at least 1, got 4 and 0"),
        ({"size": 4, "zoom": 1}, "zoom must be at least 2, got 1"),
        ({"size": 4, "form": "fast"}, "form must be pyramid, point or exact, got 'fast'"),
    ],
)
def test_refuses_options_out_of_range(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Retina(**options)
