"""Take an image from where a grid says."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Padding = Literal["zeros", "border"]


def sample(
    image: Float[Tensor, "b c h w"],
    grid: Float[Tensor, "b h2 w2 2"],
    *,
    padding: Padding = "zeros",
    fill: float | Float[Tensor, "c"] | None = None,
    pool: int | tuple[int, int] = 1,
) -> Float[Tensor, "b c h3 w3"]:
    """Interpolate an image linearly between its pixels, at every point of a grid.

    Coordinates and sums are in at least float32, the result is as the image is. The gradient of
    :func:`torch.nn.functional.grid_sample` has no deterministic form on CUDA: under
    ``torch.use_deterministic_algorithms(True)``, images there are sampled by :func:`gather`.

    Args:
        image: The image.
        grid: Where to sample, (x, y) with the outer edges of the image at -1 and 1.
        padding: What lies outside: zeros, or the nearest pixel.
        fill: What lies outside instead of zero, for all channels or each, in units of the image. Zero in an image that
            was normalised is a grey; see :func:`normalised`.
        pool: Average over so many points, down and across: the grid is finer than the output. With
            :func:`oversampling`, an output smaller than the input has no aliases where the grid does not shrink it
            further.

    Raises:
        ValueError: If there is a ``fill`` behind a border, or ``pool`` does not divide the grid.

    Example:
        >>> from visattn.attention.sampling.grids import identity
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> sample(image, identity((4, 4)), pool=2)
        tensor([[[[ 2.5000,  4.5000],
                  [10.5000, 12.5000]]]])
    """
    if padding == "border" and fill is not None:
        raise ValueError(f"fill must be None where padding is 'border', got {fill}")
    pools = (pool, pool) if isinstance(pool, int) else pool
    if min(pools) < 1 or grid.shape[1] % pools[0] or grid.shape[2] % pools[1]:
        raise ValueError(f"pool must divide the height and width of the grid, {tuple(grid.shape[1:3])}, got {pool}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, grid.dtype), torch.float32)
    x, grid = image.to(dtype), grid.to(dtype)
    if isinstance(fill, Tensor):
        fill = fill.to(x)[:, None, None]
    if fill is not None:
        x = x - fill
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        y = gather(x, grid, padding=padding)
    else:
        y = F.grid_sample(x, grid, padding_mode=padding, align_corners=False)
    if max(pools) > 1:
        y = F.avg_pool2d(y, pools)
    return (y if fill is None else y + fill).to(image.dtype)


def gather(
    image: Float[Tensor, "b c h w"], grid: Float[Tensor, "b h2 w2 2"], *, padding: Padding = "zeros"
) -> Float[Tensor, "b c h2 w2"]:
    """Equal :func:`torch.nn.functional.grid_sample`, by four look-ups and plain operations.

    Slower, and with more memory. Use it for a gradient that is the same in every run on CUDA, where :func:`sample` does
    so by itself, or for second derivatives and forward-mode ones, which the library has not.
    """
    height, width = image.shape[2:]
    x, y = (((grid[..., i] + 1) * side - 1) / 2 for i, side in enumerate((width, height)))
    if padding == "border":
        x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, top, pixels = x.detach().floor(), y.detach().floor(), image.flatten(2)
    right, bottom = x - left, y - top
    result = None
    for down, row_weight in enumerate((1 - bottom, bottom)):
        for across, column_weight in enumerate((1 - right, right)):
            row, column = top + down, left + across
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            found = pixels.gather(2, index.flatten(1)[:, None].expand(-1, image.shape[1], -1))
            weight = torch.where(inside, row_weight * column_weight, 0)
            part = found.unflatten(2, tuple(grid.shape[1:3])) * weight[:, None]
            result = part if result is None else result + part
    assert result is not None
    return result


def oversampling(input_size: tuple[int, int], output_size: tuple[int, int]) -> tuple[int, int]:
    """Return how many points, down and across, an output's pixel needs so that none of the input is passed over.

    Example:
        >>> oversampling((60, 100), (32, 100))
        (2, 1)
    """
    down, across = (-(-before // after) for before, after in zip(input_size, output_size, strict=True))
    return down, across


def normalised(value: float, mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "c"]:
    """Return what becomes of a value in every channel of an image that is normalised; black is 0.

    Example:
        >>> normalised(0.0, mean=(0.5, 0.4), std=(0.25, 0.2))
        tensor([-2., -2.])
    """
    return (value - torch.tensor(mean)) / torch.tensor(std)
