"""Misra, Nalamada, Arasanipalai, Hou: Rotate to Attend: Convolutional Triplet Attention Module (WACV 2021)."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from visattn.attention.base import Attention
from visattn.attention.spatial.cbam import SpatialGate, pool


class Weights(NamedTuple):
    """Where :class:`TripletAttention` looks: the weight of a value is the mean of the three."""

    spatial: Float[Tensor, "b 1 h w"]
    width: Float[Tensor, "b c 1 w"]
    height: Float[Tensor, "b c h 1"]


class TripletAttention(Attention):
    r"""Weigh every value of a feature map by three planes through it, each pooled over the third axis.

    .. math::
        y = \tfrac{1}{3}\, x \odot (g_{hw} + g_{cw} + g_{hc}), \quad
        g_{hw} = \sigma\bigl(\mathrm{BN}(\mathrm{conv}_{k \times k}([\max_c(x); \mathrm{mean}_c(x)]))\bigr)

    The other two are the same with the roles of the axes exchanged: :math:`g_{cw}` pools over rows, :math:`g_{hc}` over
    columns. Values that share a maximum share its gradient; the released code gives it to the first.

    Args:
        channels: Channels of the feature map. No parameter depends on them.
        kernel_size: Width :math:`k` of the convolutions; the paper uses 3 on small networks.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive; in training, if there is but one position in the batch.

    Example:
        >>> TripletAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2010.03045"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int, *, kernel_size: int = 7):
        super().__init__()
        self.spatial, self.width, self.height = (SpatialGate(channels, kernel_size=kernel_size) for _ in range(3))

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        return self._look(x)[0]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        spatial, width, height = (each.to(x.dtype) / 3 for each in weights)
        return x * (spatial + width).add_(height)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        weights, x = self._look(x)
        return self.read(x, weights=weights)

    def _look(self, x: Tensor) -> tuple[Weights, Tensor]:
        """Return the weights, and ``x`` to be used in its place."""
        highest, mean, x, _ = pool(x, dims=(1,))
        spatial = self.spatial._weigh(highest, mean)
        highest, mean, x, _ = pool(x, dims=(2,))
        width = self.width._weigh(highest.transpose(1, 2), mean.transpose(1, 2)).transpose(1, 2)
        highest, mean, x, _ = pool(x, dims=(3,))
        height = self.height._weigh(highest.transpose(1, 3), mean.transpose(1, 3)).transpose(1, 3)
        return Weights(spatial, width, height), x
