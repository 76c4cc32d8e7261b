"""What looks at a map to say where to sample it: the localisation networks of spatial transformers."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """Return a height and a width."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"{name} must be a positive height and width, got {size}")
    return height, width


class Localiser(nn.Module):
    """A network from a map, averaged down (or repeated) to one size, to a vector: so it takes maps of any size.

    Args:
        channels: Channels of the map.
        view: Height and width of what it looks at.
    """

    num_features: int
    """The width of its vectors, as timm calls it."""
    layers: nn.Sequential

    def __init__(self, channels: int, view: tuple[int, int]):
        super().__init__()
        self.channels, self.view = channels, view

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        if x.shape[1] != self.channels:
            raise ValueError(f"channels must be {self.channels}, got a map of {x.shape[1]}")
        return self.layers(F.adaptive_avg_pool2d(x, self.view))


class ConvolutionalLocaliser(Localiser):
    """Two convolutions of 5×5 with 20 filters each, a max pool between them, and a layer of 20 units; all rectified."""

    num_features = 20

    def __init__(self, channels: int, view: tuple[int, int]):
        super().__init__(channels, view)
        height, width = ((side + 1) // 2 for side in view)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 20, 5, padding=2),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.ReLU(),
            nn.Conv2d(20, 20, 5, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * height * width, 20),
            nn.ReLU(),
        )


class ConnectedLocaliser(Localiser):
    """Two fully connected layers of 32 units, rectified."""

    num_features = 32

    def __init__(self, channels: int, view: tuple[int, int]):
        super().__init__(channels, view)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * view[0] * view[1], 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
        )


def tiling(heads: int) -> tuple[float, list[tuple[float, float]]]:
    """Return the scale of so many crops that tile an image, and where their centres lie, row by row.

    Example:
        >>> tiling(2)
        (0.5, [(-0.5, 0.0), (0.5, 0.0)])
    """
    rows = int(heads**0.5)
    columns = -(-heads // rows)
    places = [divmod(number, columns) for number in range(heads)]
    return 1 / columns, [((2 * column + 1) / columns - 1, (2 * row + 1) / rows - 1) for row, column in places]
