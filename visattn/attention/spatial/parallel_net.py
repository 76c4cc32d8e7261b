"""Goyal, Bochkovskiy, Deng, Koltun: Non-deep Networks (NeurIPS 2022)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention


class ParallelNetAttention(Attention):
    r"""Convolve a map, and let it skip the convolution by channels that the whole map weighs.

    .. math:: y = \mathrm{SiLU}\bigl(\mathrm{BN}(\mathrm{conv}_3(x)) + \mathrm{BN}(\mathrm{conv}_1(x))
        + z \odot \sigma(W\, \mathrm{mean}_{hw}(z))\bigr), \quad z = \mathrm{BN}(x)

    The block of ParNet that keeps the shape, with its skip-squeeze-and-excitation. In eval both convolutions and their
    norms are one convolution: the kernels are joined before they touch the map. :meth:`fuse` also stores them so.

    Args:
        channels: Channels of the feature map.
        bias: Whether :math:`W` has a bias. It has none in the released code; the paper does not say.
        fused: Whether there is but one convolution, with a bias. :meth:`fuse` makes such a module.

    Raises:
        ValueError: In training, if there is but one position in the batch.

    Example:
        >>> ParallelNetAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2110.07641"
    place = "blocks"

    def __init__(self, channels: int, *, bias: bool = False, fused: bool = False):
        super().__init__()
        self.fused = fused
        if fused:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            self.wide = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
            self.narrow = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.norm = nn.BatchNorm2d(channels)
        self.excite = nn.Linear(channels, channels, bias=bias)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self._weigh(self.norm(x))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return self._write(x, self.norm(x), weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        skip = self.norm(x)
        return self._write(x, skip, self._weigh(skip))

    @torch.no_grad()
    def fuse(self) -> "ParallelNetAttention":
        """Return a module for inference with one convolution instead of two; it gives what this one gives in eval."""
        twin = type(self)(**{**self.arguments, "fused": True}).to(self.norm.weight).eval()
        kernel, bias = (self.conv.weight, self.conv.bias) if self.fused else self._joined()
        twin.conv.load_state_dict({"weight": kernel, "bias": bias})
        twin.norm.load_state_dict(self.norm.state_dict())
        twin.excite.load_state_dict(self.excite.state_dict())
        return twin

    def _weigh(self, skip: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self.excite(skip.mean((2, 3))).sigmoid()[:, :, None, None]

    def _write(
        self, x: Float[Tensor, "b c h w"], skip: Float[Tensor, "b c h w"], weights: Float[Tensor, "b c 1 1"]
    ) -> Float[Tensor, "b c h w"]:
        if self.fused:
            convolved = self.conv(x)
        elif self.training:
            convolved = self.wide(x) + self.narrow(x)
        else:
            convolved = F.conv2d(x, *self._joined(), padding=1)
        return F.silu(torch.addcmul(convolved.to(x.dtype), skip.to(x.dtype), weights.to(x.dtype)))

    def _joined(self) -> tuple[Float[Tensor, "c c 3 3"], Float[Tensor, " c"]]:
        """Both convolutions and the running statistics of their norms as one kernel and one bias."""
        (wide, above), (narrow, offset) = fold(self.wide), fold(self.narrow)
        return wide + F.pad(narrow, (1, 1, 1, 1)), above + offset


def fold(layers: nn.Sequential) -> tuple[Float[Tensor, "c c k k"], Float[Tensor, " c"]]:
    """A convolution and its norm in eval as a kernel and a bias."""
    conv: Any
    norm: Any
    conv, norm = layers
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
