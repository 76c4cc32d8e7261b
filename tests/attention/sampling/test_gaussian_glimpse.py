import math

import pytest
import torch
from torch import Tensor

from visattn.attention.sampling.gaussian_glimpse import Bank, GaussianGlimpse, plain_bank


def somewhere(m: int = 3) -> Tensor:
    return 0.4 * torch.randn(m, 5, dtype=torch.double)


def bank_in_loops(middle: float, stride: float, variance: float, n: int, side: int, wrong: str = "") -> Tensor:
    """The paper's filters, counted from 1: F[i, a] = exp(-(a - mu_i)^2 / 2 sigma^2) / Z."""
    result = torch.zeros(n, side, dtype=torch.double)
    for i in range(1, n + 1):
        mu = middle + ((i - 1 if wrong == "shift" else i) - n / 2 - 0.5) * stride
        for a in range(1, side + 1):
            exponent = (a - mu) ** 2 / (2 * variance)
            result[i - 1, a - 1] = math.exp(-(((a - mu) / (2 * variance)) ** 2 if wrong == "power" else exponent))
    return result / result.sum(1, keepdim=True)


def banks_in_loops(where: Tensor, n: int, size: tuple[int, int], wrong: str = "") -> tuple[Tensor, Tensor]:
    b, a = size
    x, y, variance, stride, _ = where.tolist()
    delta = (max(a, b) - 1) / (n - 1) * math.exp(stride)
    middles = ((b + 1) / 2 * (y + 1), b), ((a + 1) / 2 * (x + 1), a)
    down, across = (bank_in_loops(m, delta, math.exp(variance), n, side, wrong) for m, side in middles)
    return down, across


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("size", [(9, 9), (7, 12), (12, 7)], ids=str)
def test_filters_are_the_paper_in_loops(n, size):
    where = somewhere()
    down, across = GaussianGlimpse(n).filters(where, size)
    expected = [banks_in_loops(row, n, size) for row in where]
    torch.testing.assert_close((down, across), tuple(map(torch.stack, zip(*expected, strict=True))), rtol=0, atol=1e-12)
    for wrong in ("shift", "power"):  # known mistakes of ports: i counted from 0 alone; the variance squared
        others = torch.stack([banks_in_loops(row, n, size, wrong)[1] for row in where])
        assert (across - others).abs().max() > 0.01


def test_reads_as_the_paper_in_loops():
    images, where = torch.randn(3, 2, 7, 12).double(), somewhere()
    sensor = GaussianGlimpse(4)
    patches = sensor(sensor.prepare(images), where)
    for b in range(3):
        down, across = banks_in_loops(where[b], 4, (7, 12))
        for c in range(2):
            for i in range(4):
                for j in range(4):
                    total = 0.0
                    for y in range(7):
                        for x in range(12):
                            total += (down[i, y] * images[b, c, y, x] * across[j, x]).item()
                    expected = math.exp(where[b, 4].item()) * total
                    assert math.isclose(patches[b, 0, c, i, j].item(), expected, abs_tol=1e-10)


def test_writes_as_the_paper_in_loops():
    patches, where = torch.randn(3, 2, 4, 4).double(), somewhere()
    written = GaussianGlimpse(4).write(patches, where, (7, 12))
    assert written.shape == (3, 2, 7, 12)
    for b in range(3):
        down, across = banks_in_loops(where[b], 4, (7, 12))
        expected = math.exp(-where[b, 4].item()) * (down.mT @ patches[b] @ across)
        torch.testing.assert_close(written[b], expected, rtol=0, atol=1e-10)


def test_writing_is_the_transpose_of_reading():
    images, patches, where = torch.randn(3, 2, 7, 12).double(), torch.randn(3, 2, 4, 4).double(), somewhere()
    sensor = GaussianGlimpse(4)
    read, written = sensor((images,), where)[:, 0], sensor.write(patches, where, (7, 12))
    one, other = ((a * b).sum((1, 2, 3)) for a, b in ((read, patches), (images, written)))
    torch.testing.assert_close(one, other * (2 * where[:, 4]).exp())


def test_a_lattice_of_unit_stride_reaches_over_the_image():
    sensor = GaussianGlimpse(5)
    x, y, stride = sensor.lattice(torch.zeros(1, 5), (9, 9))
    assert (x.item(), y.item(), stride.item()) == (4, 4, 2)
    assert sensor.corners(torch.zeros(1, 5), (9, 9))[0, 0].tolist() == [
        [-0.5, -0.5],
        [9.5, -0.5],
        [9.5, 9.5],
        [-0.5, 9.5],
    ]
    sharp = torch.tensor([[0.0, 0.0, -9.0, 0.0, 0.0]])
    image = torch.randn(1, 1, 9, 9)
    torch.testing.assert_close(sensor((image,), sharp)[0, 0], image[0, :, ::2, ::2])


def test_corners_are_where_the_middle_is():
    where = torch.tensor([[0.5, -0.25, 0.0, math.log(0.2), 0.0]])
    x, y = 41 / 2 * 1.5 - 0.5, 21 / 2 * 0.75 - 0.5  # the paper's, from the corner of the first pixel
    half = 39 / 7 * 0.2 * 8 / 2
    expected = [[x - half, y - half], [x + half, y - half], [x + half, y + half], [x - half, y + half]]
    torch.testing.assert_close(GaussianGlimpse(8).corners(where, (20, 40))[0, 0], torch.tensor(expected))


def test_a_constant_image_reads_as_gamma():
    where = somewhere(4).float()
    patches = GaussianGlimpse(5)((torch.ones(2, 1, 8, 6),), where)
    torch.testing.assert_close(patches, where[:, 4].exp().view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 5, 5))


def test_mirroring_mirrors_and_transposing_needs_the_centre_transposed():
    image, where = torch.randn(2, 1, 7, 12).double(), somewhere(2)
    sensor = GaussianGlimpse(4)
    patch = sensor((image,), where)
    torch.testing.assert_close(sensor((image.flip(3),), where * where.new_tensor([-1, 1, 1, 1, 1])), patch.flip(4))
    torch.testing.assert_close(sensor((image.mT,), where[:, [1, 0, 2, 3, 4]]), patch.mT)
    assert (sensor((image.mT,), where) - patch.mT).abs().max() > 0.01


@pytest.mark.parametrize("variance", [-200.0, -20.0, -6.0, 0.0, 20.0])
@pytest.mark.parametrize("centre", [-30.0, -1.2, 0.0, 0.05, 30.0])
def test_filters_are_finite_and_sum_to_one(centre, variance):
    where = torch.tensor([[centre, 0.3, variance, -0.5, 0.0]], requires_grad=True)
    sensor = GaussianGlimpse(6)
    for bank in sensor.filters(where, (20, 33)):
        torch.testing.assert_close(bank.sum(2), torch.ones(1, 6))
        assert bank[bank > 0].min() > 1e-16  # no number that loses digits, nor products of two
    sensor((torch.rand(1, 1, 20, 33),), where).square().sum().backward()
    assert where.grad.isfinite().all()


def test_filters_outside_read_the_nearest_pixel():
    image = torch.rand(1, 1, 9, 9)
    patch = GaussianGlimpse(2)((image,), torch.tensor([[9.0, -9.0, 0.0, -1.0, 0.0]]))
    torch.testing.assert_close(patch, image[:, :, None, :1, 8:].expand(1, 1, 1, 2, 2))


def test_what_is_left_out_does_not_matter():
    where = somewhere(16).float()
    for ours, wide in zip(*(GaussianGlimpse(12).filters(w, (60, 50)) for w in (where, where.double())), strict=True):
        torch.testing.assert_close(ours.double(), wide, rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", [1, 7])
def test_gradients_of_filters_are_those_of_plain_operations(side):
    centres = (4 * torch.randn(2, 3, dtype=torch.double)).requires_grad_()
    sharpness = torch.rand(2, 1, 1, dtype=torch.double).add_(0.1).requires_grad_()
    ours, plain = Bank.apply(centres, sharpness, side), plain_bank(centres, sharpness, side)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)
    g = torch.randn_like(ours)
    both = (torch.autograd.grad(each, (centres, sharpness), g) for each in (ours, plain))
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: Bank.apply(*x, side), (centres, sharpness))
    assert torch.autograd.gradgradcheck(lambda *x: Bank.apply(*x, side), (centres, sharpness))


def test_gradients_of_writing_are_correct():
    patches = torch.randn(2, 2, 3, 3, dtype=torch.double, requires_grad=True)
    where = somewhere(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, w: GaussianGlimpse(3).write(p, w, (5, 6)), (patches, where))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_patches_are_written_widely(dtype):
    patches, where = torch.rand(2, 3, 4, 4).to(dtype), somewhere(2).float()
    sensor = GaussianGlimpse(4)
    written = sensor.write(patches, where, (20, 30))
    assert written.dtype == dtype
    expected = sensor.write(patches.double(), where.double(), (20, 30)).to(dtype)
    torch.testing.assert_close(written, expected, rtol=1e-2, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sensor.write(patches, where, (20, 30)), written)


def test_refuses_a_single_filter():
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        GaussianGlimpse(1)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("value", [-1e30, -200.0, 45.0, 200.0, 1e20, 3e38])
def test_finite_numbers_give_finite_filters(number, value):
    where = torch.zeros(1, 5)
    where[0, number] = value
    where.requires_grad_()
    for filters in GaussianGlimpse(5).filters(where, (9, 14)):
        assert filters.isfinite().all()
        torch.testing.assert_close(filters.sum(2), torch.ones(1, 5))
        (gradient,) = torch.autograd.grad(filters[..., :3].sum(), where, retain_graph=True)
        assert gradient.isfinite().all()


def test_filters_far_outside_read_the_nearest_pixel():
    where = torch.tensor([[1e9, -1e9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 60.0, 0.0]])
    down, across = GaussianGlimpse(4).filters(where, (9, 14))
    assert torch.equal(across[0, :, -1], torch.ones(4))
    assert torch.equal(down[0, :, 0], torch.ones(4))
    assert torch.equal(across[1, :2, 0], torch.ones(2))
    assert torch.equal(across[1, 2:, -1], torch.ones(2))
