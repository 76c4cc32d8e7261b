"""Rush, Chopra, Weston: A Neural Attention Model for Abstractive Sentence Summarization (EMNLP 2015), its decoder."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from visattn.attention.memory.core import MemoryAttention, Prepared
from visattn.attention.memory.smoothed import SmoothedAttention
from visattn.models.decoders.core import Embedding, First
from visattn.models.decoders.parallel import LayeredDecoder, recent
from visattn.models.network import at_least_one


class FeedForwardDecoder(LayeredDecoder):
    r"""Say each word from the last few alone, and from what they ask the regions for.

    .. math:: h_t = \tanh\bigl(U [E y_{t-C}; \dots; E y_{t-1}]\bigr), \quad
        z_t = \sum_i a_{ti} \bar v_i, \quad p(y_t) = \operatorname{softmax}(V h_t + W z_t)

    where :math:`a_t` is asked for by the same words :math:`[G y_{t-C}; \dots; G y_{t-1}]`, with vectors of their own,
    and :math:`\bar v_i` is the mean around a region (:class:`~visattn.attention.SmoothedAttention`).

    Our :math:`z, \bar v, a` are their :math:`\mathrm{enc}, \bar x, p`.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory.
        context: How many words :math:`C` are known.
        embedding: Features of a word, in :math:`E` and in :math:`G`.
        hidden: Features of :math:`h`.
        first: What stands before the first word, ``context`` times: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number of what words are said from.

    Raises:
        ValueError: If an option is out of its range, or the attention depends on earlier looks.

    Example:
        >>> decoder = FeedForwardDecoder(100, 32)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32), size=(7, 7)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape
        torch.Size([2, 5, 12, 100])
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = SmoothedAttention,
        context: int = 5,
        embedding: int = 200,
        hidden: int = 400,
        first: First = "begin",
        dropout: float = 0.0,
    ):
        super().__init__(vocabulary, memory, depth=1, placed=False, maps="last")
        at_least_one(context=context, embedding=embedding, hidden=hidden)
        self.context = context
        self.words = Embedding(vocabulary, 2 * embedding, first=first)
        asks = context * embedding
        self.attention = self.carried(attention(asks, memory), asks)
        self.hidden = nn.Linear(asks, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden + self.attention.features, vocabulary, bias=False)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        return self.attention.prepare(memory, mask, size)

    def begin(self, prepared: Prepared, count: int) -> Float[Tensor, "b r p e"]:
        return self.words.begin(prepared.values.shape[0], count, self.context - 1)

    def turn(
        self,
        vectors: Float[Tensor, "b r t e"],
        prepared: Prepared,
        state: Float[Tensor, "b r p e"],
        choice: Int[Tensor, "b r t *looks"] | None = None,
    ) -> tuple[Float[Tensor, "b r t d"], Any, Float[Tensor, "b r p e"]]:
        windows, after = recent(vectors, state, self.context)
        known, asks = (each.flatten(3) for each in windows.unflatten(3, (self.context, 2, -1)).unbind(4))
        read, maps = self.look(0, self.attention, asks, prepared, choice)
        features = self.dropout(torch.cat((self.hidden(known).tanh(), read), 3))
        return features, self.seen([maps]), after

    def write(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        return self.out(features)
