"""Graves, Wayne, Danihelka: Neural Turing Machines (2014), how a memory is addressed by its content."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention


class CosineAttention(MemoryAttention):
    r"""Compare a query with each region by the angle between them, as sharply as the query asks for.

    .. math:: z = \sum_i a_i v_i, \quad a = \operatorname{softmax}_i\Bigl(\beta\, \frac{k^\top v_i}{|k|\, |v_i|}\Bigr),
        \quad k = W q + b, \quad \beta = \log(1 + e^{w^\top q + c})

    Weights move with the direction of a region and not with its length. Our :math:`q, v_i, \beta` are their
    controller's output, :math:`\mathbf{M}_t(i)` and :math:`\beta_t`, which the paper wants positive. A vector shorter
    than a millionth points nowhere: its cosines fade to 0.

    Args:
        query: Features of a query.
        memory: Features of the memory.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> attention = CosineAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1410.5401"

    def __init__(self, query: int, memory: int):
        super().__init__(query, memory)
        self.query = nn.Linear(query, memory)
        self.sharpness = nn.Linear(query, 1)

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return F.normalize(wide(memory), dim=2, eps=1e-6)

    def ask(self, query: Float[Tensor, "b r q"]) -> Float[Tensor, "b r d"]:
        return F.softplus(wide(self.sharpness(query))) * F.normalize(wide(self.query(query)), dim=2, eps=1e-6)

    def compare(self, asked: Float[Tensor, "b r d"], keys: Float[Tensor, "b l d"]) -> Float[Tensor, "b r l"]:
        return torch.bmm(asked, keys.mT)
