"""Where the pixels of an output lie in its input: the one convention, and what a grid does to areas.

Coordinates are (x, y), and the outer edges of an image lie at -1 and 1 (``align_corners=False``): the centre of pixel
:math:`i` of :math:`w` is at :math:`(2 i + 1) / w - 1`. So a grid holds for inputs of every size.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from visattn.attention.core import plain


def centres(
    size: tuple[int, int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "3 n"]:
    """Return (x, y, 1) of the centres of an image's pixels, row by row; a row for each of the three.

    Example:
        >>> centres((1, 4))
        tensor([[-0.7500, -0.2500,  0.2500,  0.7500],
                [ 0.0000,  0.0000,  0.0000,  0.0000],
                [ 1.0000,  1.0000,  1.0000,  1.0000]])
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be a positive height and width, got {size}")
    points = torch.ones(3, height, width, dtype=dtype, device=device)
    points[0] = (2 * torch.arange(width, dtype=points.dtype, device=device) + 1) / width - 1
    points[1] = (2 * torch.arange(height, dtype=points.dtype, device=device)[:, None] + 1) / height - 1
    return points.flatten(1)


def arrange(planes: Float[Tensor, "b 2 n"], size: tuple[int, int]) -> Float[Tensor, "b h w 2"]:
    """View all x, then all y, as the grid that they are: sampling reads planes as fast as pairs, or faster."""
    return planes.unflatten(2, size).permute(0, 2, 3, 1)


def combine(
    ends: Float[Tensor, "b 2 k"], basis: Float[Tensor, "k n"], size: tuple[int, int]
) -> Float[Tensor, "b h w 2"]:
    """Return the grids of vectors in a basis of few rows: one product for all images, and for their gradient."""
    if plain(ends) or len(ends) < 8 * len(basis):  # as measured
        return arrange(product(ends, basis), size)
    return arrange(Combine.apply(ends, basis), size)


def product(ends: Float[Tensor, "b r k"], basis: Float[Tensor, "k n"]) -> Float[Tensor, "b r n"]:
    return (ends.flatten(0, 1) @ basis).unflatten(0, ends.shape[:2])


class Combine(torch.autograd.Function):
    """A product whose gradient reads (x, y) in pairs, as sampling gives them; laying them out anew is dearer."""

    @staticmethod
    def forward(ctx, ends, basis):
        ctx.save_for_backward(basis)
        return product(ends, basis)

    @staticmethod
    def backward(ctx, g):
        (basis,) = ctx.saved_tensors
        pairs = basis.new_zeros(2, *basis.shape, 2)
        pairs[0, ..., 0] = pairs[1, ..., 1] = basis
        return (g.mT.flatten(1) @ pairs.flatten(0, 1).flatten(1).mT).unflatten(1, (2, -1)), None


def identity(
    size: tuple[int, int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "1 h w 2"]:
    """Return the grid that takes every pixel from where it is."""
    return arrange(centres(size, dtype=dtype, device=device)[None, :2], size)


def jacobian(grid: Float[Tensor, "b h w 2"]) -> Float[Tensor, "b h-1 w-1"]:
    """Return how many times its own area each cell of an output takes from the input: one for the identity.

    It is negative where the image is mirrored or folded over. A cell lies between the centres of four pixels; its
    area is reckoned from its upper left corner.
    """
    corner = grid[:, :-1, :-1]
    right, down = grid[:, :-1, 1:] - corner, grid[:, 1:, :-1] - corner
    area = right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]
    return area * (grid.shape[1] * grid.shape[2] / 4)


def folded(grid: Float[Tensor, "b h w 2"]) -> Float[Tensor, "b"]:
    """Return the share of each grid that is mirrored or folded over; zero where there is no cell.

    Example:
        >>> folded(torch.cat((identity((4, 4)), identity((4, 4)).flip(2))))
        tensor([0., 1.])
    """
    cells = (jacobian(grid) < 0).to(torch.promote_types(grid.dtype, torch.float32))
    return cells.sum((1, 2)) / max(1, cells[0:1].numel())


def folding(grid: Float[Tensor, "b h w 2"], *, margin: float = 0.0) -> Float[Tensor, "b"]:
    """Return a penalty on grids that fold over: by how much the :func:`jacobian` is below ``margin``, on average."""
    short = (margin - jacobian(grid)).relu()
    return short.sum((1, 2)) / max(1, short[0:1].numel())
