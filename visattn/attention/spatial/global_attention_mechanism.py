"""Liu, Shao, Hoffmann: Global Attention Mechanism (2021)."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class Weights(NamedTuple):
    """Where :class:`GlobalAttentionMechanism` looks."""

    channel: Float[Tensor, "b c h w"]
    spatial: Float[Tensor, "b c h w"]


class GlobalAttentionMechanism(Attention):
    r"""Weigh channels, then positions, and pool neither: both weights are of the size of the map.

    .. math:: y = x' \odot \sigma(M_s(x')), \quad x' = x \odot \sigma(M_c(x))

    :math:`M_c` is one perceptron over the channels of each position, :math:`M_s` two :math:`7 \times 7` convolutions
    with batch norms; both are narrower inside. The convolutions weigh much: :math:`98\, c^2 / r` of the parameters.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio :math:`r` by which the layers inside are narrower than ``channels``: that of BAM as in the
            paper. Ports of it take 4.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``; in training, if there is but one position
            in the batch.

    Example:
        >>> GlobalAttentionMechanism(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2112.05561"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int, *, reduction: int = 16):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        width = channels // reduction
        self.channel = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1))
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, width, 7, padding=3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 7, padding=3),
            nn.BatchNorm2d(channels),
        )

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        channel = self.channel(x).sigmoid_()
        return Weights(channel, self.spatial(x * channel).sigmoid_())

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        return x * weights.channel.to(x.dtype) * weights.spatial.to(x.dtype)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        scaled = x * self.channel(x).sigmoid_().to(x.dtype)
        return scaled * self.spatial(scaled).sigmoid_().to(x.dtype)
