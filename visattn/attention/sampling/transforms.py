"""Maps from where a pixel goes to where it comes from, by a few parameters: isotropic, similar, affine, projective.

A transform :math:`T` makes of parameters the grid of a warped image, :math:`V(q) = U(T(q))`. To warp what is warped
already, only parameters are composed, and the original is sampled once: ``compose(first, second)`` are those of
:math:`T_1 \\circ T_2`.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import uncast, wide
from visattn.attention.sampling.grids import arrange, centres, combine, product

HORIZON = 1e-3
"""Least denominator of a homography: what is at its horizon, or behind, is far away."""


def divide(lines: Float[Tensor, "b 3 n"]) -> Float[Tensor, "b 2 n"]:
    return lines[:, :2] / lines[:, 2:].clamp_min(HORIZON)


class Transform(nn.Module, ABC):
    """What takes points of an output, (x, y), to where they come from, in at least float32, under autocast too.

    A subclass writes :meth:`grid` and :meth:`at`, and :meth:`compose` if its transforms are closed under it.
    """

    number: int
    """How many parameters there are."""

    @property
    @abstractmethod
    def identity(self) -> Float[Tensor, "p"]:
        """The parameters at which nothing moves."""

    @abstractmethod
    def grid(self, parameters: Float[Tensor, "b p"], size: tuple[int, int]) -> Float[Tensor, "b h w 2"]:
        """Return where the pixels of an output come from, as wide as the parameters."""

    @abstractmethod
    def at(self, parameters: Float[Tensor, "b p"], points: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n 2"]:
        """Return where points come from, which are as wide as the parameters."""

    def wide(self, parameters: Tensor) -> Float[Tensor, "b p"]:
        if parameters.shape[-1] != self.number:
            raise ValueError(f"parameters must be {self.number} for an image, got {parameters.shape[-1]}")
        return wide(parameters)

    def forward(self, parameters: Float[Tensor, "b p"], size: tuple[int, int]) -> Float[Tensor, "b h w 2"]:
        """Return the grid of an output of this height and width."""
        with uncast(parameters.device):
            return self.grid(self.wide(parameters), size)

    def points(self, parameters: Float[Tensor, "b p"], points: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n 2"]:
        """Return where any points of an output, other ones in every image, come from."""
        parameters = self.wide(parameters)
        with uncast(parameters.device):
            return self.at(parameters, points.to(parameters.dtype))

    @abstractmethod
    def crop(self, scale: float, x: float, y: float) -> Float[Tensor, "p"]:
        """Return the parameters of a crop around a point, of a share of the height and width."""

    def compose(self, first: Float[Tensor, "b p"], second: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        """Return the parameters of warping by ``first``, and what this gives by ``second``.

        Raises:
            ValueError: If such transforms, composed, are something else.
        """
        raise ValueError(f"{self} is not closed under composition")


class Matrix(Transform, ABC):
    """What multiplies (x, y, 1) by a matrix, and divides by the third of three results where there are three."""

    @abstractmethod
    def matrix(self, parameters: Float[Tensor, "b p"]) -> Float[Tensor, "b r 3"]:
        """Return the two rows of the matrices, or their three."""

    @abstractmethod
    def parameters_of(self, matrix: Float[Tensor, "b r 3"]) -> Float[Tensor, "b p"]:
        """Return the parameters of matrices of this kind."""

    def crop(self, scale: float, x: float, y: float) -> Tensor:
        matrix = self.matrix(self.identity[None])
        matrix[:, :2] = matrix.new_tensor([[scale, 0, x], [0, scale, y]])
        return self.parameters_of(matrix)[0, -self.number :]

    def grid(self, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        matrix = self.matrix(parameters)
        pixels = centres(size, dtype=matrix.dtype, device=matrix.device)
        if matrix.shape[1] == 2:
            return combine(matrix, pixels, size)
        return arrange(divide(product(matrix, pixels)), size)

    def at(self, parameters: Tensor, points: Tensor) -> Tensor:
        matrix = self.matrix(parameters)
        lines = torch.baddbmm(matrix[..., 2:], matrix[..., :2], points.mT)
        return (lines if matrix.shape[1] == 2 else divide(lines)).mT

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        with uncast(first.device):
            before, after = self.matrix(self.wide(first)), self.matrix(self.wide(second))
            if before.shape[1] == 3:
                return self.parameters_of(before @ after)
            return self.parameters_of(torch.baddbmm(F.pad(before[..., 2:], (2, 0)), before[..., :2], after))

    def determinant(self, parameters: Float[Tensor, "b p"]) -> Float[Tensor, "b"]:
        """Return the determinants of the matrices: zero where an image shrinks to a line or a point."""
        with uncast(parameters.device):
            matrix = self.matrix(self.wide(parameters))
            return torch.linalg.det(matrix[..., : matrix.shape[1]])

    def singular(self, parameters: Float[Tensor, "b p"], *, tolerance: float = 1e-6) -> Bool[Tensor, "b"]:
        """Say which images shrink to a line or a point, or have parameters that are no numbers."""
        return ~(self.determinant(parameters).abs() > tolerance)

    def refuse_singular(self, parameters: Float[Tensor, "b p"], *, tolerance: float = 1e-6) -> None:
        """Raise if any image shrinks to a line or a point. It waits for the device, so :meth:`forward` does not ask.

        Raises:
            ValueError: If there is one; it says which.
        """
        found = self.singular(parameters, tolerance=tolerance).nonzero()[:, 0].tolist()
        if found:
            raise ValueError(f"parameters must not be those of a singular matrix, got such for images {found}")


class Isotropic(Matrix):
    r"""Scale and shift: the paper's transform for attention, a crop.

    .. math:: (x, y) \mapsto (s\, x + t_x,\; s\, y + t_y)

    The parameters are :math:`(s, t_x, t_y)`, or the shift alone where the scale is fixed.

    Args:
        scale: Fixed :math:`s`, such as 0.5 for crops of half the height and width; None: it is a parameter.

    Raises:
        ValueError: If ``scale`` is not positive.

    Example:
        >>> Isotropic(scale=0.5)(torch.tensor([[0.5, 0.0]]), (2, 2))[0, 0]
        tensor([[ 0.2500, -0.2500],
                [ 0.7500, -0.2500]])
    """

    def __init__(self, scale: float | None = None):
        super().__init__()
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.scale = scale
        self.number = 3 if scale is None else 2

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale:g}"

    @property
    def identity(self) -> Tensor:
        """The parameters at which nothing moves; at a fixed scale, those of a crop around the centre."""
        return torch.tensor([1.0, 0.0, 0.0][3 - self.number :])

    def matrix(self, parameters: Tensor) -> Tensor:
        x, y = parameters[:, -2], parameters[:, -1]
        scale = parameters[:, 0] if self.scale is None else torch.full_like(x, self.scale)
        zero = torch.zeros_like(x)
        return torch.stack((scale, zero, x, zero, scale, y), 1).unflatten(1, (2, 3))

    def parameters_of(self, matrix: Tensor) -> Tensor:
        return torch.stack((matrix[:, 0, 0], matrix[:, 0, 2], matrix[:, 1, 2]), 1)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        if self.scale not in (None, 1):
            raise ValueError(f"{self} is not closed under composition")
        return super().compose(first, second)[:, -self.number :]


class Similarity(Matrix):
    r"""Rotate, scale and shift.

    .. math:: (x, y) \mapsto (a\, x - b\, y + t_x,\; b\, x + a\, y + t_y)

    The parameters are :math:`(a, b, t_x, t_y)`, with :math:`a = s \cos \varphi` and :math:`b = s \sin \varphi` for a
    scale :math:`s` and an angle :math:`\varphi`, clockwise on the screen. Angles are those of a square image.
    """

    number = 4

    @property
    def identity(self) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0, 0.0])

    def matrix(self, parameters: Tensor) -> Tensor:
        a, b, x, y = parameters.unbind(1)
        return torch.stack((a, -b, x, b, a, y), 1).unflatten(1, (2, 3))

    def parameters_of(self, matrix: Tensor) -> Tensor:
        return torch.cat((matrix[:, :, 0], matrix[:, :, 2]), 1)


class Affine(Matrix):
    """Multiply by any matrix of two rows; its six entries, row by row, are the parameters."""

    number = 6

    @property
    def identity(self) -> Tensor:
        return torch.eye(2, 3).flatten()

    def matrix(self, parameters: Tensor) -> Tensor:
        return parameters.unflatten(1, (2, 3))

    def parameters_of(self, matrix: Tensor) -> Tensor:
        return matrix.flatten(1)


class Projective(Matrix):
    r"""Map by a homography, of which the last entry is one; the eight others, row by row, are the parameters.

    .. math:: (x, y) \mapsto \frac{(h_{11} x + h_{12} y + h_{13},\; h_{21} x + h_{22} y + h_{23})}
        {\max(h_{31} x + h_{32} y + 1,\; 10^{-3})}

    The horizon, and what is behind it, is far away. A composition whose last entry is not positive has the centre
    behind the horizon; it is taken to be at it.
    """

    number = 8

    @property
    def identity(self) -> Tensor:
        return torch.eye(3).flatten()[:8]

    def matrix(self, parameters: Tensor) -> Tensor:
        return F.pad(parameters, (0, 1), value=1).unflatten(1, (3, 3))

    def parameters_of(self, matrix: Tensor) -> Tensor:
        entries = matrix.flatten(1)
        return entries[:, :8] / entries[:, 8:].clamp_min(HORIZON)


class Composed(Transform):
    """Warp by one transform, and what this gives by another, of any two kinds; their parameters stand in this order.

    Args:
        first: What the image is warped by.
        second: What the result is warped by.
    """

    def __init__(self, first: Transform, second: Transform):
        super().__init__()
        self.first, self.second = first, second
        self.number = first.number + second.number

    @property
    def identity(self) -> Tensor:
        return torch.cat((self.first.identity, self.second.identity))

    def crop(self, scale: float, x: float, y: float) -> Tensor:
        return torch.cat((self.first.crop(scale, x, y), self.second.identity))

    def grid(self, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        first, second = parameters.split((self.first.number, self.second.number), 1)
        return self.first.at(first, self.second.grid(second, size).flatten(1, 2)).unflatten(1, size)

    def at(self, parameters: Tensor, points: Tensor) -> Tensor:
        first, second = parameters.split((self.first.number, self.second.number), 1)
        return self.first.at(first, self.second.at(second, points))
