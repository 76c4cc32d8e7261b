"""Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning (ICML 2018)."""

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax


class GatedMultipleInstancePool(Attention):
    r"""Average a map by weights that each position earns by itself: a bag of instances, with a label for the bag.

    .. math:: y = \sum_i a_i x_i, \quad a = \operatorname{softmax}_i\bigl(w^\top(\tanh(V x_i) \odot \sigma(U x_i))\bigr)

    The paper's instances are our positions. Without the gate :math:`\sigma(U x_i)`, which lets large features of both
    signs count, it is the paper's plain attention.

    Args:
        channels: Channels :math:`c` of the map.
        width: Features of the hidden layer.
        gated: Whether there is a gate.

    Raises:
        ValueError: If ``width`` is not positive.

    Example:
        >>> GatedMultipleInstancePool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    paper = "arXiv:1802.04712"
    place = "pool"
    replaces = "pool"

    def __init__(self, channels: int, *, width: int = 128, gated: bool = True):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.inner = nn.Conv1d(channels, width, 1, bias=False)
        self.gate = nn.Conv1d(channels, width, 1, bias=False) if gated else None
        self.score = nn.Conv1d(width, 1, 1, bias=False)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        bag = x.flatten(2)
        hidden = self.inner(bag).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(bag).sigmoid()
        return softmax(self.score(hidden)).to(x.dtype).unflatten(2, x.shape[2:])

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c"]:
        return (x.flatten(2) @ weights.flatten(2).mT)[:, :, 0].to(x.dtype)
