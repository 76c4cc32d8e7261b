"""Bahdanau, Cho, Bengio: Neural Machine Translation by Jointly Learning to Align and Translate (ICLR 2015)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.core import differentiable, plain, tiles, wide
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

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b 1 l a"]:
        return self.key(memory)[:, None]

    def ask(self, query: Float[Tensor, "b r q"]) -> Float[Tensor, "b r a"]:
        return self.query(query)

    def compare(self, asked: Float[Tensor, "b r a"], keys: Float[Tensor, "b #r l a"]) -> Float[Tensor, "b r l"]:
        return perceptron(asked, keys, self.score.weight[0])


def perceptron(
    asked: Float[Tensor, "b r a"], keys: Float[Tensor, "b #r l a"], score: Float[Tensor, " a"]
) -> Float[Tensor, "b r l"]:
    r"""Return :math:`u^\top \tanh(q + k)` of every query and region, whose keys may differ between queries.

    What is within, as large as all queries times all regions, is made again for the gradient, a few memories at a time.
    """
    function = plain_perceptron if plain(keys) else Perceptron.apply
    return function(asked, keys, wide(score))


def plain_perceptron(asked: Tensor, keys: Tensor, score: Tensor) -> Tensor:
    """Compute it as its equation reads."""
    return (keys + asked[:, :, None]).tanh_() @ score  # in place: the sum is needed no more


class Perceptron(torch.autograd.Function):
    """Goes through the memories a few at a time, and keeps nothing of what is within."""

    @staticmethod
    def forward(ctx, asked, keys, score):
        ctx.save_for_backward(asked, keys, score)
        y = asked.new_empty(*asked.shape[:2], keys.shape[2])
        for k, q, into in tiles(keys.expand(-1, asked.shape[1], -1, -1), asked, y):
            into.copy_(plain_perceptron(q, k, score))
        return y

    @staticmethod
    def backward(ctx, g):
        asked, keys, score = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(differentiable(plain_perceptron, (asked, keys, score), (g,)))
        g_asked, g_keys, g_score = torch.empty_like(asked), torch.empty_like(keys), torch.zeros_like(score)
        everything = keys.expand(-1, asked.shape[1], -1, -1)
        for k, q, g_part, into_asked, into_keys in tiles(everything, asked, g, g_asked, g_keys):
            hidden = (k + q[:, :, None]).tanh_()
            g_score.addmv_(hidden.flatten(0, 2).mT, g_part.reshape(-1))
            slope = hidden.square_().neg_().add_(1).mul_(g_part[..., None])
            torch.sum(slope, 2, out=into_asked)
            into_keys.copy_(slope if into_keys.shape[1] == slope.shape[1] else slope.sum(1, keepdim=True))
        return g_asked.mul_(score), g_keys.mul_(score), g_score
