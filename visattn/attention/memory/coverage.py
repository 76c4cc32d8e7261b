"""See, Liu, Manning: Get To The Point: Summarization with Pointer-Generator Networks (ACL 2017), its coverage."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.core import uncast, wide
from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import Prepared, spread


class CoverageAttention(AdditiveAttention):
    r"""Compare a query with each region by what it holds and by how much all steps before looked at it.

    .. math:: z_t = \sum_i a_{ti} v_i, \quad a_t = \operatorname{softmax}_i(e_{ti}), \quad
        e_{ti} = u^\top \tanh\bigl(W_q q + W_k v_i + w\, c_{ti} + b\bigr), \quad c_t = \sum_{s<t} a_s

    :meth:`penalty` is the paper's, which keeps it from looking at a region twice. Our :math:`q, v, W_q, W_k, w, u` are
    their :math:`s_t, h_i, W_s, W_h, w_c, v`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        width: Units of the perceptron.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> attention = CoverageAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> read, state = attention(torch.randn(2, 5, 16), prepared)  # five queries each
        >>> attention(torch.randn(2, 5, 16), prepared, state)[0].shape  # the next step
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1704.04368"
    stateful = True

    def __init__(self, query: int, memory: int, *, width: int = 512):
        super().__init__(query, memory, width=width)
        self.coverage = nn.Linear(1, width, bias=False)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Float[Tensor, "b r l"] | None = None
    ) -> tuple[Float[Tensor, "b r l"], Float[Tensor, "b r l"]]:
        if state is not None:
            with uncast(query.device):
                prepared = prepared._replace(keys=prepared.keys + state[..., None] * wide(self.coverage.weight[:, 0]))
        weights = spread(self.scores(query, prepared), prepared.mask)
        return weights.to(query.dtype), weights if state is None else state + weights

    def penalty(self, weights: Float[Tensor, "*b t l"], mask: Bool[Tensor, "*b t"] | None = None) -> Float[Tensor, ""]:
        r"""Return :math:`\sum_t \sum_i \min(a_{ti}, c_{ti})`, the mean over sequences.

        Args:
            weights: The weights of all steps.
            mask: True at the steps that count; None: at all.
        """
        looks = wide(weights) if mask is None else wide(weights) * mask[..., None]
        return torch.minimum(looks, looks.cumsum(-2) - looks).sum((-2, -1)).mean()
