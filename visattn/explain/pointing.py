"""Zhang et al.: Top-down Neural Attention by Excitation Backprop (ECCV 2016): the pointing game."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def pointing(
    weights: Float[Tensor, "h w"], boxes: Float[Tensor, "k 4"], size: tuple[int, int], *, tolerance: float = 0.0
) -> float:
    """Return whether a map points at what is in one of some boxes: 1 or 0.

    A map points at the middle of its greatest cell: there it has its peak when it is enlarged, linearly, to the image.
    Where several cells are the greatest, the share of them that hit is returned, so that a map that is the same
    everywhere has what chance has.

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


def seen(boxes: Float[Tensor, "k 4"], photo: tuple[int, int], transform: Any) -> Float[Tensor, "m 4"]:
    """Return where the boxes of a photo are in what a model sees of it; those of which it sees nothing are left out.

    Args:
        boxes: In pixels of the upright photo.
        photo: Its height and width.
        transform: How photos are prepared for the model, a :class:`~visattn.data.transforms.Preprocess`.
    """
    view = torch.tensor(transform.input_size[1:], dtype=boxes.dtype)
    sides = torch.tensor(photo, dtype=boxes.dtype)
    whole = sides * (view / transform.crop_pct / sides).max()  # of which the middle is seen
    places = boxes.view(-1, 2, 2) * (whole / sides).flip(0) - ((whole - view) / 2).flip(0)
    found = torch.minimum(places.clamp_min(0), view.flip(0)).view(-1, 4)
    return found[(found[:, 2:] > found[:, :2]).all(1)]
