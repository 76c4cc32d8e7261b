"""Yang, Zhu, Wu, Yang: Gated Channel Transformation for Visual Recognition (CVPR 2020)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale

EPSILON = 1e-5


class GatedChannelTransform(Attention):
    r"""Let channels compete or cooperate, by how large each is beside all others.

    .. math::
        y_c = x_c \bigl(1 + \tanh(\gamma_c \hat s_c + \beta_c)\bigr), \quad
        \hat s_c = \frac{\sqrt{C}\, s_c}{\sqrt{\sum_k s_k^2 + \epsilon}}, \quad
        s_c = \alpha_c \sqrt{\textstyle\sum_{hw} x_c^2 + \epsilon}

    With ``norm="l1"`` it is :math:`s_c = \alpha_c \sum_{hw} |x_c|` and :math:`\hat s_c = C s_c / (\sum_k |s_k| +
    \epsilon)`. The released code adds :math:`\epsilon = 10^{-5}` to means over the channels, where the paper has sums.
    A fresh module returns its input, and learns.

    The paper puts one before every convolution; its authors find one before the last convolution of a block enough.

    Args:
        channels: Channels :math:`C` of the feature map.
        norm: By which norm channels are large.

    Raises:
        ValueError: If ``norm`` is neither of the two.

    Example:
        >>> GatedChannelTransform(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1909.11519"
    place = "inner"
    neutral = 1.0

    def __init__(self, channels: int, *, norm: Literal["l2", "l1"] = "l2"):
        super().__init__()
        if norm not in ("l2", "l1"):
            raise ValueError(f"norm must be 'l2' or 'l1', got {norm!r}")
        self.order = 2 if norm == "l2" else 1
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]
        s = torch.linalg.vector_norm(x, self.order, (2, 3), dtype=dtype)  # of halves it may be too large for a half
        if self.order == 2:
            s = self.alpha * (s.square() + EPSILON).sqrt()
            s = s * channels**0.5 / (s.square().sum(1, keepdim=True) + EPSILON).sqrt()
        else:
            s = self.alpha * s
            s = s * channels / (s.abs().sum(1, keepdim=True) + EPSILON)
        return (1 + (self.gamma * s + self.beta).tanh())[:, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return scale(x, weights)
