"""What all glimpse sensors have in common."""

import math

import pytest
import torch
from torch import Tensor, nn

from visattn.attention.sampling.affine_glimpse import AffineGlimpse
from visattn.attention.sampling.gaussian_glimpse import GaussianGlimpse
from visattn.attention.sampling.glimpses import Sensor, pixels
from visattn.attention.sampling.retina import Retina


def sensors() -> list[Sensor]:
    retinas = [Retina(3, scales=3, form=form) for form in ("pyramid", "point", "exact")]
    return [*retinas, Retina(2), GaussianGlimpse(4), AffineGlimpse(4), AffineGlimpse(3, points=2)]


def few() -> list[Sensor]:
    return [Retina(3, scales=3), Retina(3, scales=2, form="exact"), GaussianGlimpse(4), AffineGlimpse(3, points=2)]


every_sensor = pytest.mark.parametrize("sensor", sensors(), ids=lambda sensor: str(sensor).replace("\n", ""))
some_sensors = pytest.mark.parametrize("sensor", few(), ids=lambda sensor: type(sensor).__name__)


def anywhere(sensor: Sensor, m: int = 2, dtype: torch.dtype = torch.double) -> Tensor:
    """Rows that say where to look, none of them at the centre."""
    noise = 0.2 * torch.randn(m, sensor.number, dtype=dtype)
    if isinstance(sensor, AffineGlimpse):
        return sensor.transform.crop(0.5, 0.1, -0.2).to(dtype) + noise
    return noise.clamp(-0.9, 0.9)


def look(sensor: Sensor, images: Tensor, where: Tensor) -> Tensor:
    return sensor(sensor.prepare(images), where)


@every_sensor
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("b", [0, 1, 2])
def test_a_glimpse_has_its_shape(sensor, b, c):
    images = torch.rand(b, c, 7, 5, requires_grad=True)
    where = anywhere(sensor, b, torch.float32)
    glimpse = look(sensor, images, where)
    assert glimpse.shape == (b, sensor.scales, c, sensor.size, sensor.size)
    glimpse.square().sum().backward()
    assert images.grad.isfinite().all()
    assert sensor.corners(where, (7, 5)).shape == (b, sensor.scales, 4, 2)
    assert list(sensor.state_dict()) == []


@every_sensor
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_rollouts_are_images_repeated(sensor, r, c):
    images, where = torch.randn(3, c, 9, 6), anywhere(sensor, 3 * r, torch.float32)
    repeated = look(sensor, images.repeat_interleave(r, 0), where)
    torch.testing.assert_close(look(sensor, images, where), repeated, rtol=0, atol=1e-5)
    if r > 1:  # another order is not the same
        assert (look(sensor, images.roll(1, 0), where) - repeated).abs().max() > 0.01


@every_sensor
def test_images_do_not_mix(sensor):
    images, where = torch.randn(2, 2, 9, 6, requires_grad=True), anywhere(sensor, 2, torch.float32)
    (gradient,) = torch.autograd.grad(look(sensor, images, where)[0].sum(), images)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0


@every_sensor
def test_is_linear_in_the_images(sensor):
    first, second, where = *torch.randn(2, 2, 1, 9, 6).double(), anywhere(sensor)
    both = look(sensor, 2 * first - 3 * second, where)
    parts = 2 * look(sensor, first, where) - 3 * look(sensor, second, where)
    torch.testing.assert_close(both, parts, rtol=0, atol=1e-12)


@every_sensor
def test_gradient_is_correct(sensor):
    images = torch.randn(2, 2, 5, 6, dtype=torch.double, requires_grad=True)
    where = anywhere(sensor, 4).requires_grad_(getattr(sensor, "form", None) != "exact")
    assert torch.autograd.gradcheck(lambda *inputs: look(sensor, *inputs), (images, where))


def test_exact_crops_give_locations_no_gradient():
    where = torch.zeros(1, 2, requires_grad=True)
    assert not look(Retina(2, scales=2, form="exact"), torch.rand(1, 1, 4, 4), where).requires_grad


@every_sensor
def test_no_input_is_written_to(sensor):
    images, where = torch.randn(2, 1, 8, 8), anywhere(sensor, 2, torch.float32)
    before = images.clone(), where.clone()
    look(sensor, images, where)
    assert torch.equal(images, before[0])
    assert torch.equal(where, before[1])


@every_sensor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_images_are_looked_at_widely(sensor, dtype):
    images, where = torch.rand(2, 3, 40, 30).to(dtype), anywhere(sensor, 2, torch.float32)
    glimpse = look(sensor, images, where)
    assert glimpse.dtype == dtype
    torch.testing.assert_close(glimpse, look(sensor, images.double(), where.double()).to(dtype), rtol=1e-2, atol=1e-3)
    assert look(sensor, images.float(), where.to(dtype)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(look(sensor, images, where), glimpse)
        assert torch.equal(sensor.corners(where, (40, 30)), sensor.corners(where.clone(), (40, 30)).float())


@every_sensor
def test_refuses_another_number_of_numbers(sensor, unchecked):
    with pytest.raises(ValueError, match=f"where must be {sensor.number} numbers for a glimpse, got 9"):
        look(sensor, torch.rand(2, 1, 8, 8), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=f"where must be {sensor.number} numbers for a glimpse, got 9"):
        sensor.refuse_astray(torch.zeros(2, 9))


@every_sensor
@pytest.mark.parametrize("m", [0, 2, 4])
def test_refuses_rollouts_that_do_not_divide(sensor, m):
    with pytest.raises(ValueError, match=f"where must have equally many rows for each of 3 images, got {m}"):
        look(sensor, torch.rand(3, 1, 8, 8), torch.zeros(m, sensor.number))


@every_sensor
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite(sensor, wrong):
    where = anywhere(sensor, 4, torch.float32)
    sensor.refuse_astray(where)
    where[1, 0] = where[3, 1] = wrong
    assert sensor.astray(where).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=rf"where must .*, got \[{wrong}, .*\] first, in rows \[1, 3\]"):
        sensor.refuse_astray(where)


class Roll(nn.Module):
    """Prepares images, and looks twice."""

    def __init__(self, sensor: Sensor):
        super().__init__()
        self.sensor = sensor

    def forward(self, images: Tensor, where: Tensor) -> Tensor:
        prepared = self.sensor.prepare(images)
        return self.sensor(prepared, where) + self.sensor(prepared, 0.5 * where)


@some_sensors
def test_compiles_without_a_break(sensor, unchecked):
    roll, images = Roll(sensor), torch.randn(2, 1, 9, 7)
    where = anywhere(sensor, 6, torch.float32)
    compiled = torch.compile(roll, backend="aot_eager", fullgraph=True)
    results = []
    for call in (roll, compiled):
        x, p = images.clone().requires_grad_(), where.clone().requires_grad_()
        y = call(x, p)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, p), allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@some_sensors
def test_exports(sensor, unchecked):
    batch, height, width = (torch.export.Dim(name, min=4, max=64) for name in ("batch", "height", "width"))
    shapes = {"images": {0: batch, 2: height, 3: width}, "where": {0: batch}}
    example = torch.randn(5, 1, 9, 7), anywhere(sensor, 5, torch.float32)
    program = torch.export.export(Roll(sensor), example, dynamic_shapes=shapes, strict=False)
    other = torch.randn(6, 1, 8, 12), anywhere(sensor, 6, torch.float32)
    torch.testing.assert_close(program.module()(*other), Roll(sensor)(*other), rtol=1e-4, atol=1e-5)


def test_pixels_of_the_corners_of_an_image():
    points = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [0.0, 1.0]])
    assert pixels(points, (20, 50)).tolist() == [[0, 0], [50, 0], [25, 20]]
