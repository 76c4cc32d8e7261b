"""Vaswani et al.: Attention Is All You Need (NeurIPS 2017), where one feature map asks another."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import scaled_dot_product


class CrossAttention2d(Attention):
    r"""Let every position of a feature map read from all positions of another.

    .. math:: x'_i = W_o \bigl[\sum_j \operatorname{softmax}_j(q_{ti}^\top k_{tj} / \sqrt d)\, v_{tj}\bigr]_t + b_o

    with queries :math:`q_{ti}` from :math:`x`, keys :math:`k_{tj}` and values :math:`v_{tj}` from :math:`y`, and heads
    :math:`t` of :math:`d` features each. The two maps may differ in size. As in the paper the sum with :math:`x`, and
    norms, are left to who uses it. Equal to ``nn.MultiheadAttention`` on flattened maps.

    Args:
        channels: Channels :math:`c` of the map :math:`x` that asks, and of what it gets.
        context_channels: Channels of the map :math:`y` that is asked; None: ``channels``.
        heads: Heads, which share the channels evenly.
        bias: Whether the four projections have biases. The paper's formulas have none.

    Raises:
        ValueError: If ``heads`` does not divide ``channels``.

    Example:
        >>> CrossAttention2d(64, context_channels=32)(torch.randn(2, 64, 8, 8), torch.randn(2, 32, 4, 6)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1706.03762"
    queried = True

    def __init__(self, channels: int, *, context_channels: int | None = None, heads: int = 8, bias: bool = True):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels={channels}, got {heads}")
        self.heads = heads
        self.width = channels // heads
        self.query = nn.Linear(channels, channels, bias=bias)
        self.key_value = nn.Linear(context_channels or channels, 2 * channels, bias=bias)
        self.out = nn.Linear(channels, channels, bias=bias)

    def attend(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b e p q"]) -> Float[Tensor, "b heads n m"]:
        (query,), (key, _) = self._heads(self.query, x), self._heads(self.key_value, y)
        dtype = torch.promote_types(query.dtype, torch.float32)
        return (query * self.width**-0.5 @ key.mT).softmax(-1, dtype).to(x.dtype)

    def read(
        self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b e p q"], *, weights: Float[Tensor, "b heads n m"]
    ) -> Float[Tensor, "b c h w"]:
        _, value = self._heads(self.key_value, y)
        return self._write(x, weights.to(value.dtype) @ value)

    def forward(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b e p q"]) -> Float[Tensor, "b c h w"]:
        (query,), (key, value) = self._heads(self.query, x), self._heads(self.key_value, y)
        return self._write(x, scaled_dot_product(query, key, value))

    def _heads(self, layer: nn.Linear, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b heads n d"], ...]:
        features = layer(x.flatten(2).mT)
        return features.unflatten(2, (-1, self.heads, self.width)).permute(2, 0, 3, 1, 4).unbind()

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b c h w"]:
        return self.out(y.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:]).to(x.dtype)
