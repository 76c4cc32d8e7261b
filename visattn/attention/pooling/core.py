"""One query, all positions: multi-head attention in which no key and no value is ever made."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.core import softmax


class SingleQuery(nn.Module):
    r"""Multi-head attention of one query to :math:`m` tokens.

    A key is met by one query only, so its layer is applied to the query instead,
    :math:`q^\top W_k x = (W_k^\top q)^\top x`, and that of the values to what is read:
    :math:`\sum_i a_i W_v x_i = W_v \sum_i a_i x_i`. In place of :math:`2 m c^2` multiply-adds these are
    :math:`2 m h c` for :math:`h` heads. Keys need no bias: it would add the same to all logits.

    Args:
        channels: Features :math:`c` of query and tokens.
        heads: Number of heads.
        out_channels: Features of what is returned.

    Raises:
        ValueError: If ``heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, heads: int, out_channels: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels={channels}, got {heads}")
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, out_channels)

    def weights(self, query: Float[Tensor, "a c"], tokens: Float[Tensor, "b m c"]) -> Float[Tensor, "b heads 1 m"]:
        """What the query, one for each sample or one for all, reads from each token."""
        width = query.shape[1] // self.heads
        q = self.query(query).unflatten(1, (self.heads, width)) * width**-0.5
        k = self.key.weight.to(q.dtype).unflatten(0, (self.heads, width))
        asked = torch.einsum("bhd,hdc->bhc", q, k)
        logits = asked.expand(tokens.shape[0], -1, -1) @ tokens.mT
        return softmax(logits).to(tokens.dtype)[:, :, None]

    def read(self, tokens: Float[Tensor, "b m c"], weights: Float[Tensor, "b heads 1 m"]) -> Float[Tensor, "b o"]:
        found = weights[:, :, 0] @ tokens
        v = self.value.weight.to(found.dtype).unflatten(0, (self.heads, -1))
        value = torch.einsum("bhc,hdc->bhd", found, v).flatten(1)
        total = weights[:, :, 0].sum(-1, keepdim=True).expand(-1, -1, v.shape[1]).flatten(1)
        return self.out(value + total * self.value.bias)
