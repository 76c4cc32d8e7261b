"""Bahdanau et al.: Neural Machine Translation by Jointly Learning to Align and Translate (ICLR 2015), RNNsearch."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention, fits
from visattn.models.decoders.core import First
from visattn.models.decoders.recurrent import STATES, Cell, Kind, Layers, RecurrentDecoder, State, Told, Turn, summary
from visattn.models.network import at_least_one

Initial = Literal["backward", "mean", "last", "zeros"]


class BidirectionalDecoder(RecurrentDecoder):
    r"""Read the regions one after another, there and back, before looking at what was made of them.

    .. math:: u_i = [\overrightarrow h_i; \overleftarrow h_i], \quad
        \overrightarrow h_i = \operatorname{GRU}(v_i,\, \overrightarrow h_{i-1}), \quad
        \overleftarrow h_i = \operatorname{GRU}(v_i,\, \overleftarrow h_{i+1}), \quad
        s_0 = \tanh(W_s \overleftarrow h_1 + b_s), \\
        z_t = \sum_i a_{ti} u_i, \quad s_t = \operatorname{GRU}([E y_{t-1}; z_t],\, s_{t-1}), \\
        p(y_t) = \operatorname{softmax}\bigl(W_o \operatorname{maxout}(W_h s_{t-1} + W_y E y_{t-1} + W_z z_t)\bigr)

    where :math:`a_t` is asked for by :math:`s_{t-1}`, regions come row by row, those that are masked are passed over,
    and maxout takes the greater of each two features.

    Differs from the paper: the reset gate of a GRU stands behind the product of the state, as in torch, and the output
    has a bias. Our :math:`v, u, z, W_h, W_y, W_z` are their :math:`x, h, c, U_o, V_o E, C_o`.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at what was read, called with the features of query and memory.
        hidden: Units of each of the cells.
        embedding: Features of a word.
        maxout: Features of what words are said from.
        cell: ``"gru"`` as in the paper, or ``"lstm"``.
        initial: What the first state is made of: the ``"backward"`` state at the first region, the ``"mean"`` of what
            was read, the ``"last"`` of it, or ``"zeros"``.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number of what words are said from.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> decoder = BidirectionalDecoder(100, 32, hidden=64)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape
        torch.Size([2, 5, 12, 100])
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = AdditiveAttention,
        hidden: int = 1000,
        embedding: int = 620,
        maxout: int = 500,
        cell: Kind = "gru",
        initial: Initial = "backward",
        first: First = "begin",
        dropout: float = 0.0,
    ):
        at_least_one(memory=memory, hidden=hidden, maxout=maxout)
        if initial not in get_args(Initial):
            raise ValueError(f"initial must be {' or '.join(get_args(Initial))}, got {initial!r}")
        super().__init__(
            vocabulary,
            2 * hidden,
            attention=attention,
            hidden=hidden,
            embedding=embedding,
            initial="zeros" if initial == "backward" else initial,
            first=first,
            cell=cell,
        )
        self.holds = memory
        self.readers = nn.ModuleList(Layers(memory, hidden, kind=cell) for _ in range(2))
        self.back = nn.Linear(hidden, STATES[cell] * hidden) if initial == "backward" else None
        read = self.attention.features
        self.cells = nn.ModuleList([Cell(embedding, read, hidden, kind=cell)])
        self.from_state = nn.Linear(hidden, 2 * maxout)
        self.from_word = nn.Linear(embedding, 2 * maxout, bias=False)
        self.from_region = nn.Linear(read, 2 * maxout, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(maxout, vocabulary)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Told:
        fits(memory, self.holds, size)
        backwards = None if mask is None else mask.flip(1)
        there, back = self._along(0, memory, mask), self._along(1, memory.flip(1), backwards)
        told = super().prepare(torch.cat((there, back.flip(1)), 2), mask, size)
        if self.back is None:
            return told
        states = self.back(summary(back, backwards, "last")).tanh()
        return told._replace(begin=states.chunk(len(told.begin), -1))

    def turn(self, known: Float[Tensor, "*b g"], prepared: Told, state: State) -> Turn:
        query = state.cells[0][0]
        found, maps, after = self.look(query, prepared, state.attention)
        cell = self.cells[0](known, found, state.cells[0])
        return (query, found), maps, State((cell,), None, after)

    def features(self, vectors: Float[Tensor, "*b e"], found: tuple[Tensor, ...]) -> Float[Tensor, "*b d"]:
        state, region = found
        deep = self.from_state(state) + self.from_word(vectors) + self.from_region(region)
        return self.dropout(deep.unflatten(-1, (-1, 2)).amax(-1))

    def write(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        return self.out(features)

    def _along(
        self, reader: int, memory: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None
    ) -> Float[Tensor, "b l h"]:
        """Read one region after another, but those that are not there: they are put last, and back again."""
        layers: Layers = self.readers[reader]  # type: ignore[assignment]
        nothing = memory.new_zeros(1, memory.shape[0], self.cells[0].width)  # type: ignore[call-overload]
        begin = (nothing,) * layers.states
        if mask is None:
            return layers(memory, begin)[0]
        order = (~mask).long().argsort(dim=1, stable=True)
        read, _ = layers(memory.gather(1, order[..., None].expand_as(memory)), begin)
        return read.gather(1, order.argsort(1)[..., None].expand_as(read))
