"""Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine Translation (EMNLP 2015), global."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.memory.additive import perceptron
from visattn.attention.memory.core import MemoryAttention, Prepared


class MultiplicativeAttention(MemoryAttention):
    r"""Compare a query with each region by a product.

    .. math:: z = \sum_i a_i v_i, \quad a = \operatorname{softmax}_i(e_i), \quad e_i = q^\top W v_i

    =========== ================================================================================================
    ``score``   the score :math:`e_i`
    =========== ================================================================================================
    general     :math:`q^\top W v_i`; the keys :math:`W v_i` are made once for a memory
    dot         :math:`q^\top v_i`, for queries as wide as the memory; nothing is learned
    concat      :math:`u^\top \tanh(W [q; v_i])`, as :class:`~visattn.attention.AdditiveAttention` without its bias
    =========== ================================================================================================

    Our :math:`q, v` are their :math:`h_t, \bar h_s`. Nothing is scaled by the number of features. In the paper the
    query is the decoder's present state, and the next step is told what was read.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        score: One of the above.
        width: Units of the perceptron of ``"concat"``.

    Raises:
        ValueError: If a number is less than 1, ``score`` is unknown, or it is ``"dot"`` and the widths differ.

    Example:
        >>> attention = MultiplicativeAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1508.04025"

    def __init__(
        self, query: int, memory: int, *, score: Literal["general", "dot", "concat"] = "general", width: int = 512
    ):
        super().__init__(query, memory)
        if score not in ("general", "dot", "concat"):
            raise ValueError(f"score must be general, dot or concat, got {score!r}")
        if score == "dot" and query != memory:
            raise ValueError(f"query must have the features of the memory, {memory}, for a dot product, got {query}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.score = score
        if score == "general":
            self.key = nn.Linear(memory, query, bias=False)
        if score == "concat":
            self.query = nn.Linear(query, width, bias=False)
            self.key = nn.Linear(memory, width, bias=False)
            self.sum = nn.Linear(width, 1, bias=False)

    def extra_repr(self) -> str:
        return f"score={self.score}"

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b *one l a"]:
        if self.score == "dot":
            return memory
        return self.key(memory)[:, None] if self.score == "concat" else self.key(memory)

    def ask(self, query: Float[Tensor, "b r q"]) -> Float[Tensor, "b r a"]:
        return self.query(query) if self.score == "concat" else query

    def compare(self, asked: Float[Tensor, "b r a"], keys: Float[Tensor, "b *one l a"]) -> Float[Tensor, "b r l"]:
        if self.score == "concat":
            return perceptron(asked, keys, self.sum.weight[0])
        return torch.bmm(asked, keys.mT)


class LocationAttention(MemoryAttention):
    r"""Choose regions by their places alone, whatever they hold.

    .. math:: z = \sum_i a_i v_i, \quad a = \operatorname{softmax}(W q)

    Differs from the paper: the memory has as many regions as :math:`W` has rows, where the paper leaves out the ends of
    either. Our :math:`q` is their :math:`h_t`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        size: Height and width of the map whose positions are the memory; ``(1, l)`` for :math:`l` words.

    Raises:
        ValueError: If a number is less than 1, ``size`` is missing, or a memory has another.

    Example:
        >>> attention = LocationAttention(16, 32, size=(7, 7))
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1508.04025"

    def __init__(self, query: int, memory: int, *, size: tuple[int, int] | None = None):
        super().__init__(query, memory)
        if size is None:
            raise ValueError("size must be the (height, width) of the map that is the memory, got None")
        if min(size) < 1:
            raise ValueError(f"size must be a positive height and width, got {size}")
        self.size: tuple[int, int] = size
        self.query = nn.Linear(query, size[0] * size[1], bias=False)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        prepared = super().prepare(memory, mask, size)
        regions = self.query.out_features
        if memory.shape[1] != regions:
            raise ValueError(f"memory must have {regions} regions as constructed, got {memory.shape[1]}")
        if size is not None and tuple(size) != tuple(self.size):
            raise ValueError(f"size must be {self.size} as constructed, got {size}")
        return prepared

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l 0"]:
        return memory[..., :0]

    def ask(self, query: Float[Tensor, "b r q"]) -> Float[Tensor, "b r l"]:
        return self.query(query)

    def compare(self, asked: Float[Tensor, "b r l"], keys: Float[Tensor, "b l 0"]) -> Float[Tensor, "b r l"]:
        return asked
