"""Hu, Shen, Sun: Squeeze-and-Excitation Networks (CVPR 2018)."""

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale


class SqueezeExcitation(Attention):
    r"""Weigh every channel by what the whole map holds of all channels.

    .. math:: y = x \odot \sigma\bigl(W_2\, \mathrm{ReLU}(W_1\, \mathrm{mean}_{hw}(x) + b_1) + b_2\bigr)

    As in the paper's models, both layers have biases and the width between them is :math:`c / r`, not rounded.
    Our squeeze and excite are the paper's :math:`W_1` and :math:`W_2`.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio :math:`r` by which the layer between is narrower than ``channels``.
        bias: Whether both layers have biases. The paper's released models have them, many ports do not.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``.

    Example:
        >>> SqueezeExcitation(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1709.01507"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int, *, reduction: int = 16, bias: bool = True):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        self.squeeze = nn.Linear(channels, channels // reduction, bias=bias)
        self.excite = nn.Linear(channels // reduction, channels, bias=bias)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)
