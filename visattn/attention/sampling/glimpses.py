"""What every glimpse sensor is: images are prepared once, and looked at as often as wanted."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.core import wide

SQUARE = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
"""The corners of a patch, (x, y), in the order in which they are drawn."""


class Sensor(nn.Module, ABC):
    """What takes glimpses of images, each of some patches, from where a few numbers say.

    A subclass writes :meth:`prepare`, :meth:`forward` and :meth:`corners`. There may be several roll-outs of every
    image: :math:`r` of them have the rows :math:`i r` to :math:`i r + r - 1` for image :math:`i`, and images are not
    repeated for them.

    Example:
        >>> from visattn.attention.sampling.retina import Retina
        >>> sensor = Retina(8, scales=3)
        >>> prepared = sensor.prepare(torch.rand(2, 1, 28, 28))
        >>> [sensor(prepared, where).shape for where in (torch.zeros(2, 2), torch.zeros(10, 2))]
        [torch.Size([2, 3, 1, 8, 8]), torch.Size([10, 3, 1, 8, 8])]
    """

    number: int
    """How many numbers say where to look."""

    size: int
    """Height and width of a patch."""

    scales: int
    """How many patches a glimpse has."""

    rule = "be finite"
    """What numbers must do to say where to look."""

    @abstractmethod
    def prepare(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Return what all glimpses of the images share; the images themselves come first."""

    @abstractmethod
    def forward(self, prepared: tuple[Tensor, ...], where: Float[Tensor, "m p"]) -> Float[Tensor, "m k c g g"]:
        """Return one glimpse for each row, as wide as the images; coordinates and sums are in at least float32."""

    @abstractmethod
    def corners(self, where: Float[Tensor, "m p"], size: tuple[int, int]) -> Float[Tensor, "m k 4 2"]:
        """Return what each patch covers in an image of this height and width, for drawing.

        Corners are (x, y) in pixels from the image's upper left corner, and in turn: the patch's upper left, upper
        right, lower right and lower left one.
        """

    def astray(self, where: Float[Tensor, "m p"]) -> Bool[Tensor, "m"]:
        """Say which rows break the :attr:`rule`."""
        return ~where.isfinite().all(1)

    def refuse_astray(self, where: Float[Tensor, "m p"]) -> None:
        """Raise if any row breaks the :attr:`rule`. It waits for the device, so :meth:`forward` does not ask.

        Raises:
            ValueError: If there is one; it says which.
        """
        found = self.astray(self.wide(where)).nonzero()[:, 0].tolist()
        if found:
            raise ValueError(f"where must {self.rule}, got {where[found[0]].tolist()} first, in rows {found}")

    def wide(self, where: Tensor) -> Float[Tensor, "m p"]:
        if where.shape[1] != self.number:
            raise ValueError(f"where must be {self.number} numbers for a glimpse, got {where.shape[1]}")
        return wide(where)

    def rollouts(self, where: Float[Tensor, "m p"], images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b r p"]:
        """View rows as the roll-outs of each image, in at least float32.

        Raises:
            ValueError: If a row has another number of numbers, or images would have different numbers of rows.
        """
        rows, count = where.shape[0], images.shape[0]
        each = rows // count if count else 1
        if each < 1 or rows != each * count:
            raise ValueError(f"where must have equally many rows for each of {count} images, got {rows}")
        return self.wide(where).unflatten(0, (count, each))


def pixels(points: Float[Tensor, "*n 2"], size: tuple[int, int]) -> Float[Tensor, "*n 2"]:
    """Return (x, y) in pixels from the upper left corner of an image, of which the edges are at -1 and 1.

    Example:
        >>> pixels(torch.tensor([[0.0, 0.0], [-1.0, 1.0]]), (28, 60))
        tensor([[30., 14.],
                [ 0., 28.]])
    """
    x, y = points.unbind(-1)
    return torch.stack(((x + 1) * (size[1] / 2), (y + 1) * (size[0] / 2)), -1)
