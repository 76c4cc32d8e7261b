import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from visattn.attention.sampling.grids import identity
from visattn.attention.sampling.warp import gather, normalised, oversampling, sample

SIZES = [(1, 1), (1, 5), (4, 1), (5, 7), (28, 28), (32, 100)]
either_padding = pytest.mark.parametrize("padding", ["zeros", "border"])


def image_and_grid(size: tuple[int, int] = (5, 7), output: tuple[int, int] = (4, 6), b: int = 2, c: int = 3):
    """A grid that leaves the image here and there, in double precision."""
    image = torch.randn(b, c, *size, dtype=torch.double, requires_grad=True)
    grid = (1.3 * identity(output, dtype=torch.double) + 0.2 * torch.randn(b, *output, 2, dtype=torch.double)).detach()
    return image, grid.requires_grad_()


def paper(image: Tensor, grid: Tensor) -> Tensor:
    """Equation 5 in loops: V = Σ U max(0, 1 - |x - m|) max(0, 1 - |y - n|)."""
    b, c, h, w = image.shape
    result = image.new_zeros(b, c, *grid.shape[1:3])
    for k in range(b):
        for i in range(grid.shape[1]):
            for j in range(grid.shape[2]):
                x, y = (((grid[k, i, j, a].item() + 1) * side - 1) / 2 for a, side in ((0, w), (1, h)))
                for n in range(h):
                    for m in range(w):
                        weight = max(0, 1 - abs(x - m)) * max(0, 1 - abs(y - n))
                        result[k, :, i, j] += weight * image[k, :, n, m]
    return result


@pytest.mark.parametrize("form", [sample, gather])
def test_is_the_paper_in_loops(form):
    image, grid = image_and_grid()
    torch.testing.assert_close(form(image, grid), paper(image, grid), rtol=0, atol=1e-12)


@either_padding
@pytest.mark.parametrize("form", [sample, gather])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_identity_in_identity_out(form, size, padding):
    image = torch.randn(2, 3, *size, dtype=torch.double)
    grid = identity(size, dtype=torch.double).expand(2, -1, -1, -1)
    torch.testing.assert_close(form(image, grid, padding=padding), image, rtol=0, atol=1e-12)


def test_the_other_convention_is_no_identity():
    image = torch.rand(1, 1, 28, 28)
    wrong = F.grid_sample(image, identity((28, 28)), align_corners=True)
    assert (wrong - image).abs().max() > 0.2
    torch.testing.assert_close(sample(image, identity((28, 28))), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("output", SIZES, ids=str)
def test_identity_of_another_size_resizes(output):
    image = torch.randn(2, 3, 6, 9, dtype=torch.double)
    grid = identity(output, dtype=torch.double).expand(2, -1, -1, -1)
    resized = F.interpolate(image, output, mode="bilinear", align_corners=False)
    torch.testing.assert_close(sample(image, grid, padding="border"), resized, rtol=0, atol=1e-12)


@either_padding
def test_gather_equals_the_library(padding):
    inputs = image_and_grid((9, 6), (7, 8))
    ours = gather(*inputs, padding=padding)
    theirs = F.grid_sample(*inputs, padding_mode=padding, align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    g = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@either_padding
def test_gradients_are_correct(padding):
    inputs = image_and_grid((3, 4), (3, 2), c=2)
    assert torch.autograd.gradcheck(lambda *x: sample(*x, padding=padding), inputs)
    assert torch.autograd.gradcheck(lambda *x: gather(*x, padding=padding), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *x: gather(*x, padding=padding), inputs)


class Calls(TorchDispatchMode):
    """Remembers which operations ran."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_gathers_where_the_library_is_not_deterministic(device, deterministic):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with FakeTensorMode(), Calls() as calls:
            y = sample(torch.empty(2, 1, 4, 5, device=device), torch.empty(2, 3, 3, 2, device=device))
    finally:
        torch.use_deterministic_algorithms(before)
    assert y.shape == (2, 1, 3, 3)
    assert ("aten.gather.default" in calls.names) == (device == "cuda" and deterministic)


def test_fills_what_lies_outside():
    image, grid = image_and_grid()
    fill = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.double)
    inside = sample(torch.ones_like(image), grid)
    expected = sample(image, grid) + fill[:, None, None] * (1 - inside)
    torch.testing.assert_close(sample(image, grid, fill=fill), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sample(image, grid, fill=0.5)[:, 1], expected[:, 1], rtol=0, atol=1e-12)


def test_black_stays_black_behind_a_normalisation():
    pixels, grid = image_and_grid(c=2)
    mean, std = (0.5, 0.4), (0.25, 0.2)
    tensors = [torch.tensor(each)[:, None, None] for each in (mean, std)]
    before = (sample(pixels, grid) - tensors[0]) / tensors[1]
    after = sample((pixels - tensors[0]) / tensors[1], grid, fill=normalised(0.0, mean, std))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert (sample((pixels - tensors[0]) / tensors[1], grid) - before).abs().max() > 0.5


@pytest.mark.parametrize("pool", [2, (2, 3)], ids=str)
def test_averages_over_the_points_of_a_pixel(pool):
    image = torch.randn(2, 3, 6, 12, dtype=torch.double)
    y = sample(image, identity((6, 12), dtype=torch.double).expand(2, -1, -1, -1), pool=pool, fill=0.3)
    torch.testing.assert_close(y, F.avg_pool2d(image, pool), rtol=0, atol=1e-12)


def test_a_smaller_output_has_no_aliases():
    stripes = torch.arange(64.0).remainder(2).expand(1, 1, 64, 64).contiguous()  # the mean of what is seen is a half
    down, across = oversampling((64, 64), (24, 24))
    smooth = sample(stripes, identity((24 * down, 24 * across)), pool=(down, across), padding="border")
    rough = sample(stripes, identity((24, 24)), padding="border")
    assert (smooth - 0.5).abs().max() < 0.2
    assert (rough - 0.5).abs().max() > 0.3


@pytest.mark.parametrize(
    ("before", "after", "factor"),
    [((28, 28), (28, 28), (1, 1)), ((28, 28), (60, 20), (1, 2)), ((9, 8), (3, 3), (3, 3))],
)
def test_oversamples_down_only(before, after, factor):
    assert oversampling(before, after) == factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coordinates_are_not_rounded_with_the_image(dtype):
    image, grid = (x.detach() for x in image_and_grid((64, 64), (64, 64)))
    y = sample(image.to(dtype), grid.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y, sample(image.to(dtype).double(), grid).to(dtype), rtol=1e-2, atol=1e-3)
    rounded = sample(image.to(dtype), grid.to(dtype)).double() - y.double()
    assert rounded.abs().max() > 5 * (y.double() - sample(image, grid)).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert sample(image.float(), grid.float()).dtype == torch.float32


@pytest.mark.parametrize("form", [sample, gather])
def test_a_batch_may_be_empty(form):
    image, grid = image_and_grid(b=0)
    y = form(image, grid)
    y.sum().backward()
    assert y.shape == (0, 3, 4, 6)
    assert image.grad.shape == image.shape


def test_mirroring_the_image_mirrors_the_result_and_transposing_it_does_not_commute():
    image, grid = image_and_grid()
    mirrored = sample(image.flip(3), grid * grid.new_tensor([-1, 1]))
    torch.testing.assert_close(mirrored, sample(image, grid), rtol=0, atol=1e-12)
    assert (sample(image.mT, grid) - sample(image, grid)).abs().max() > 0.1


def test_refuses_a_fill_behind_a_border():
    image, grid = image_and_grid()
    with pytest.raises(ValueError, match=r"fill must be None where padding is 'border', got 0\.5"):
        sample(image, grid, padding="border", fill=0.5)


@pytest.mark.parametrize("pool", [0, 3, (2, 4)], ids=str)
def test_refuses_a_pool_that_does_not_divide_the_grid(pool):
    image, grid = image_and_grid(output=(4, 6))
    with pytest.raises(ValueError, match=r"pool must divide the height and width of the grid, \(4, 6\), got"):
        sample(image, grid, pool=pool)


def test_normalised_value():
    assert math.isclose(normalised(0.5, (0.25,), (0.5,)).item(), 0.5)
