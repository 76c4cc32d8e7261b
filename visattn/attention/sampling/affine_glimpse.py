"""Ablavatski, Lu, Cai: Enriched Deep Recurrent Visual Attention Model for Multiple Object Recognition (WACV 2017)."""

from jaxtyping import Bool, Float
from torch import Tensor

from visattn.attention.sampling.glimpses import SQUARE, Sensor, pixels
from visattn.attention.sampling.transforms import Affine
from visattn.attention.sampling.warp import sample


class AffineGlimpse(Sensor):
    r"""Look through a parallelogram, as a spatial transformer does.

    .. math:: (x, y) = A\, (x', y', 1)^\top

    for the pixels :math:`(x', y')` of the patch, with the outer edges of patch and image at -1 and 1 and zeros outside.
    The six entries of :math:`A`, row by row, are the numbers that say where to look.

    Linear interpolation passes over pixels where a patch has less than half the resolution of the image. There, let
    each of its pixels be the average of several points: ``points=2`` is good for a quarter. Where the patch has that of
    the image, more than one point blurs.

    Args:
        size: Height and width of the patch.
        points: Points down and across that are averaged for a pixel of the patch.

    Raises:
        ValueError: If an option is less than 1.

    Example:
        >>> sensor = AffineGlimpse(26, points=2)
        >>> where = sensor.transform.crop(0.5, x=-0.5, y=-0.5).expand(2, -1)
        >>> sensor(sensor.prepare(torch.rand(2, 1, 100, 100)), where).shape
        torch.Size([2, 1, 1, 26, 26])
    """

    number = 6
    scales = 1
    rule = "be those of a regular matrix"

    def __init__(self, size: int, *, points: int = 1):
        super().__init__()
        if min(size, points) < 1:
            raise ValueError(f"size and points must be at least 1, got {size} and {points}")
        self.size, self.points = size, points
        self.transform = Affine()

    def extra_repr(self) -> str:
        return f"{self.size}, points={self.points}"

    def astray(self, where: Float[Tensor, "m 6"]) -> Bool[Tensor, "m"]:
        return super().astray(where) | self.transform.singular(where)

    def prepare(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Return the images alone."""
        return (images,)

    def forward(self, prepared: tuple[Tensor, ...], where: Float[Tensor, "m 6"]) -> Float[Tensor, "m 1 c g g"]:
        (images,) = prepared
        places = self.rollouts(where, images)
        side = self.size * self.points
        grids = self.transform(places.flatten(0, 1), (side, side))
        grid = grids.unflatten(0, places.shape[:2]).flatten(1, 2)
        found = sample(images, grid, pool=self.points)
        return found.unflatten(2, (-1, 1, self.size)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)

    def corners(self, where: Float[Tensor, "m 6"], size: tuple[int, int]) -> Float[Tensor, "m 1 4 2"]:
        where = self.wide(where)
        square = where.new_tensor(SQUARE).expand(len(where), -1, -1)
        return pixels(self.transform.points(where, square), size)[:, None]
