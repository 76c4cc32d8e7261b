"""Mnih, Heess, Graves, Kavukcuoglu: Recurrent Models of Visual Attention (NIPS 2014), the glimpse sensor."""

from functools import reduce
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.core import plain, uncast
from visattn.attention.sampling.glimpses import SQUARE, Sensor, pixels
from visattn.attention.sampling.grids import arrange
from visattn.attention.sampling.warp import sample


class Retina(Sensor):
    r"""Look at a location through square patches around it, each wider than the last and of the same resolution.

    .. math:: \rho_i(x, l) = \text{the square of side } g z^i \text{ around } l, \text{ shrunk to } g \times g, \quad
        i = 0, \dots, k - 1

    Locations are (x, y), with the outer edges of the image at -1 and 1 and zeros outside. Patches are square in pixels,
    whatever the shape of the image.

    - ``"pyramid"`` interpolates linearly, in the image or in averages of it that are made once. It equals the means of
      what is behind a patch's pixels where these end between pixels of the level looked at.
    - ``"point"`` interpolates linearly in the image alone: the same up to a side of :math:`2 g`, aliases beyond.
    - ``"exact"`` averages whole pixels, those of the square whose upper left corner is the one asked for, rounded;
      halves go right and down. Locations have no gradient, and that of images no deterministic form on CUDA.

    Args:
        size: Height and width :math:`g` of a patch; those of the first are pixels of the image.
        scales: Number :math:`k` of patches.
        zoom: Ratio :math:`z` of a patch's side to that of the one before.
        form: What a pixel of a patch is, as above.

    Raises:
        ValueError: If an option is out of its range, or images are both lower and narrower than the first patch.

    Example:
        >>> sensor = Retina(2, scales=2)
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> sensor(sensor.prepare(image), torch.zeros(1, 2))[0, :, 0]
        tensor([[[ 5.0000,  6.0000],
                 [ 9.0000, 10.0000]],
        <BLANKLINE>
                [[ 2.5000,  4.5000],
                 [10.5000, 12.5000]]])
    """

    number = 2
    rule = "lie in [-1, 1]"

    def __init__(
        self, size: int, *, scales: int = 1, zoom: int = 2, form: Literal["pyramid", "point", "exact"] = "pyramid"
    ):
        super().__init__()
        if min(size, scales) < 1:
            raise ValueError(f"size and scales must be at least 1, got {size} and {scales}")
        if zoom < 2:
            raise ValueError(f"zoom must be at least 2, got {zoom}")
        if form not in ("pyramid", "point", "exact"):
            raise ValueError(f"form must be pyramid, point or exact, got {form!r}")
        self.size, self.scales, self.zoom, self.form = size, scales, zoom, form
        self.zooms = [zoom**i for i in range(scales)]
        self.levels = [(pool, list(zooms)) for pool, zooms in groupby(self.zooms, self.pool)]

    def extra_repr(self) -> str:
        return f"{self.size}, scales={self.scales}, zoom={self.zoom}, form={self.form!r}"

    def pool(self, zoom: int) -> int:
        """Return the side, in pixels, of the means in which a patch is interpolated.

        It is half that of the patch's own pixels where it can be: a point between four means is the mean of all.
        """
        if self.form != "pyramid" or zoom == 1:
            return 1
        return zoom if zoom % 2 else zoom // 2

    def astray(self, where: Float[Tensor, "m 2"]) -> Bool[Tensor, "m"]:
        return ~(where.abs() <= 1).all(1)

    def prepare(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Return the images, the further levels of their pyramid, and where pixels of patches lie from a location."""
        count, (height, width) = images.shape[0], images.shape[2:]
        if self.size > height and self.size > width:
            raise ValueError(f"images must be as high or wide as a patch of {self.size}, got {height} × {width}")
        wide = torch.promote_types(images.dtype, torch.float32)
        levels = [images]
        for (before, _), (pool, _) in zip(self.levels, self.levels[1:], strict=False):
            levels.append(means(levels[-1].to(wide), pool // before))
        offsets, like = [], images.new_empty(0, dtype=wide)
        for level, (pool, zooms) in zip(levels, self.levels, strict=True):
            size = (pool * level.shape[2], pool * level.shape[3])
            if self.form == "exact":
                offsets += [self.boxes(zoom, size, like) for zoom in zooms]
            else:
                offsets.append(torch.cat([self.points(zoom, size, like) for zoom in zooms], 1))
        return (*levels, *(each.expand(count, -1, -1) for each in offsets))

    def points(self, zoom: int, size: tuple[int, int], like: Tensor) -> Float[Tensor, "2 n"]:
        """Return where the pixels of a patch lie from its centre, all x and then all y."""
        ends = (1 - self.size) * zoom, self.size * zoom
        steps = torch.arange(*ends, 2 * zoom, dtype=like.dtype, device=like.device)
        return torch.stack(torch.broadcast_tensors(steps / size[1], steps[:, None] / size[0])).flatten(1)

    def boxes(self, zoom: int, size: tuple[int, int], like: Tensor) -> Float[Tensor, "2 n"]:
        """Return where the pixels behind a patch lie from the first: the first of every box, then the second, …"""
        steps = torch.arange(0, 2 * zoom * self.size, 2, dtype=like.dtype, device=like.device)
        steps = steps.unflatten(0, (-1, zoom)).mT
        across, down = (steps / size[1])[:, None], (steps / size[0])[:, None, :, None]
        return torch.stack(torch.broadcast_tensors(across, down)).flatten(1)

    def forward(self, prepared: tuple[Tensor, ...], where: Float[Tensor, "m 2"]) -> Float[Tensor, "m k c g g"]:
        images, count = prepared[0], len(self.levels)
        places, size = self.rollouts(where, images), (images.shape[2], images.shape[3])
        levels, offsets = prepared[:count], prepared[count:]
        with uncast(images.device):
            if self.form == "exact":
                crops = zip(offsets, self.zooms, strict=True)
                patches = [self.crop(images, each, places, zoom) for each, zoom in crops]
            else:
                looks = zip(levels, offsets, self.levels, strict=True)
                patches = [self.interpolate(level, each, places, size, pool) for level, each, (pool, _) in looks]
            return torch.cat(patches, 2).flatten(0, 1).to(images.dtype)

    def interpolate(
        self,
        level: Float[Tensor, "b c h2 w2"],
        offsets: Float[Tensor, "b 2 n"],
        places: Float[Tensor, "b r 2"],
        size: tuple[int, int],
        pool: int,
    ) -> Float[Tensor, "b r k2 c g g"]:
        """Take patches from a level of images of this size."""
        centre = places.mT
        if pool > 1:  # the last pixels of a level may reach beyond the edge of the image
            x, y = centre.unbind(1)
            across, down = size[1] / (pool * level.shape[3]), size[0] / (pool * level.shape[2])
            centre = torch.stack(((x + 1) * across - 1, (y + 1) * down - 1), 1)
        found = sample(level, self.lay(centre, offsets))
        return found.unflatten(2, (places.shape[1], -1, self.size)).permute(0, 2, 3, 1, 4, 5)

    def crop(
        self,
        images: Float[Tensor, "b c h w"],
        offsets: Float[Tensor, "b 2 n"],
        places: Float[Tensor, "b r 2"],
        zoom: int,
    ) -> Float[Tensor, "b r 1 c g g"]:
        """Average boxes of whole pixels."""
        height, width = images.shape[2:]
        x, y = self.corner(pixels(places.detach(), (height, width)), zoom).unbind(2)
        grid = self.lay(torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), 1), offsets)
        dtype = torch.promote_types(images.dtype, grid.dtype)
        found = F.grid_sample(images.to(dtype), grid.to(dtype), mode="nearest", align_corners=False)
        shape = (*images.shape[:2], places.shape[1], self.size, self.size)
        if zoom > 1:
            boxes = found.unflatten(2, (-1, zoom, zoom, self.size)).flatten(0, 2).flatten(3)
            found = F.avg_pool2d(boxes.permute(0, 3, 1, 2), zoom)  # the pixels of a patch as channels, last in memory
        return found.reshape(shape).transpose(1, 2)[:, :, None]

    def lay(self, centre: Float[Tensor, "b 2 r"], offsets: Float[Tensor, "b 2 n"]) -> Float[Tensor, "b rows g 2"]:
        """Return the grids around the locations of each image, below each other."""
        return arrange((centre[..., None] + offsets[:, :, None]).flatten(2), (-1, self.size))

    def corner(self, centre: Float[Tensor, "*n 2"], zoom: int) -> Float[Tensor, "*n 2"]:
        """Return the upper left corner of a patch around a point, in pixels."""
        corner = centre - self.size * zoom / 2
        return (corner + 0.5).floor() if self.form == "exact" else corner

    def corners(self, where: Float[Tensor, "m 2"], size: tuple[int, int]) -> Float[Tensor, "m k 4 2"]:
        centre = pixels(self.wide(where), size)
        square = (centre.new_tensor(SQUARE) + 1) / 2
        return torch.stack([self.corner(centre, z)[:, None] + self.size * z * square for z in self.zooms], 1)


def means(x: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "b c h2 w2"]:
    """Average over squares, with zeros beyond the edge; on a processor by whole rows first, several times as fast."""
    height, width = x.shape[2:]
    if plain(x) or height % side or width % side:
        x = F.pad(x, (0, -width % side, 0, -height % side))
    if plain(x) or x.device.type != "cpu":
        return F.avg_pool2d(x, side)
    rows = reduce(torch.add, [x[:, :, i::side] for i in range(side)])
    return reduce(torch.add, [rows[..., i::side] for i in range(side)]) / side**2
