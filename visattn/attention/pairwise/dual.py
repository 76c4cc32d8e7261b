"""Fu, Liu, Tian, Li, Bao, Fang, Lu: Dual Attention Network for Scene Segmentation (CVPR 2019)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import uncast
from visattn.attention.pairwise.core import Softmax, read


class PositionAttention(Attention):
    r"""Let every position of a feature map read from every other, by a learned gain that starts at zero.

    .. math:: y_i = x_i + \gamma \sum_j \operatorname{softmax}_j(q_i^\top k_j)\, v_j

    Values are as wide as the map and nothing follows the sum. Our query, key, value and gamma are the paper's
    :math:`B, C, D, \alpha`. In the paper query and key are as wide too (``reduction=1``), in its released code they are
    eight times narrower.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio by which query and key are narrower than ``channels``.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``.

    Example:
        >>> PositionAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1809.02983"
    place = "head"
    queried = True

    def __init__(self, channels: int, *, reduction: int = 8):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        self.query = nn.Conv1d(channels, channels // reduction, 1)
        self.key = nn.Conv1d(channels, channels // reduction, 1)
        self.value = nn.Conv1d(channels, channels, 1)
        self.affinity = Softmax()
        self.gamma = nn.Parameter(torch.zeros(1))

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n m"]:
        flat = x.flatten(2)
        return self.affinity.weights(self.query(flat).mT, self.key(flat).mT)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b n m"]) -> Float[Tensor, "b c h w"]:
        return x + read(self._value(x.flatten(2)), weights).mT.view(x.shape).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        flat = x.flatten(2)
        y = self.affinity.read(self.query(flat).mT, self.key(flat).mT, self._value(flat))
        return x + y.mT.reshape(x.shape).to(x.dtype)

    def _value(self, flat: Float[Tensor, "b c m"]) -> Float[Tensor, "b m c"]:
        weight, bias = self.gamma * self.value.weight, self.gamma * self.value.bias  # type: ignore[operator]
        return F.conv1d(flat, weight, bias).mT  # the gain where it is small


class ChannelAttention(Attention):
    r"""Let every channel of a feature map read from every other, by a learned gain that starts at zero.

    .. math:: y_i = x_i + \beta \sum_j \operatorname{softmax}_j(\mp x_i^\top x_j)\, x_j

    Here :math:`x_i` is the whole map of channel :math:`i`. The paper's formula has the plus: a channel reads from those
    like it, first of all from itself. Its released code subtracts each product from the largest, which gives the minus:
    a channel reads from those unlike it. The weights have the channels that are read from on axis 1 and those that read
    on axis 2.

    Args:
        channels: Channels of the feature map; the module has one parameter, whatever their number.
        form: Whether to build what the ``"released"`` code does, minus, or what the ``"paper"`` writes, plus.

    Raises:
        ValueError: If ``form`` is unknown.

    Example:
        >>> ChannelAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1809.02983"
    place = "head"
    queried = True

    def __init__(self, channels: int, *, form: Literal["paper", "released"] = "released"):
        super().__init__()
        if form not in ("paper", "released"):
            raise ValueError(f"form must be paper or released, got {form!r}")
        self.sign = 1 if form == "paper" else -1
        self.beta = nn.Parameter(torch.zeros(1))

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c c 1 1"]:
        flat = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        with uncast(x.device):
            energies = torch.bmm(self.sign * flat, flat.mT)
        energies = energies - energies.detach().amax(2, keepdim=True)
        weights = F.threshold(energies, -69, -torch.inf).softmax(2)  # from 1e-30 on: denormal numbers are slow
        return weights.to(x.dtype).mT[..., None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c c 1 1"]) -> Float[Tensor, "b c h w"]:
        matrix, flat = weights.squeeze((3, 4)).mT, x.flatten(2)
        if torch.compiler.is_compiling() or x.shape[1] <= flat.shape[2]:  # the gain where it is small
            matrix = self.beta * matrix
        else:
            flat = self.beta * flat
        return x + torch.bmm(matrix, flat).view(x.shape).to(x.dtype)
