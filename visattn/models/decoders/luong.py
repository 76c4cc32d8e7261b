"""Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine Translation (EMNLP 2015)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.memory.core import MemoryAttention
from visattn.attention.memory.multiplicative import MultiplicativeAttention
from visattn.models.decoders.core import First
from visattn.models.decoders.recurrent import Cell, Initial, Kind, RecurrentDecoder, State, Told, Turn
from visattn.models.network import at_least_one


class LuongDecoder(RecurrentDecoder):
    r"""Take a step, then look: the new state asks, and what it finds is said, and told to the next step.

    .. math:: h_t = \operatorname{LSTM}([E y_{t-1}; \tilde h_{t-1}],\, h_{t-1}), \quad
        \tilde h_t = \tanh(W_c [z_t; h_t]), \quad p(y_t) = \operatorname{softmax}(W_o \tilde h_t)

    where :math:`z_t` is what :math:`h_t` reads. :math:`\tilde h_{t-1}` as an input ("input feeding") lets a step know
    where was looked before. Several cells stand one on the other; the first state of the first is a tanh layer on the
    mean region, since no encoder hands over a state.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory.
        hidden: Units of a cell.
        embedding: Features of a word.
        depth: How many cells there are.
        cell: ``"lstm"`` or ``"gru"``.
        feeding: Whether what a step says is told to the next.
        initial: What the first state is made of: the ``"mean"`` region, the ``"last"``, or ``"zeros"``.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number between cells, and of what words are said from.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> decoder = LuongDecoder(100, 32)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape
        torch.Size([2, 5, 12, 100])
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = MultiplicativeAttention,
        hidden: int = 512,
        embedding: int = 512,
        depth: int = 1,
        cell: Kind = "lstm",
        feeding: bool = True,
        initial: Initial = "mean",
        first: First = "begin",
        dropout: float = 0.2,
    ):
        super().__init__(
            vocabulary,
            memory,
            attention=attention,
            hidden=hidden,
            embedding=embedding,
            initial=initial,
            first=first,
            cell=cell,
        )
        at_least_one(depth=depth)
        self.cells = nn.ModuleList([Cell(embedding, hidden if feeding else 0, hidden, kind=cell)])
        self.cells += [Cell(hidden, 0, hidden, kind=cell) for _ in range(depth - 1)]
        self.feeding = feeding
        self.dropout = nn.Dropout(dropout)
        self.join = nn.Linear(self.attention.features + hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, vocabulary)

    def turn(self, known: Float[Tensor, "*b g"], prepared: Told, state: State) -> Turn:
        cells = [self.cells[0](known, state.fed, state.cells[0])]
        for cell, past in zip(list(self.cells)[1:], state.cells[1:], strict=True):
            cells.append(cell(cell.known(self.dropout(cells[-1][0])), None, past))  # type: ignore[operator]
        query = cells[-1][0]
        found, maps, after = self.look(query, prepared, state.attention)
        said = self.dropout(self.join(torch.cat((found, query), -1)).tanh())
        return (said,), maps, State(tuple(cells), said if self.feeding else None, after)

    def features(self, vectors: Float[Tensor, "*b e"], found: tuple[Tensor, ...]) -> Float[Tensor, "*b h"]:
        (said,) = found
        return said

    def write(self, features: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        return self.out(features)
