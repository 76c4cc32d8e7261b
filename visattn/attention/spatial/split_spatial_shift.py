"""Yu, Li, Cai, Sun, Li: S²-MLPv2: Improved Spatial-Shift MLP Architecture for Vision (2021)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention


class SplitSpatialShiftAttention(Attention):
    r"""Mix three copies of a map, two of them shifted by a pixel, by what the whole map holds of each channel.

    .. math:: y = W_o \sum_{i=1}^{3} a_i \odot u_i, \quad
        a = \operatorname{softmax}_i\bigl(V\, \mathrm{GELU}(U \textstyle\sum_i \sum_{hw} u_i)\bigr)

    :math:`[v_1; v_2; u_3] = W x + b`. In :math:`u_1` the four quarters of the channels of :math:`v_1` are shifted down,
    up, to the right and to the left, in :math:`u_2` those of :math:`v_2` to the right, to the left, down and up. Where
    nothing comes in at the border, what was there stays. The sums are sums, not means, as in the paper.

    Args:
        channels: Channels of the feature map.

    Raises:
        ValueError: If ``channels`` is not a multiple of 4.

    Example:
        >>> SplitSpatialShiftAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2108.01072"
    place = "blocks"

    def __init__(self, channels: int):
        super().__init__()
        if channels % 4:
            raise ValueError(f"channels must be a multiple of 4, got {channels}")
        self.expand = nn.Conv2d(channels, 3 * channels, 1)
        self.squeeze = nn.Linear(channels, channels, bias=False)
        self.excite = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k c 1 1"]:
        return self._weigh(self._branches(x))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k c 1 1"]) -> Float[Tensor, "b c h w"]:
        return self._mix(self._branches(x), weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        branches = self._branches(x)
        return self._mix(branches, self._weigh(branches)).to(x.dtype)

    def _branches(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b c h w"]]:
        first, second, third = self.expand(x).chunk(3, 1)
        return [shift(first, 2, 3), shift(second, 3, 2), third]

    def _weigh(self, branches: list[Float[Tensor, "b c h w"]]) -> Float[Tensor, "b k c 1 1"]:
        total = torch.stack([branch.sum((2, 3)) for branch in branches]).sum(0)
        logits = self.excite(F.gelu(self.squeeze(total))).unflatten(1, (3, -1))
        return logits.softmax(1)[..., None, None]

    def _mix(
        self, branches: list[Float[Tensor, "b c h w"]], weights: Float[Tensor, "b k c 1 1"]
    ) -> Float[Tensor, "b c h w"]:
        first, *others = zip(branches, weights.to(branches[0].dtype).unbind(1), strict=True)
        mixed = first[0] * first[1]
        for branch, weight in others:
            mixed.addcmul_(branch, weight)
        return self.out(mixed)


def shift(x: Float[Tensor, "b c h w"], first: int, second: int) -> Float[Tensor, "b c h w"]:
    """Shift a quarter of the channels each forwards and backwards along one axis, then along the other."""
    one, two, three, four = x.chunk(4, 1)
    steps = ((one, first, 1), (two, first, -1), (three, second, 1), (four, second, -1))
    return torch.cat([moved(quarter, axis, step) for quarter, axis, step in steps], 1)


def moved(x: Float[Tensor, "b c h w"], axis: int, step: int) -> Float[Tensor, "b c h w"]:
    last = x.shape[axis] - 1
    if step > 0:
        return torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, last)), axis)
    return torch.cat((x.narrow(axis, 1, last), x.narrow(axis, last, 1)), axis)
