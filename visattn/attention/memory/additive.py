"""Bahdanau, Cho, Bengio: Neural Machine Translation by Jointly Learning to Align and Translate (ICLR 2015)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention


class AdditiveAttention(MemoryAttention):
    r"""Compare a query with each region by a small perceptron.

    .. math:: z = \sum_i a_i v_i, \quad a = \operatorname{softmax}_i\bigl(u^\top \tanh(W_q q + W_k v_i + b)\bigr)

    This is :math:`u^\top \tanh(W [q; v_i] + b)` with :math:`W = [W_q, W_k]`, so the keys :math:`W_k v_i + b` are made
    once for a memory. Our :math:`q, v, W_q, W_k, u` are their :math:`s_{i-1}, h_j, W_a, U_a, v_a`; a bias of the score
    would change nothing. In Show, Attend and Tell (arXiv:1502.03044) the regions are an image's.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        width: Units of the perceptron.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> attention = AdditiveAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1409.0473"

    def __init__(self, query: int, memory: int, *, width: int = 512):
        super().__init__(query, memory)
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.query = nn.Linear(query, width, bias=False)
        self.key = nn.Linear(memory, width)
        self.score = nn.Linear(width, 1, bias=False)

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l a"]:
        return self.key(memory)

    def ask(self, query: Float[Tensor, "b r q"]) -> Float[Tensor, "b r a"]:
        return self.query(query)

    def compare(self, asked: Float[Tensor, "b r a"], keys: Float[Tensor, "b l a"]) -> Float[Tensor, "b r l"]:
        return torch.tanh(keys[:, None] + asked[:, :, None]) @ wide(self.score.weight[0])
