"""Lin, Chen, Yan: Network in Network (ICLR 2014)."""

from jaxtyping import Float
from torch import Tensor

from visattn.attention.base import Attention


class MeanPool(Attention):
    r"""Average a map: the same weight for every position, the control for all other pools.

    .. math:: y = \sum_i a_i x_i, \quad a_i = 1 / n

    Args:
        channels: Channels of the map.

    Example:
        >>> MeanPool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    paper = "arXiv:1312.4400"
    place = "pool"
    replaces = "pool"

    def __init__(self, channels: int):
        super().__init__()

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        return x.new_ones(()).expand(x.shape[0], 1, *x.shape[2:]) / x[0, 0].numel()

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c"]:
        return (x * weights).sum((2, 3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return x.mean((2, 3))
