"""Yang, Zhang, Li, Xie: SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks (ICML
2021)."""

import torch
from jaxtyping import Float
from torch import Tensor

from visattn.attention.base import Attention
from visattn.attention.core import differentiable, plain, tiles


class SimAM(Attention):
    r"""Weigh every value of a feature map by how far it stands out of its channel.

    .. math::
        y = x \odot \sigma\Bigl(\frac{(x - \mu)^2}{4 (v + \lambda)} + \frac{1}{2}\Bigr), \quad
        \mu = \mathrm{mean}_{hw}(x), \quad v = \sum_{hw} \frac{(x - \mu)^2}{n - 1}

    There is nothing to learn. The paper's networks have it between the 3×3 convolution of a block and its norm; our
    place is after both. On a map of one position, :math:`v = 0`.

    Args:
        channels: Channels of the feature map, on which nothing depends.
        regularisation: What is added to the variance, :math:`\lambda`.

    Raises:
        ValueError: If ``regularisation`` is not positive.

    Example:
        >>> SimAM(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "https://proceedings.mlr.press/v139/yang21o.html"
    place = "inner"
    neutral = 1.0

    def __init__(self, channels: int, *, regularisation: float = 1e-4):
        super().__init__()
        if regularisation <= 0:
            raise ValueError(f"regularisation must be positive, got {regularisation}")
        self.regularisation = regularisation

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return plain_weights(x, self.regularisation)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x * weights

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return plain_weigh(x, self.regularisation) if plain(x) else Weigh.apply(x, self.regularisation)


# From here on: the product with the weights as a function that saves time and memory the way those of CBAM do: for the
# gradient it keeps nothing but its input, and computes the weights again.


def plain_weights(x: Tensor, regularisation: float) -> Tensor:
    deviation = x - x.mean((2, 3), keepdim=True)
    square = deviation.square()
    return (square * scale(square, regularisation) + 0.5).sigmoid()


def plain_weigh(x: Tensor, regularisation: float) -> Tensor:
    return x * plain_weights(x, regularisation)


def scale(square: Tensor, regularisation: float) -> Tensor:
    """What squared deviations are multiplied with."""
    others = max(square.shape[2] * square.shape[3] - 1, 1)
    return 0.25 / (square.sum((2, 3), keepdim=True) / others + regularisation)


class Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, regularisation):
        ctx.save_for_backward(x)
        ctx.regularisation = regularisation
        y = torch.empty_like(x)
        for part, into in tiles(x, y):
            torch.sub(part, part.mean((2, 3), keepdim=True), out=into).square_()
            into.mul_(scale(into, regularisation)).add_(0.5).sigmoid_().mul_(part)
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(differentiable(plain_weigh, (x, ctx.regularisation), (g,)))
        g_x, others = torch.empty_like(x), max(x.shape[2] * x.shape[3] - 1, 1)
        for part, g_part, into in tiles(x, g, g_x):
            deviation = part - part.mean((2, 3), keepdim=True)
            square = deviation.square()
            factor = scale(square, ctx.regularisation)
            weights = torch.mul(square, factor, out=into).add_(0.5).sigmoid_()
            slope = torch.mul(part, g_part).mul_(weights)
            slope.addcmul_(slope, weights, value=-1)  # the gradient of what goes into the logistic function
            into.mul_(g_part)
            spread = square.mul_(slope).sum((2, 3), keepdim=True)
            slope.mul_(deviation)
            into.addcmul_(slope, 2 * factor).sub_(2 * factor * slope.mean((2, 3), keepdim=True))
            into.addcmul_(deviation, 8 * factor.square() * spread / others, value=-1)
        return g_x, None
