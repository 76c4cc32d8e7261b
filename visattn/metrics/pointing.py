"""Zhang et al.: Top-down Neural Attention by Excitation Backprop (ECCV 2016): the pointing game."""

from jaxtyping import Bool, Float, Int
from torch import Tensor


def points_into(
    weights: Float[Tensor, "*b l"], boxes: Int[Tensor, "*b 4"], size: tuple[int, int], image: tuple[int, int]
) -> Bool[Tensor, "*b"]:
    """Say whether the middle of the region with the greatest weight lies in a box.

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
