"""Which grid a row of positions was cut from."""

import math

Grid = tuple[int, int]
PREFIX = 8  # class and register tokens before the grid, at most


def same_stride(grid: Grid, image: Grid) -> bool:
    """Does one stride cut the image into this grid, both sides rounded up or both rounded down?

    Example:
        >>> same_stride((7, 10), (224, 320)), same_stride((10, 7), (224, 320))
        (True, False)
    """

    def strides(rounded: int) -> bool:  # +1: down, s in (H/(h+1), H/h]; -1: up, s in [H/h, H/(h-1))
        ends = [
            sorted((side / cells, side / (cells + rounded) if cells + rounded else math.inf))
            for cells, side in zip(grid, image, strict=True)
        ]
        return max(low for low, _ in ends) < min(high for _, high in ends)

    return strides(-1) or strides(+1)


def usual_grids(image: Grid) -> set[Grid]:
    """Return the grids of networks: halved again and again, however rounded, or patches that tile the image."""
    strides = range(1, max(image) + 1)
    usual = [s for s in strides if not s & (s - 1) or all(side % s == 0 for side in image)]
    down, up = [(image[0] // s, image[1] // s) for s in usual], [(-(-image[0] // s), -(-image[1] // s)) for s in usual]
    return {*down, *up}


def grid_of(positions: int, image: Grid) -> tuple[Grid, int]:
    """Return the grid that so many positions are on an image of this height and width, and how many lead it as prefix.

    Raises:
        ValueError: If no grid of the image's aspect has so many positions.

    Example:
        >>> grid_of(197, (224, 224)), grid_of(70, (224, 320))
        (((14, 14), 1), ((7, 10), 0))
    """
    usual = {height * width: (height, width) for height, width in usual_grids(image)}
    for prefix in range(min(PREFIX, positions - 1) + 1):
        if positions - prefix in usual:
            return usual[positions - prefix], prefix
    for height in range(1, positions + 1):
        if positions % height == 0 and same_stride((height, positions // height), image):
            return (height, positions // height), 0
    raise ValueError(
        f"no grid of the aspect of an image of {image[0]}×{image[1]} has {positions} positions, "
        f"nor with up to {PREFIX} prefix tokens; say which with grids={{name: (height, width)}}"
    )


def key_grid_of(positions: int, query: Grid, prefix: int, image: Grid) -> tuple[Grid, int]:
    """Return the grid of the keys and their prefix: the queries' grid, that grid sub-sampled, or one of its own."""
    if positions == query[0] * query[1] + prefix:
        return query, prefix
    for factor in range(2, max(query) + 1):
        for grid in ((query[0] // factor, query[1] // factor), (-(-query[0] // factor), -(-query[1] // factor))):
            if grid[0] * grid[1] == positions:
                return grid, 0
    return grid_of(positions, image)
