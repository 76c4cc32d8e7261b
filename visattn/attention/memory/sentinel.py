"""Lu, Xiong, Parikh, Socher: Knowing When to Look: Adaptive Attention via a Visual Sentinel (CVPR 2017)."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.core import uncast, wide
from visattn.attention.memory.additive import perceptron
from visattn.attention.memory.core import MemoryAttention, Prepared, spread


class SentinelAttention(MemoryAttention):
    r"""Look at the regions, or at what is known without them: at a sentinel that a query brings along.

    .. math:: z = \beta s + \sum_i a_i v_i, \quad
        [a; \beta] = \operatorname{softmax}\bigl([e_1, \dots, e_l, e_s]\bigr), \\
        e_i = u^\top \tanh(W_v v_i + b + W_h h), \quad e_s = u^\top \tanh(W_s s + b + W_h h), \quad
        v_i = \operatorname{ReLU}(W m_i + c)

    A query is a decoder's state :math:`h` and its sentinel :math:`s` side by side, ``2 * query`` features, and the
    regions :math:`m_i` are projected to as many as each of them has. The weights have one more at the end, that of the
    sentinel, which sums to one with the others.

    Differs from the paper: the perceptron has a bias. Our :math:`u, W_v, W_h, \beta s + \sum_i a_i v_i` are their
    :math:`w_h, W_v, W_g, \hat c_t`.

    Args:
        query: Features of the state, and of the sentinel.
        memory: Features of the memory.
        width: Units of the perceptron.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> attention = SentinelAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> weights, _ = attention.attend(torch.randn(2, 5, 16 + 16), prepared)  # five states and sentinels each
        >>> weights.shape, attention.grounding(weights).shape
        (torch.Size([2, 5, 50]), torch.Size([2, 5]))
    """

    paper = "arXiv:1612.01887"

    def __init__(self, query: int, memory: int, *, width: int = 512):
        super().__init__(2 * query, memory)
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.value = nn.Linear(memory, query)
        self.query = nn.Linear(query, width, bias=False)
        self.key = nn.Linear(query, width)
        self.sentinel = nn.Linear(query, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    @property
    def features(self) -> int:
        return self.asks // 2

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        prepared = super().prepare(memory, mask, size)
        return prepared._replace(keys=wide(self.key(prepared.values))[:, None])

    def values(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
        return self.value(memory).relu()

    def scores(self, query: Float[Tensor, "b r q"], prepared: Prepared) -> Float[Tensor, "b r m"]:
        """Return a score of each region, and of the sentinel behind them, in at least float32, under autocast too."""
        self.check(query)
        state, sentinel = query.chunk(2, 2)
        asked, own = wide(self.query(state)), wide(self.sentinel(sentinel))
        with uncast(query.device):
            score = wide(self.score.weight[0])
            regions = perceptron(asked, prepared.keys, score)
            last = (own + wide(self.key.bias) + asked).tanh() @ score
            return torch.cat((regions, last[..., None]), 2)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r m"], Any]:
        mask = prepared.mask
        if mask is not None:
            mask = torch.cat((mask, mask.any(1, keepdim=True)), 1)
        return spread(self.scores(query, prepared), mask).to(query.dtype), state

    def read(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None, *, weights: Float[Tensor, "b r m"]
    ) -> Float[Tensor, "b r e"]:
        regions = super().read(query, prepared, state, weights=weights[..., :-1])
        return regions + weights[..., -1:] * query.chunk(2, 2)[1]

    def grounding(self, weights: Float[Tensor, "*b m"]) -> Float[Tensor, "*b"]:
        r"""Return how much is read from the regions, :math:`1 - \beta`; zero where there are none."""
        return weights[..., :-1].sum(-1)
