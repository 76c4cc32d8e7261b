"""Ruan, Wen, Zheng, Zheng: Linear Context Transform Block (AAAI 2020)."""

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale


class LinearContextTransform(Attention):
    r"""Weigh every channel by how its mean stands among those of its group.

    .. math:: y_c = x_c\, \sigma(w_c \hat z_c + b_c), \quad
        \hat z_c = \frac{z_c - \mathrm{mean}_g(z)}{\mathrm{std}_g(z)}, \quad z = \mathrm{mean}_{hw}(x)

    :math:`g` is the group of channels to which :math:`c` belongs. Every :math:`w` starts at zero and every :math:`b` at
    one, so a fresh module scales the map by :math:`\sigma(1)`. How many groups there are by default is our choice.

    Args:
        channels: Channels of the feature map.
        groups: Into how many groups of channels that follow each other they are divided.

    Raises:
        ValueError: If ``groups`` does not divide ``channels`` into groups of two or more.

    Example:
        >>> LinearContextTransform(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1909.03834"
    place = "residual"
    neutral = 1.0

    def __init__(self, channels: int, *, groups: int = 8):
        super().__init__()
        if groups < 1 or channels % groups or channels == groups:
            raise ValueError(f"groups must divide channels={channels} into groups of two or more, got {groups}")
        self.norm = nn.GroupNorm(groups, channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.ones_(self.norm.bias)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self.norm(x.mean((2, 3))).sigmoid()[:, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)
