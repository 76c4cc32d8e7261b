"""The product of a map with weights of its channels, in fewer passes where the processor computes it."""

import torch
from jaxtyping import Float
from torch import Tensor

from visattn.attention.core import differentiable, plain


def quick(x: Tensor) -> bool:
    """Is it a map of full precision on the processor, with nobody looking that wants plain operations?"""
    if plain(x) or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype in (torch.float32, torch.float64)


def scale(x: Float[Tensor, "b c h w"], weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
    weights = weights.to(x.dtype)
    return Scale.apply(x, weights) if torch.is_grad_enabled() and quick(x) else x * weights


class Scale(torch.autograd.Function):
    """Whose gradient goes through the batch image by image, and makes no map but the one it returns."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.save_for_backward(x, weights)
        return x * weights

    @staticmethod
    def backward(ctx, g):
        x, weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(differentiable(torch.mul, (x, weights), (g,)))
        g_x, g_weights = torch.empty_like(x), torch.empty_like(weights)
        for image, factor, g_image, out, g_factor in zip(x, weights, g, g_x, g_weights, strict=True):
            g_factor.copy_(torch.mul(image, g_image, out=out).sum((1, 2), keepdim=True))
            torch.mul(g_image, factor, out=out)
        return g_x, g_weights
