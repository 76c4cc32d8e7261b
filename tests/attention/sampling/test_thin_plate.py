import copy
import io
import math

import pytest
import torch
from scipy.interpolate import RBFInterpolator
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.sampling.grids import centres, folded
from visattn.attention.sampling.thin_plate import ThinPlate, coefficients, interpolation, lattice
from visattn.attention.sampling.warp import sample

SCATTERED = torch.tensor([[-0.9, -0.8], [0.7, -1.0], [0.1, 0.2], [-0.5, 0.9], [1.1, 0.6]], dtype=torch.double)
CONTROLS = [lattice(2, 2), lattice(4, 4), lattice(5, 3, span=0.9), lattice(2, 10), SCATTERED]
SIZE = (6, 9)
every_control = pytest.mark.parametrize("control", CONTROLS, ids=lambda c: f"{len(c)}")


def queries(size: tuple[int, int] = SIZE) -> Tensor:
    return centres(size, dtype=torch.double)[:2].mT


def moved(control: Tensor, by: float = 0.2, b: int = 2) -> Tensor:
    return control + by * torch.randn(b, *control.shape, dtype=torch.double)


def grid(plate: ThinPlate, ends: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    return plate(ends.flatten(1), size)


@every_control
@pytest.mark.parametrize("regularisation", [0.0, 0.3])
def test_is_the_spline_of_scipy(control, regularisation):
    ends = moved(control)
    plate = ThinPlate(control, size=SIZE, regularisation=regularisation).double()
    points = torch.rand(2, 50, 2, dtype=torch.double) * 3 - 1.5
    ours, anywhere = grid(plate, ends), plate.points(ends.flatten(1), points)
    for b in range(2):
        spline = RBFInterpolator(control, ends[b], kernel="thin_plate_spline", smoothing=regularisation)
        expected = torch.from_numpy(spline(queries())).unflatten(0, SIZE)
        torch.testing.assert_close(ours[b], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(anywhere[b], torch.from_numpy(spline(points[b])), rtol=0, atol=1e-10)


def test_is_bookstein_in_loops():
    control, ends = SCATTERED, moved(SCATTERED, b=1)[0]
    n = len(control)

    def u(p: Tensor, q: Tensor) -> float:
        r = math.dist(p.tolist(), q.tolist())
        return r * r * math.log(r) if r else 0.0

    matrix = torch.zeros(n + 3, n + 3, dtype=torch.double)
    for i in range(n):
        for j in range(n):
            matrix[i, j] = u(control[i], control[j])
        matrix[i, n:] = matrix[n:, i] = torch.stack((torch.ones(()), *control[i]))
    bend = torch.linalg.inv(matrix) @ F.pad(ends, (0, 0, 0, 3))
    points = queries()
    expected = torch.stack(
        [sum((u(q, control[i]) * bend[i] for i in range(n)), bend[n] + q @ bend[n + 1 :]) for q in points]
    )
    plate = ThinPlate(control, size=SIZE).double()
    torch.testing.assert_close(grid(plate, ends[None])[0].flatten(0, 1), expected, rtol=0, atol=1e-10)
    for i in range(n):
        for j in range(n):
            matrix[i, j] = u(ends[i], control[j])  # the mistake of another library
    wrong = torch.linalg.solve(matrix, F.pad(ends, (0, 0, 0, 3)))
    q = points[4]
    there = sum((u(q, ends[i]) * wrong[i] for i in range(n)), wrong[n] + q @ wrong[n + 1 :])
    assert (there - expected[4]).abs().max() > 0.01


@every_control
def test_goes_through_its_points(control):
    matrix = interpolation(control, control)
    torch.testing.assert_close(matrix, torch.eye(len(control), dtype=torch.double), rtol=0, atol=1e-12)
    plate, ends, at = ThinPlate(control), moved(control), control.expand(2, -1, -1)
    single = plate.points(ends.flatten(1).float(), at.float())
    assert (single - ends).abs().max() < 1e-6 * coefficients(control).abs().max()  # of the largest term of the sum
    torch.testing.assert_close(plate.double().points(ends.flatten(1), at), ends, rtol=0, atol=1e-11)


@every_control
def test_still_points_leave_all_still(control):
    torch.testing.assert_close(interpolation(queries(), control) @ control, queries(), rtol=0, atol=1e-12)


@every_control
@pytest.mark.parametrize("regularisation", [0.0, 10.0])
def test_is_equivariant_to_shifts(control, regularisation):
    rows = interpolation(queries(), control, regularisation).sum(1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-11)


@every_control
def test_reproduces_affine_maps_without_bending(control):
    matrix, shift = torch.randn(2, 2, dtype=torch.double), torch.randn(2, dtype=torch.double)
    ends = control @ matrix + shift
    plate = ThinPlate(control, size=SIZE).double()
    ours = grid(plate, ends[None])[0].flatten(0, 1)
    torch.testing.assert_close(ours, queries() @ matrix + shift, rtol=0, atol=1e-11)
    bend = coefficients(control) @ ends
    assert bend[: len(control)].abs().max() < 1e-11
    torch.testing.assert_close(bend[len(control) :], torch.cat((shift[None], matrix)), rtol=0, atol=1e-11)


@every_control
def test_bends_without_a_net_force(control):
    forces = (coefficients(control) @ moved(control, b=1)[0])[: len(control)]
    assert forces.abs().max() > 1e-3 or len(control) < 4
    assert forces.sum(0).abs().max() < 1e-10
    assert (control.mT @ forces).abs().max() < 1e-10


def test_a_stiff_plate_is_the_affine_map_of_least_squares():
    control = lattice(4, 4)
    ends = moved(control, b=1)[0]
    sides = F.pad(control, (0, 1), value=1)
    expected = F.pad(queries(), (0, 1), value=1) @ torch.linalg.lstsq(sides, ends).solution
    stiff = interpolation(queries(), control, 1e7) @ ends
    torch.testing.assert_close(stiff, expected, rtol=0, atol=1e-6)
    assert (interpolation(queries(), control) @ ends - expected).abs().max() > 0.05


def test_turning_the_points_turns_the_image():
    control, image = lattice(4, 4), torch.randn(1, 2, 8, 8, dtype=torch.double)
    plate = ThinPlate(control, size=(8, 8)).double()
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.double)
    y = sample(image, grid(plate, (control @ quarter)[None], (8, 8)))
    torch.testing.assert_close(y, image.rot90(1, (2, 3)), rtol=0, atol=1e-11)


def test_order_of_the_points_does_not_matter_and_their_places_do():
    control, order = lattice(3, 4), torch.randperm(12)
    ends = moved(control)
    ours = grid(ThinPlate(control, size=SIZE).double(), ends)
    shuffled = ThinPlate(control[order], size=SIZE).double()
    torch.testing.assert_close(grid(shuffled, ends[:, order]), ours, rtol=0, atol=1e-12)
    assert (grid(shuffled, ends) - ours).abs().max() > 0.1


@pytest.mark.parametrize("regularisation", [0.0, 0.2])
def test_gradient_reaches_points_that_are_learned(regularisation):
    plate = ThinPlate(lattice(2, 3, span=0.8), regularisation=regularisation, learned=True).double()
    ends = moved(lattice(2, 3)).flatten(1).requires_grad_()
    assert [name for name, _ in plate.named_parameters()] == ["control"]

    def call(control: Tensor, ends: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        grid = torch.func.functional_call(plate, {"control": control}, (ends, (3, 3)))
        return grid, interpolation(points, control, regularisation)

    control = plate.control.detach().requires_grad_()
    points = control.detach()[:2] + torch.tensor([[0.0, 0.0], [0.1, 0.2]], dtype=torch.double)  # one at a distance of 0
    assert torch.autograd.gradcheck(call, (control, ends, points.requires_grad_()))


def test_learned_points_are_the_same_plate():
    control = lattice(3, 3)
    ends = moved(control).float()
    constant, learned = ThinPlate(control, size=SIZE), ThinPlate(control, size=SIZE, learned=True)
    torch.testing.assert_close(grid(learned, ends), grid(constant, ends), rtol=0, atol=1e-6)
    assert list(learned.state_dict()) == ["control"]
    assert learned.identity.tolist() == control.flatten().tolist()


def test_composition_is_exact_at_the_points():
    control = lattice(4, 4)
    plate = ThinPlate(control, size=SIZE).double()
    first, second = moved(control, 0.1).flatten(1), moved(control, 0.1).flatten(1).requires_grad_()
    composed = plate.compose(first, second)
    expected = plate.points(first, second.unflatten(1, (16, 2)))
    at = plate.points(composed, control.expand(2, -1, -1))
    torch.testing.assert_close(at, expected, rtol=0, atol=1e-11)
    still = plate.identity.expand(2, -1).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: plate.compose(first, p), still)  # every point at a distance of 0


@pytest.mark.parametrize("n", [4, 8, 16])
def test_the_grid_is_exact_in_single_precision(n):
    control = lattice(n, n)
    ends = moved(control, 0.05).float()
    plate = ThinPlate(control, size=(32, 40))
    exact = grid(copy.deepcopy(plate).double(), ends.double(), (32, 40))
    for ours in (grid(plate, ends, (32, 40)), grid(ThinPlate(control), ends, (32, 40))):
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() < 5e-6
    still = interpolation(control, control).float()
    assert (still - torch.eye(n * n)).abs().max() < 5e-6


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "meta"])
def test_the_matrix_survives_other_types(convert):
    plate = ThinPlate(lattice(4, 4), size=SIZE)
    fresh = plate.matrix.clone()
    other = plate.to("meta").to_empty(device="cpu") if convert == "meta" else getattr(plate, convert)()
    assert other.matrix.dtype == (torch.double if convert == "double" else torch.float32)
    expected = interpolation(queries(), lattice(4, 4)).mT.to(other.matrix)
    torch.testing.assert_close(other.matrix, expected, rtol=0, atol=1e-15)
    assert torch.equal(other.float().matrix, fresh)


def test_built_where_nothing_is_computed():
    with torch.device("meta"):
        plate = ThinPlate(lattice(4, 4), size=SIZE)
    assert plate.matrix.is_meta
    assert plate(torch.empty(2, 32, device="meta"), SIZE).shape == (2, *SIZE, 2)


def test_nothing_in_a_checkpoint_depends_on_the_size():
    small, large = ThinPlate(lattice(3, 3), size=(4, 5)), ThinPlate(lattice(3, 3), size=(8, 9))
    assert not small.state_dict()
    large.load_state_dict(small.state_dict())
    file = io.BytesIO()
    torch.save(large, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.matrix, large.matrix)


def test_a_plate_folds_over_where_its_points_cross():
    control = lattice(3, 3)
    ends = control.repeat(2, 1, 1)
    ends[1, 4] = torch.tensor([1.4, 0.0])  # the centre beyond the right edge
    plate = ThinPlate(control, size=(20, 20)).double()
    first, second = folded(grid(plate, ends, (20, 20))).tolist()
    assert first == 0
    assert 0.05 < second < 0.9


@pytest.mark.parametrize(
    ("points", "error"),
    [
        (torch.rand(3, 3), r"points must be of shape \(n, 2\), got \(3, 3\)"),
        (torch.rand(2, 2), "points must be at least 3, got 2"),
        (torch.tensor([[0.0, 0], [1, 0], [0, math.nan]]), r"points must be finite, got \[\[0\.0, 0\.0\], "),
        (torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 0]]), r"points must differ, got \[1\.0, 0\.0\] at 1 and 3"),
        (torch.zeros(3, 2), r"points must differ, got \[0\.0, 0\.0\] at 0 and 1"),
        (torch.tensor([[-1.0, -0.5], [0, 0], [1, 0.5]]), r"points must not lie on one line, got \[\[-1\.0, -0\.5\]"),
    ],
)
def test_refuses_points_that_hold_no_plate(points, error):
    with pytest.raises(ValueError, match=error):
        ThinPlate(points)


@pytest.mark.parametrize("regularisation", [-0.1, math.nan])
def test_refuses_a_negative_regularisation(regularisation):
    with pytest.raises(ValueError, match=f"regularisation must not be negative, got {regularisation}"):
        ThinPlate(lattice(2, 2), regularisation=regularisation)


def test_refuses_a_lattice_that_is_none():
    with pytest.raises(ValueError, match="rows and columns must be at least 2, got 1 and 5"):
        lattice(1, 5)
    with pytest.raises(ValueError, match=r"span must be positive, got 0\.0"):
        lattice(2, 2, span=0.0)
