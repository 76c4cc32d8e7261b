"""Bookstein: Principal Warps: Thin-Plate Splines and the Decomposition of Deformations (PAMI 1989)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.sampling.grids import arrange, centres, product
from visattn.attention.sampling.transforms import Transform


def lattice(rows: int, columns: int, *, span: float = 1.0) -> Float[Tensor, "n 2"]:
    """Return (x, y) of control points on a lattice, row by row, in float64.

    Args:
        rows: Points down.
        columns: Points across.
        span: How far from the centre the outermost lie; 1 is the edge of the image.

    Raises:
        ValueError: If there are fewer than two rows or columns, or ``span`` is not positive.

    Example:
        >>> lattice(2, 2)
        tensor([[-1., -1.],
                [ 1., -1.],
                [-1.,  1.],
                [ 1.,  1.]], dtype=torch.float64)
    """
    if rows < 2 or columns < 2:
        raise ValueError(f"rows and columns must be at least 2, got {rows} and {columns}")
    if not span > 0:
        raise ValueError(f"span must be positive, got {span}")
    y, x = (torch.linspace(-span, span, n, dtype=torch.float64, device="cpu") for n in (rows, columns))
    return torch.cartesian_prod(y, x).flip(1)


def check_control(points: Tensor) -> None:
    """Raise if no thin plate goes through values at such points."""
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be of shape (n, 2), got {tuple(points.shape)}")
    if len(points) < 3:
        raise ValueError(f"points must be at least 3, got {len(points)}")
    if not points.isfinite().all():
        raise ValueError(f"points must be finite, got {points.tolist()}")
    spread, thin = torch.linalg.svdvals(points - points.mean(0)).tolist()
    for i, row in enumerate(torch.cdist(points, points)):
        if (same := (row[:i] <= 1e-6 * spread).nonzero()).numel():
            j = int(same[0])
            raise ValueError(f"points must differ, got {points[i].tolist()} at {j} and {i}")
    if thin <= 1e-6 * spread:
        raise ValueError(f"points must not lie on one line, got {points.tolist()}")


def basis(points: Float[Tensor, "*b m 2"], control: Float[Tensor, "n 2"]) -> Float[Tensor, "*b m n+3"]:
    r"""Return :math:`U(r) = r^2 \log r` of the distances to all control points, then 1, x and y.

    The gradient is right at a distance of zero, too, where the logarithm has none.
    """
    squares = (points[..., None, :] - control).square().sum(-1)
    apart = squares > 0
    kernel = torch.where(apart, squares * torch.where(apart, squares, 1).log() / 2, 0)
    return torch.cat((kernel, torch.ones_like(points[..., :1]), points), -1)


def system(control: Float[Tensor, "n 2"], regularisation: float) -> Float[Tensor, "n+3 n+3"]:
    rows = basis(control, control)
    n = len(control)
    kernel = rows[:, :n] + regularisation * torch.eye(n, dtype=rows.dtype, device=rows.device)
    sides = rows[:, n:]
    return torch.cat((torch.cat((kernel, sides), 1), F.pad(sides.mT, (0, 3))))


def coefficients(control: Float[Tensor, "n 2"], regularisation: float = 0.0) -> Float[Tensor, "n+3 n"]:
    r"""Return the first :math:`n` columns of :math:`L^{-1}`: they take values to coefficients of the :func:`basis`."""
    matrix = system(control, regularisation)
    return torch.linalg.solve(matrix, torch.eye(*matrix.shape, dtype=matrix.dtype, device=matrix.device)[:, :-3])


def interpolation(
    points: Float[Tensor, "m 2"], control: Float[Tensor, "n 2"], regularisation: float = 0.0
) -> Float[Tensor, "m n"]:
    """Return the matrix that takes values at control points to those of their thin plate at other points.

    With regularisation :math:`\\lambda` the plate need not go through the values, but bends less.
    """
    matrix = system(control, regularisation)
    return torch.linalg.solve(matrix, basis(points, control).mT)[: len(control)].mT  # the system is symmetric


class ThinPlate(Transform):
    r"""Bend a plate so that control points of the output come from where the parameters say.

    .. math:: T(q) = a + A q + \sum_i w_i\, U(|q - c_i|), \quad U(r) = r^2 \log r, \quad
        \sum_i w_i = 0, \quad \sum_i w_i c_i^\top = 0

    The parameters are where the control points :math:`c_i` come from, :math:`(x_1, y_1, x_2, \dots)`. The grid is
    linear in them, :math:`W d`, with a matrix that is made once, in float64. It stays in float32 where the model gets
    less, and is no part of a checkpoint, so a model of another size can take over the weights. A grid of another size
    than ``size`` gets a matrix of its own in every call, as all do where the control points are learned.

    Args:
        points: Control points :math:`c` of the output, at least three; :func:`lattice` makes some.
        size: Height and width in pixels of the output, if known.
        regularisation: Factor :math:`\lambda` of how much the plate resists; 0: it goes through the points exactly.
        learned: Whether the control points are parameters of the model.

    Raises:
        ValueError: If ``points`` are fewer than three, coincide or lie on one line, or ``regularisation`` is negative.

    Example:
        >>> plate = ThinPlate(lattice(4, 4), size=(28, 28))
        >>> plate(torch.randn(2, 32), (28, 28)).shape
        torch.Size([2, 28, 28, 2])
    """

    matrix: Tensor
    coefficients: Tensor
    control: Tensor

    def __init__(
        self,
        points: Tensor,
        *,
        size: tuple[int, int] | None = None,
        regularisation: float = 0.0,
        learned: bool = False,
    ):
        super().__init__()
        self.exact = points.detach().to("cpu", torch.float64, copy=True)
        self.kept: tuple[Any, Tensor] | None = None
        check_control(self.exact)
        if not regularisation >= 0:
            raise ValueError(f"regularisation must not be negative, got {regularisation}")
        self.number, self.size, self.regularisation, self.learned = 2 * len(points), size, regularisation, learned
        if learned:
            self.control = nn.Parameter(self.exact.to(torch.get_default_device(), torch.get_default_dtype()))
        else:
            self._make(torch.get_default_dtype(), torch.get_default_device())

    def extra_repr(self) -> str:
        return f"{self.number // 2}, size={self.size}, regularisation={self.regularisation:g}, learned={self.learned}"

    def _make(self, dtype: torch.dtype, device: torch.device) -> None:
        made = {"control": self.exact, "coefficients": coefficients(self.exact, self.regularisation)}
        if self.size is not None:
            pixels = centres(self.size, dtype=torch.float64, device="cpu")[:2].mT
            made["matrix"] = interpolation(pixels, self.exact, self.regularisation).mT.contiguous()
        for name, value in made.items():
            self.register_buffer(name, value.to(device, torch.promote_types(dtype, torch.float32)), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ThinPlate":
        """Move and cast; what another type cannot hold, or never was there, is made anew from float64."""
        before = self.control
        super()._apply(fn, recurse)
        after = self.control
        if not self.learned and (before.dtype, before.is_meta) != (after.dtype, after.is_meta):
            self._make(after.dtype, after.device)
        return self

    @property
    def identity(self) -> Tensor:
        return self.control.detach().flatten()

    def crop(self, scale: float, x: float, y: float) -> Tensor:
        return (self.control.detach() * scale + self.control.new_tensor((x, y))).flatten()

    def grid(self, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        control = self.control.to(parameters.dtype)
        moved = (parameters.unflatten(1, (-1, 2)) - control).mT
        still = torch.eye(2, dtype=moved.dtype, device=moved.device).expand(moved.shape[0], 2, 2)
        pixels = centres(size, dtype=moved.dtype, device=moved.device)[:2]
        # where nothing moves, the grid is that of the pixels to the last bit
        return arrange(product(torch.cat((moved, still), 2), torch.cat((self.spread(size, moved), pixels))), size)

    def spread(self, size: tuple[int, int], like: Tensor) -> Float[Tensor, "n m"]:
        """Return the matrix from values at the control points to those at the pixels; that of the last size is kept."""
        if not self.learned and size == self.size:
            return self.matrix.to(like.dtype)
        if self.learned or torch.compiler.is_compiling():
            control = self.control.double()
            pixels = centres(size, dtype=control.dtype, device=control.device)[:2].mT
            return interpolation(pixels, control, self.regularisation).mT.to(like)
        if self.kept is None or self.kept[0] != (size, like.dtype, like.device):
            pixels = centres(size, dtype=torch.float64, device="cpu")[:2].mT
            matrix = interpolation(pixels, self.exact, self.regularisation).mT
            self.kept = (size, like.dtype, like.device), matrix.contiguous().to(like)
        return self.kept[1]

    def at(self, parameters: Tensor, points: Tensor) -> Tensor:
        solved = coefficients(self.control.double(), self.regularisation) if self.learned else self.coefficients
        control = self.control.to(parameters.dtype)
        bend = solved.to(parameters.dtype) @ (parameters.unflatten(1, (-1, 2)) - control)  # little is left to cancel
        return points + basis(points, control) @ bend

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Return where control points end up that ``second`` moves and ``first`` then: exact there, a plate between."""
        return self.points(first, self.wide(second).unflatten(1, (-1, 2))).flatten(1)
