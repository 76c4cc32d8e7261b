import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.sampling.grids import identity
from visattn.attention.sampling.thin_plate import ThinPlate, lattice
from visattn.attention.sampling.transforms import (
    HORIZON,
    Affine,
    Composed,
    Isotropic,
    Matrix,
    Projective,
    Similarity,
    Transform,
)
from visattn.attention.sampling.warp import sample

SIZES = [(1, 1), (1, 5), (4, 1), (5, 7), (28, 28), (32, 100)]


def matrices() -> list[Matrix]:
    return [Isotropic(), Isotropic(scale=1.0), Similarity(), Affine(), Projective()]


def transforms() -> list[Transform]:
    plate = ThinPlate(lattice(3, 4), size=(5, 7)).double()
    learned = ThinPlate(lattice(3, 4, span=0.9), learned=True).double()
    return [*matrices(), plate, learned, Composed(Affine(), plate), Composed(Projective(), Similarity())]


every_matrix = pytest.mark.parametrize("transform", matrices(), ids=repr)
every_transform = pytest.mark.parametrize("transform", transforms(), ids=repr)


def near(transform: Transform, b: int = 2, by: float = 0.1) -> Tensor:
    return transform.identity.double() + by * torch.randn(b, transform.number, dtype=torch.double)


@every_transform
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_identity_in_identity_out(transform, size, padding):
    parameters = transform.identity.double().expand(2, -1)
    grid = transform(parameters, size)
    torch.testing.assert_close(grid, identity(size, dtype=torch.double).expand(2, *size, 2), rtol=0, atol=1e-12)
    image = torch.randn(2, 3, *size, dtype=torch.double)
    torch.testing.assert_close(sample(image, grid, padding=padding), image, rtol=0, atol=1e-10)


@every_transform
@pytest.mark.parametrize("size", [(5, 7), (3, 4)], ids=str)
def test_pixels_are_taken_as_any_points_are(transform, size):
    parameters = near(transform)
    points = identity(size, dtype=torch.double).flatten(1, 2).expand(2, -1, -1)
    expected = transform.points(parameters, points).unflatten(1, size)
    torch.testing.assert_close(transform(parameters, size), expected, rtol=0, atol=1e-12)


def in_loops(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Every pixel by itself, multiplied by its image's matrix and divided."""
    grid = matrix.new_empty(len(matrix), *size, 2)
    for b in range(len(matrix)):
        for i in range(size[0]):
            for j in range(size[1]):
                q = matrix.new_tensor([(2 * j + 1) / size[1] - 1, (2 * i + 1) / size[0] - 1, 1])
                x, y, depth = matrix[b] @ q
                grid[b, i, j] = torch.stack((x, y)) / depth
    return grid


def square(transform: Matrix, parameters: Tensor) -> Tensor:
    """The matrices (b, 3, 3) as the docstrings give them."""
    b, one, zero = len(parameters), torch.ones_like(parameters[:, 0]), torch.zeros_like(parameters[:, 0])
    last = [zero, zero, one]
    if isinstance(transform, Isotropic):
        s = parameters[:, 0] if transform.scale is None else one * transform.scale
        rows = [s, zero, parameters[:, -2], zero, s, parameters[:, -1], *last]
    elif isinstance(transform, Similarity):
        p, q, x, y = parameters.unbind(1)
        rows = [p, -q, x, q, p, y, *last]
    elif isinstance(transform, Affine):
        rows = [*parameters.unbind(1), *last]
    else:
        rows = [*parameters.unbind(1), one]
    return torch.stack(rows, 1).view(b, 3, 3)


@pytest.mark.parametrize("transform", [*matrices(), Isotropic(scale=0.5)], ids=repr)
def test_is_its_matrix_in_loops(transform):
    parameters = near(transform)
    expected = in_loops(square(transform, parameters), (4, 6))
    torch.testing.assert_close(transform(parameters, (4, 6)), expected, rtol=0, atol=1e-12)


def test_affine_is_the_library():
    parameters = near(Affine(), 3)
    theirs = F.affine_grid(parameters.view(3, 2, 3), [3, 1, 5, 7], align_corners=False)
    torch.testing.assert_close(Affine()(parameters, (5, 7)), theirs, rtol=0, atol=1e-14)


@every_matrix
def test_composition_is_one_after_the_other(transform):
    first, second = near(transform), near(transform)
    composed = transform.compose(first, second)
    assert composed.shape == first.shape
    expected = transform.points(first, transform(second, (5, 7)).flatten(1, 2)).unflatten(1, (5, 7))
    torch.testing.assert_close(transform(composed, (5, 7)), expected, rtol=0, atol=1e-12)
    if transform.number > 2:  # shifts alone commute
        assert (transform.compose(second, first) - composed).abs().max() > 1e-3


@pytest.mark.parametrize("transform", [*matrices(), ThinPlate(lattice(3, 4)).double()], ids=repr)
def test_composition_with_the_identity_changes_nothing(transform):
    parameters, nothing = near(transform), transform.identity.double().expand(2, -1)
    torch.testing.assert_close(transform.compose(parameters, nothing), parameters, rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.compose(nothing, parameters), parameters, rtol=0, atol=1e-12)


def test_warping_twice_is_warping_by_the_composition():
    quadrant = Isotropic(scale=None)
    image = torch.randn(1, 1, 8, 8, dtype=torch.double)
    first = torch.tensor([[0.5, 0.5, -0.5]], dtype=torch.double)  # the upper right quarter
    second = torch.tensor([[0.5, -0.5, 0.5]], dtype=torch.double)  # of it, the lower left
    once = sample(image, quadrant(quadrant.compose(first, second), (2, 2)))
    twice = sample(sample(image, quadrant(first, (4, 4))), quadrant(second, (2, 2)))
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-12)
    torch.testing.assert_close(once, image[:, :, 2:4, 4:6], rtol=0, atol=1e-12)


def test_two_kinds_are_composed():
    plate = ThinPlate(lattice(3, 3), size=(5, 7)).double()
    affine, both = Affine(), Composed(Affine(), plate)
    how, bend = near(affine), near(plate)
    moved = affine.points(how, bend.unflatten(1, (9, 2))).flatten(1)  # a plate follows its points
    ours = both(torch.cat((how, bend), 1), (5, 7))
    torch.testing.assert_close(ours, plate(moved, (5, 7)), rtol=0, atol=1e-12)
    assert both.number == 24
    assert list(both.state_dict()) == []


@pytest.mark.parametrize(
    "transform", [Isotropic(scale=0.5), Composed(Affine(), ThinPlate(lattice(2, 2)))], ids=["Isotropic", "Composed"]
)
def test_refuses_to_compose_what_is_something_else_then(transform):
    parameters = transform.identity.expand(2, -1)
    with pytest.raises(ValueError, match="is not closed under composition"):
        transform.compose(parameters, parameters)


def turned(angle: float) -> list[tuple[Matrix, Tensor]]:
    c, s = math.cos(angle), math.sin(angle)
    entries = {Similarity: [c, s, 0, 0], Affine: [c, -s, 0, s, c, 0], Projective: [c, -s, 0, s, c, 0, 0, 0]}
    return [(cls(), torch.tensor([row], dtype=torch.double)) for cls, row in entries.items()]


@pytest.mark.parametrize(("transform", "parameters"), turned(math.pi / 2), ids=lambda x: type(x).__name__)
def test_a_quarter_turn_is_that_of_the_library(transform, parameters):
    image = torch.randn(1, 2, 6, 6, dtype=torch.double)
    y = sample(image, transform(parameters, (6, 6)))
    torch.testing.assert_close(y, image.rot90(1, (2, 3)), rtol=0, atol=1e-12)
    assert (y - image.rot90(-1, (2, 3))).abs().max() > 0.5


@every_transform
def test_gradient_is_correct(transform):
    parameters = near(transform, by=0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: transform(p, (3, 2)), parameters)
    points = torch.randn(2, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(transform.points, (parameters, 0.3 * points))


@every_transform
def test_a_batch_may_be_empty_or_of_one(transform):
    for b in (0, 1):
        parameters = near(transform, b).requires_grad_()
        grid = transform(parameters, (5, 7))
        grid.sum().backward()
        assert grid.shape == (b, 5, 7, 2)
        assert parameters.grad.isfinite().all()
        assert transform.points(parameters, torch.rand(b, 3, 2)).shape == (b, 3, 2)


@every_transform
def test_coordinates_stay_wide(transform):
    parameters = near(transform).to(torch.bfloat16)
    grid = transform(parameters, (5, 7))
    assert grid.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(parameters, (5, 7)), grid)
        points = transform.points(parameters, torch.full((2, 1, 2), 0.3))
    assert torch.equal(points, transform.points(parameters, torch.full((2, 1, 2), 0.3)))
    expected = transform(parameters.double(), (5, 7)).float()
    torch.testing.assert_close(grid, expected, rtol=1e-5, atol=1e-5)


@every_transform
def test_refuses_another_number_of_parameters(transform):
    with pytest.raises(ValueError, match=f"parameters must be {transform.number} for an image, got 99"):
        transform(torch.zeros(2, 99), (5, 7))


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_refuses_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match=f"scale must be positive, got {scale}"):
        Isotropic(scale=scale)


def test_what_lies_behind_the_horizon_is_far_away():
    homography = Projective()
    parameters = torch.tensor([[1.0, 0, 0, 0, 1, 0, 4, 0]], requires_grad=True)  # divides by 4 x + 1
    grid = homography(parameters, (4, 8))
    x = identity((4, 8))[0, ..., 0]
    behind = 4 * x + 1 < HORIZON
    assert behind.any()
    assert (grid[0][behind].abs().amax(-1) > 100).all()
    assert grid[0][~behind].abs().max() < 8
    y = sample(torch.ones(1, 1, 4, 8), grid)
    assert (y[0, 0][behind] == 0).all()
    y.sum().backward()
    assert parameters.grad.isfinite().all()


def test_a_composition_beyond_the_horizon_is_finite():
    homography = Projective()
    tilted = torch.tensor([[1.0, 0, 0, 0, 1, 0, 1, 0]])
    shifted = torch.tensor([[1.0, 0, -1, 0, 1, 0, 0, 0]])
    assert homography.compose(tilted, shifted).isfinite().all()  # the last entry of the product is zero


@every_matrix
def test_determinant(transform):
    parameters = near(transform)
    expected = torch.linalg.det(square(transform, parameters))
    torch.testing.assert_close(transform.determinant(parameters), expected)
    assert not transform.singular(parameters).any()
    transform.refuse_singular(parameters)


def test_refuses_a_singular_homography():
    homography = Projective()
    parameters = homography.identity.repeat(4, 1)
    parameters[1, 3:5] = 2 * parameters[1, :2]  # a row twice the other
    parameters[3, 0] = math.nan
    assert homography.singular(parameters).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"must not be those of a singular matrix, got such for images \[1, 3\]"):
        homography.refuse_singular(parameters)
    assert homography(parameters[:3], (4, 4)).isfinite().all()


class Warp(nn.Module):
    """What a spatial transformer does with an image and parameters."""

    def __init__(self, transform: Transform, size: tuple[int, int] | None):
        super().__init__()
        self.transform, self.size = transform, size

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        size = self.size or (x.shape[2], x.shape[3])
        return sample(x, self.transform(parameters, size), fill=0.1)


def warps() -> list[Warp]:
    plate = ThinPlate(lattice(2, 3), size=(4, 6))
    found = [Warp(plate, (4, 6)), Warp(ThinPlate(lattice(2, 3), learned=True), (4, 6))]
    return [*found, Warp(Isotropic(), None), Warp(Affine(), None), Warp(Projective(), None)]


every_warp = pytest.mark.parametrize("warp", warps(), ids=lambda warp: repr(warp.transform))


@every_warp
def test_compiles_without_a_break(warp, unchecked):
    x, parameters = torch.randn(2, 1, 5, 7), near(warp.transform).float()
    compiled = torch.compile(warp, backend="aot_eager", fullgraph=True)
    results = []
    for call in (warp, compiled):
        p = parameters.clone().requires_grad_()
        y = call(x, p)
        results.append((y, *torch.autograd.grad(y.square().sum(), p)))
    torch.testing.assert_close(*results)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, parameters), results[0][0])


@every_warp
def test_exports(warp, unchecked):
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    shapes = {"x": {0: batch, 2: height, 3: width}, "parameters": {0: batch}}
    example = torch.randn(3, 1, 5, 7), near(warp.transform, 3).float()
    program = torch.export.export(warp, example, dynamic_shapes=shapes, strict=False)
    other = torch.randn(4, 1, 9, 6), near(warp.transform, 4).float()
    torch.testing.assert_close(program.module()(*other), warp(*other))
