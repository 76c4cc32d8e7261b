"""Gregor, Danihelka, Graves, Rezende, Wierstra: DRAW: A Recurrent Neural Network For Image Generation (ICML 2015)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.core import differentiable, plain, uncast
from visattn.attention.sampling.glimpses import SQUARE, Sensor

LEAST = -32.0
"""The exponent below which a weight is zero, beside the largest of its filter."""
FAR = 2.0**20
"""Pixels from the image's middle, beyond which a float32 hardly tells one pixel from the next."""


def around(centres: Float[Tensor, "m g"], side: int) -> Float[Tensor, "m g a"]:
    """Return the distances of all pixels from centres."""
    return torch.arange(side, dtype=centres.dtype, device=centres.device) - centres[..., None]


def nearest(centres: Float[Tensor, "m g"], side: int) -> Float[Tensor, "m g 1"]:
    """Return the least of the squared distances."""
    return (centres - centres.round().clamp(0, side - 1)).square().detach()[..., None]


def plain_bank(centres: Float[Tensor, "m g"], sharpness: Float[Tensor, "m 1 1"], side: int) -> Float[Tensor, "m g a"]:
    """Return Gaussians on a side of the image; their sharpness is the factor in the exponent."""
    below = (nearest(centres, side) - around(centres, side).square()) * sharpness
    return F.threshold(below, LEAST, -torch.inf).softmax(2)


class Bank(torch.autograd.Function):
    """The same in fewer passes and less memory, which is what takes the time."""

    @staticmethod
    def forward(ctx, centres, sharpness, side):
        below = around(centres, side).square_().neg_().add_(nearest(centres, side)).mul_(sharpness)
        filters = torch.threshold_(below, LEAST, -torch.inf).softmax(2)
        ctx.save_for_backward(centres, sharpness, filters)
        return filters

    @staticmethod
    def backward(ctx, g):
        centres, sharpness, filters = ctx.saved_tensors
        side = g.shape[2]
        if torch.is_grad_enabled():
            return *differentiable(plain_bank, (centres, sharpness, side), (g,)), None
        g = g * filters
        distances = around(centres, side)
        pull = g.addcmul_(filters, g.sum(2, keepdim=True), value=-1).mul_(distances)
        g_centres = pull.sum(2).mul_(2 * sharpness[..., 0])
        return g_centres, pull.mul_(distances).sum((1, 2), keepdim=True).neg_(), None


class GaussianGlimpse(Sensor):
    r"""Read a patch through a lattice of Gaussian filters, and write one through its transpose.

    .. math:: \text{read}(x) = \gamma\, F_Y\, x\, F_X^\top, \quad
        \text{write}(w) = \tfrac{1}{\gamma}\, F_Y^\top w\, F_X, \quad
        F_X[i, a] \propto \exp\left(-\frac{(a - \mu_i)^2}{2 \sigma^2}\right), \quad \textstyle\sum_a F_X[i, a] = 1

    for images of height :math:`B` and width :math:`A`, where

    .. math:: \mu_i = g_X + \left(i - \tfrac{N - 1}{2}\right) \delta, \quad
        g_X = \tfrac{A + 1}{2} (\tilde g_X + 1) - 1, \quad
        \delta = \tfrac{\max(A, B) - 1}{N - 1}\, \tilde \delta

    The numbers that say where to look are :math:`(\tilde g_X, \tilde g_Y, \log \sigma^2, \log \tilde \delta,
    \log \gamma)`. Pixels :math:`a` and filters :math:`i` count from 0; in the paper from 1, which is the same. Its
    centres of -1 and 1 are half a pixel outside the image.

    Differs from the paper: a weight below :math:`e^{-32}` of the largest of its filter is zero, since products with
    numbers so small that they lose digits are slow. Where all of a filter is outside, it reads the nearest pixel, which
    is what the formula says if reckoned exactly. :math:`\log \sigma^2` is at least -60, :math:`\log \tilde \delta` at
    most 40, and filters farther away than :math:`2^{20}` pixels are that far away.

    Args:
        size: Filters :math:`N` down and across.

    Raises:
        ValueError: If ``size`` is less than 2.

    Example:
        >>> sensor = GaussianGlimpse(5)
        >>> where = torch.zeros(2, 5)
        >>> patches = sensor(sensor.prepare(torch.rand(2, 3, 28, 20)), where)
        >>> patches.shape, sensor.write(patches[:, 0], where, (28, 20)).shape
        (torch.Size([2, 1, 3, 5, 5]), torch.Size([2, 3, 28, 20]))
    """

    number = 5
    scales = 1

    def __init__(self, size: int):
        super().__init__()
        if size < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        self.size = size

    def extra_repr(self) -> str:
        return f"{self.size}"

    def prepare(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Return the images alone."""
        return (images,)

    def lattice(
        self, where: Float[Tensor, "m 5"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"], Float[Tensor, "m"]]:
        """Return the middle of all filters, (x, y) in pixels counted from 0, and the pixels between two of them."""
        x, y, _, stride, _ = where.unbind(1)
        x, y = (at * ((side + 1) / 2) + (side - 1) / 2 for at, side in ((x, size[1]), (y, size[0])))
        return x, y, stride.clamp_max(40).exp() * ((max(size) - 1) / (self.size - 1))

    def filters(
        self, where: Float[Tensor, "m 5"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "m g h"], Float[Tensor, "m g w"]]:
        """Return the filters down and across, in at least float32; the weights of each sum to one."""
        where = self.wide(where)
        x, y, stride = self.lattice(where, size)
        steps = torch.arange(self.size, dtype=x.dtype, device=x.device) - (self.size - 1) / 2
        offsets = stride[:, None] * steps
        sharpness = (-where[:, 2, None, None].clamp_min(-60)).exp() / 2
        bank = plain_bank if plain(where) else Bank.apply
        centres = ((at[:, None] + offsets).clamp(-FAR, FAR) for at in (y, x))
        down, across = (bank(at, sharpness, side) for at, side in zip(centres, size, strict=True))
        return down, across

    def forward(self, prepared: tuple[Tensor, ...], where: Float[Tensor, "m 5"]) -> Float[Tensor, "m 1 c g g"]:
        (images,) = prepared
        channels, height, width = images.shape[1:]
        places = self.rollouts(where, images)
        with uncast(images.device):
            where = places.flatten(0, 1)
            down, across = self.filters(where, (height, width))
            x = images.to(torch.promote_types(images.dtype, where.dtype))
            down, across = down.to(x.dtype), across.to(x.dtype)
            rows = down.unflatten(0, places.shape[:2]).flatten(1, 2)[:, None] @ x
            rows = rows.unflatten(2, (-1, self.size)).transpose(1, 2).flatten(0, 1)
            read = rows.flatten(1, 2) @ across.mT * where[:, 4].exp()[:, None, None]
        return read.unflatten(1, (1, channels, self.size)).to(images.dtype)

    def write(
        self, patches: Float[Tensor, "m c g g"], where: Float[Tensor, "m 5"], size: tuple[int, int]
    ) -> Float[Tensor, "m c h w"]:
        """Return images of this height and width, as wide as the patches, that are zero but for what is written."""
        with uncast(patches.device):
            where = self.wide(where)
            down, across = self.filters(where, size)
            w = patches.to(torch.promote_types(patches.dtype, where.dtype))
            down = (down * (-where[:, 4]).exp()[:, None, None]).to(w.dtype)
            columns = (down.mT @ w.transpose(1, 2).flatten(2)).unflatten(2, w.shape[1::2])
            written = columns.transpose(1, 2).flatten(1, 2) @ across.to(w.dtype)
        return written.unflatten(1, (-1, size[0])).to(patches.dtype)

    def corners(self, where: Float[Tensor, "m 5"], size: tuple[int, int]) -> Float[Tensor, "m 1 4 2"]:
        """Return the squares whose sides are strides of all filters; see :meth:`Sensor.corners`."""
        where = self.wide(where)
        x, y, stride = self.lattice(where, size)
        middle = torch.stack((x, y), 1) + 0.5
        return (middle[:, None] + (stride * self.size / 2)[:, None, None] * where.new_tensor(SQUARE))[:, None]
