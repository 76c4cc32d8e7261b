"""Lin, Feng, dos Santos, Yu, Xiang, Zhou, Bengio: A Structured Self-attentive Sentence Embedding (ICLR 2017)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax


class StructuredSelfAttentivePool(Attention):
    r"""Read a map in several hops, each of which spreads its own weight of one over the positions.

    .. math:: A = \operatorname{softmax}_n(W_2 \tanh(W_1 X^\top)), \quad M = A X

    The paper's sentence is our map, its words are our positions. As in the paper, no layer has a bias, and the hops
    stand one after the other in the vector that is returned; ``out_channels`` brings it to another width, which a timm
    classifier needs. :meth:`penalty` is the paper's :math:`P`, which keeps the hops apart.

    Args:
        channels: Channels :math:`c` of the map.
        hops: Number :math:`r` of hops.
        width: Features of the layer between; None: ``channels // 4``.
        out_channels: Features of the vector after one more layer; None: no such layer, :math:`r c` features.

    Raises:
        ValueError: If ``hops`` or ``width`` is not positive.

    Example:
        >>> StructuredSelfAttentivePool(64, hops=3)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 192])
    """

    paper = "arXiv:1703.03130"
    place = "pool"
    replaces = "pool"

    def __init__(self, channels: int, *, hops: int = 4, width: int | None = None, out_channels: int | None = None):
        super().__init__()
        width = channels // 4 if width is None else width
        if hops < 1:
            raise ValueError(f"hops must be positive, got {hops}")
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.inner = nn.Conv1d(channels, width, 1, bias=False)
        self.hop = nn.Conv1d(width, hops, 1, bias=False)
        self.out = nn.Identity() if out_channels is None else nn.Linear(hops * channels, out_channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b r h w"]:
        logits = self.hop(self.inner(x.flatten(2)).tanh())
        return softmax(logits).to(x.dtype).unflatten(2, x.shape[2:])

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b r h w"]) -> Float[Tensor, "b o"]:
        return self.out((weights.flatten(2) @ x.flatten(2).mT).flatten(1)).to(x.dtype)

    def penalty(self, weights: Float[Tensor, "b r h w"]) -> Float[Tensor, ""]:
        r"""Return :math:`\lVert A A^\top - I \rVert_F^2`, the mean over the batch: zero where each hop has a position
        of its own."""
        hops = weights.flatten(2).float()
        return (hops @ hops.mT - torch.eye(hops.shape[1], device=hops.device)).square().sum((1, 2)).mean()
