"""Hermann et al.: Teaching Machines to Read and Comprehend (NeurIPS 2015)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.core import uncast, wide
from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import Prepared, silenced, spread


class AttentiveReader(AdditiveAttention):
    r"""Look once, and say together what was asked and what was found.

    .. math:: y = \tanh(W_g r + U_g q), \quad r = \sum_i a_i v_i, \quad
        a = \operatorname{softmax}_i\bigl(u^\top \tanh(W_q q + W_k v_i + b)\bigr)

    Differs from the paper: the perceptron has a bias. Our :math:`q, v, y, W_k, W_q, u, W_g, U_g` are their
    :math:`u, y_d, g, W_{ym}, W_{um}, w_{ms}, W_{rg}, W_{ug}`.

    Args:
        query: Features of a query, and of what is said.
        memory: Features of the memory.
        width: Units of the perceptron.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> attention = AttentiveReader(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five questions about each
        torch.Size([2, 5, 16])
    """

    paper = "arXiv:1506.03340"

    def __init__(self, query: int, memory: int, *, width: int = 512):
        super().__init__(query, memory, width=width)
        self.found = nn.Linear(memory, query, bias=False)
        self.asked = nn.Linear(query, query, bias=False)

    @property
    def features(self) -> int:
        return self.asks

    def read(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None, *, weights: Float[Tensor, "b r l"]
    ) -> Float[Tensor, "b r q"]:
        return self._say(query, prepared, super().read(query, prepared, state, weights=weights))

    def _say(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, found: Float[Tensor, "b r d"]
    ) -> Float[Tensor, "b r q"]:
        said = (self.found(found.to(query.dtype)) + self.asked(query)).tanh()
        return silenced(said.to(query.dtype), prepared)


class ImpatientReader(AttentiveReader):
    r"""Look again with each word of a question, knowing what was found with those before.

    .. math:: y_t = \tanh(W_g r_t + U_g q_t), \quad r_t = \sum_i a_{ti} v_i + \tanh(W_r r_{t-1}), \\
        a_t = \operatorname{softmax}_i\bigl(u^\top \tanh(W_q q_t + U_r r_{t-1} + W_k v_i + b)\bigr)

    What was found, :math:`r`, is the state; before the first word it is zero.

    Differs from the paper: the perceptron has a bias, and something is said at each word, by the word itself, where the
    paper speaks once, at the end, by the question as a whole. Our :math:`q_t, v, y, W_k, W_q, U_r, u, W_r, W_g, U_g`
    are their :math:`y_q(i), y_d, g, W_{dm}, W_{qm}, W_{rm}, w_{ms}, W_{rr}, W_{rg}, W_{qg}`.

    Args:
        query: Features of a query, and of what is said.
        memory: Features of the memory.
        width: Units of the perceptron.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> attention = ImpatientReader(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> read, state = attention(torch.randn(2, 5, 16), prepared)  # the first words of five questions about each
        >>> attention(torch.randn(2, 5, 16), prepared, state)[0].shape  # the next words
        torch.Size([2, 5, 16])
    """

    stateful = True

    def __init__(self, query: int, memory: int, *, width: int = 512):
        super().__init__(query, memory, width=width)
        self.before = nn.Linear(memory, width, bias=False)
        self.kept = nn.Linear(memory, memory, bias=False)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Float[Tensor, "b r d"] | None = None
    ) -> tuple[Float[Tensor, "b r l"], Float[Tensor, "b r d"]]:
        self.check(query)
        asked = wide(self.ask(query))
        if state is not None:
            asked = asked + wide(self.before(state.to(query.dtype)))
        with uncast(query.device):
            weights = spread(self.compare(asked, prepared.keys), prepared.mask).to(query.dtype)
        return weights, self._find(query, prepared, state, weights)

    def read(
        self,
        query: Float[Tensor, "b r q"],
        prepared: Prepared,
        state: Float[Tensor, "b r d"] | None = None,
        *,
        weights: Float[Tensor, "b r l"],
    ) -> Float[Tensor, "b r q"]:
        return self._say(query, prepared, self._find(query, prepared, state, weights))

    def forward(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Float[Tensor, "b r d"] | None = None
    ) -> tuple[Float[Tensor, "b r q"], Float[Tensor, "b r d"]]:
        """Return what is said, and what was found, which is the state after it."""
        _, found = self.attend(query, prepared, state)
        return self._say(query, prepared, found), found

    def _find(
        self,
        query: Float[Tensor, "b r q"],
        prepared: Prepared,
        state: Float[Tensor, "b r d"] | None,
        weights: Float[Tensor, "b r l"],
    ) -> Float[Tensor, "b r d"]:
        """What is found with this word and those before."""
        found = torch.bmm(weights.to(prepared.values.dtype), prepared.values)
        return found if state is None else found + self.kept(state.to(query.dtype)).tanh()
