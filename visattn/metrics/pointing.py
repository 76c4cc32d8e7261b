"""Zhang et al.: Top-down Neural Attention by Excitation Backprop (ECCV 2016): the pointing game."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def points_into(
    weights: Float[Tensor, "*b l"], boxes: Int[Tensor, "*b 4"], size: tuple[int, int], image: tuple[int, int]
) -> Bool[Tensor, "*b"]:
    """Say whether the middle of the region with the greatest weight lies in a box.

    For many maps at once, each with one box, to which its right and lower border do not belong. Where several weights
    are the greatest, the first region counts, so that a map that is the same everywhere points at the upper left
    corner; :func:`pointing` gives the share of them that hit.

    Args:
        weights: A weight for each region: the positions of a map, row by row; what stands behind them does not count.
        boxes: The first column and row of what is pointed at, and those behind its last.
        size: Height and width of the map.
        image: Height and width of the image in which the boxes are.

    Raises:
        ValueError: If there are fewer weights than the map has positions.

    Example:
        >>> points_into(torch.tensor([0.1, 0.6, 0.2, 0.1]), torch.tensor([5, 0, 8, 4]), (2, 2), (8, 8))
        tensor(True)
    """
    rows, columns = size
    if weights.shape[-1] < rows * columns:
        raise ValueError(f"weights must be of at least {rows * columns} positions, got {weights.shape[-1]}")
    peak = weights[..., : rows * columns].argmax(-1)
    x = (peak % columns + 0.5) * image[1] / columns
    y = (peak // columns + 0.5) * image[0] / rows
    left, top, right, bottom = boxes.unbind(-1)
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


def pointing(
    weights: Float[Tensor, "h w"], boxes: Float[Tensor, "k 4"], size: tuple[int, int], *, tolerance: float = 0.0
) -> float:
    """Return whether a map points at what is in one of some boxes: 1 or 0.

    A map points at the middle of its greatest cell: there it has its peak when it is enlarged, linearly, to the image.
    Where several cells are the greatest, the share of them that hit is returned, so that a map that is the same
    everywhere has what chance has; :func:`points_into` takes the first. The border of a box belongs to it.

    Args:
        weights: The map.
        boxes: In pixels: the first column and row, and those behind the last.
        size: Height and width of the image.
        tolerance: How far outside of a box, in pixels, a point may lie; others allow 15.

    Raises:
        ValueError: If there is no box, or one has no area, or ``tolerance`` is negative.

    Example:
        >>> pointing(torch.eye(2), torch.tensor([[0.0, 0.0, 50.0, 50.0]]), (100, 100))
        0.5
    """
    if not len(boxes) or (boxes[:, 2:] <= boxes[:, :2]).any():
        raise ValueError(f"boxes must be some, each with an area, got {boxes.tolist()}")
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    cells = (weights == weights.max()).nonzero().flip(1)  # as column and row
    sides = torch.tensor([size[1] / weights.shape[1], size[0] / weights.shape[0]], device=weights.device)
    points = (cells + 0.5) * sides
    away = torch.maximum(boxes[:, :2] - points[:, None], points[:, None] - boxes[:, 2:]).clamp_min(0).norm(dim=2)
    return float((away.amin(1) <= tolerance).float().mean())
