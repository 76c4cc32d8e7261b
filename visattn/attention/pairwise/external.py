"""Guo, Liu, Mu, Hu: Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks (2021)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention


class ExternalAttention(Attention):
    r"""Let every position read from a small memory that is learned and the same for all images.

    .. math:: y = \mathrm{ReLU}\bigl(x + \mathrm{BN}(W_2 M_v A)\bigr), \quad
        A_{si} = \frac{P_{si}}{\epsilon + \sum_{s'} P_{s'i}}, \quad P = \operatorname{softmax}_i(M_k W_1 x)

    Normalised twice, first over positions, then over the slots of the memory, as in the released code, whose
    :math:`\epsilon` is :math:`10^{-9}`. Where it is less work, the two matrices before the softmax are multiplied
    before they meet the map, and so are the two after it.

    The released code starts both memories as one and the same tensor, and they part when a checkpoint is loaded. Here
    they start equal and are learned apart, or are one for good with ``tied``. Several heads split the features and
    share the memories. The released layer for transformers has ``expansion=4`` and four times the heads, 32 where it
    says 8.

    Args:
        channels: Channels :math:`c` of the feature map.
        slots: Items in the memory of keys :math:`M_k` and in that of values :math:`M_v`.
        heads: Into how many parts the features are split.
        expansion: Ratio by which queries are wider than ``channels``.
        tied: Whether :math:`M_v = M_k^\top`.

    Raises:
        ValueError: If ``slots`` or ``expansion`` is not positive, or ``heads`` does not divide the features.

    Example:
        >>> ExternalAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2105.02358"
    place = "head"
    queried = True

    def __init__(self, channels: int, *, slots: int = 64, heads: int = 1, expansion: int = 1, tied: bool = False):
        super().__init__()
        if slots < 1:
            raise ValueError(f"slots must be positive, got {slots}")
        if expansion < 1:
            raise ValueError(f"expansion must be positive, got {expansion}")
        width = expansion * channels
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the {width} features, got {heads}")
        self.heads = heads
        self.query = nn.Linear(channels, width)
        self.key = nn.Linear(width // heads, slots, bias=False)
        self.value = None if tied else nn.Linear(slots, width // heads, bias=False)
        self.out = nn.Linear(width, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        if self.value is not None:
            with torch.no_grad():
                self.value.weight.copy_(self.key.weight.mT)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b s h w"]:
        flat, slots = x.flatten(2), self.key.out_features
        if self._fold(x):
            query = self.query.weight.view(self.heads, -1, flat.shape[1])
            weight, bias = self.key.weight @ query, self.query.bias.view(self.heads, -1) @ self.key.weight.mT
            logits = F.conv1d(flat, weight.flatten(0, 1)[..., None], bias.flatten())
        else:
            query = F.conv1d(flat, self.query.weight[..., None], self.query.bias)
            logits = F.conv1d(query.unflatten(1, (self.heads, -1)).flatten(0, 1), self.key.weight[..., None])
        wide = torch.promote_types(logits.dtype, torch.float32)  # the second norm divides what may be tiny
        weights = logits.reshape(-1, slots, flat.shape[2]).softmax(2, dtype=wide)
        weights = weights / (weights.sum(1, keepdim=True) + 1e-9)
        return weights.view(x.shape[0], -1, *x.shape[2:]).to(x.dtype)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b s h w"]) -> Float[Tensor, "b c h w"]:
        flat, value = weights.flatten(2), self.key.weight.mT if self.value is None else self.value.weight
        if self._fold(x):
            weight = self.out.weight.view(-1, self.heads, value.shape[0]).transpose(0, 1) @ value  # heads c slots
            y = F.conv1d(flat, weight.transpose(0, 1).flatten(1)[..., None])
        else:
            read = F.conv1d(flat.reshape(-1, value.shape[1], flat.shape[2]), value[..., None])
            y = F.conv1d(read.view(x.shape[0], -1, flat.shape[2]), self.out.weight[..., None])
        return (x + self.norm(y.view(x.shape))).relu().to(x.dtype)

    def _fold(self, x: Float[Tensor, "b c h w"]) -> bool:
        """Are a projection and a memory less work as one product? A compiled graph is the same for all sizes."""
        (width, channels), slots = self.query.weight.shape, self.key.out_features
        saved = width * (channels + slots) - self.heads * slots * channels
        if torch.compiler.is_compiling():
            return saved > 0
        return saved * x.shape[0] * x.shape[2] * x.shape[3] > slots * width * channels
