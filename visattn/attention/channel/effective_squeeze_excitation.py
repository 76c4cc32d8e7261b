"""Lee, Park: CenterMask: Real-Time Anchor-Free Instance Segmentation (CVPR 2020)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale


class EffectiveSqueezeExcitation(Attention):
    r"""Weigh every channel by what the whole map holds of all channels, without a narrow layer between.

    .. math:: y = x \odot \operatorname{clip}\Bigl(\frac{W\, \mathrm{mean}_{hw}(x) + b + 3}{6}, 0, 1\Bigr)

    The paper's eSE, with the hard sigmoid of the released code.

    Args:
        channels: Channels :math:`c` of the feature map.

    Example:
        >>> EffectiveSqueezeExcitation(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1911.06667"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int):
        super().__init__()
        self.excite = nn.Linear(channels, channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return F.hardsigmoid(self.excite(x.mean((2, 3))))[:, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)
