"""Xu et al.: Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (ICML 2015)."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention, Prepared
from visattn.models.decoders.cells import Cell, Kind
from visattn.models.decoders.core import Decoder, Embedding, First, Said, stacked, summary
from visattn.models.network import at_least_one

Gate = Literal["scalar", "vector", "none"]
Initial = Literal["mean", "last", "zeros"]
Output = Literal["deep", "state"]


class Told(NamedTuple):
    """A memory made ready."""

    regions: Prepared
    begin: tuple[Float[Tensor, "b h"], ...]
    """The state of the cell before the first word."""


class State(NamedTuple):
    """What is kept from word to word."""

    cell: tuple[Float[Tensor, "b r h"], ...]
    attention: Any


class ShowAttendAndTell(Decoder):
    r"""Look at the regions before each word: a recurrent cell asks, and reads what it finds in the same step.

    .. math:: z_t = \beta_t \sum_i a_{ti} v_i, \quad \beta_t = \sigma(w^\top h_{t-1} + b), \quad
        h_t = \operatorname{LSTM}([E y_{t-1}; z_t],\, h_{t-1}), \\
        p(y_t) = \operatorname{softmax}\bigl(W_o \tanh(W_h h_t + E y_{t-1} + W_z z_t)\bigr)

    where :math:`a_t` is asked for by :math:`h_{t-1}`, and :math:`h_0, c_0` are tanh layers on the mean region. As in
    the released code, which has the tanh in the output that the paper's equation lacks, a scalar :math:`\beta_t`, and
    zeros before the first word.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory.
        hidden: Units of the cell.
        embedding: Features of a word.
        cell: ``"lstm"`` as in the paper, or ``"gru"``.
        gate: Whether what is read is gated by one number, a ``"scalar"``, by a ``"vector"``, as others have it, or by
            ``"none"``.
        initial: What the first state is made of: the ``"mean"`` region, the ``"last"``, or ``"zeros"``.
        output: Whether words are said from state, word and region together, ``"deep"``, or from the ``"state"``.
        first: What stands before the first word: ``"zeros"`` as in the paper, or a learned vector, ``"begin"``.
        tied: Whether words are said by the same vectors that they are read by.
        dropout: Probability to drop a number of the state, and of what words are said from.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> decoder = ShowAttendAndTell(100, 32)
        >>> prepared = decoder.prepare(torch.randn(2, 49, 32))
        >>> said = decoder(prepared, torch.randint(100, (2, 5, 11)))  # five captions of eleven words for each image
        >>> decoder.write(said.features).shape, said.maps.shape
        (torch.Size([2, 5, 12, 100]), torch.Size([2, 5, 12, 49]))
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = AdditiveAttention,
        hidden: int = 512,
        embedding: int = 512,
        cell: Kind = "lstm",
        gate: Gate = "scalar",
        initial: Initial = "mean",
        output: Output = "deep",
        first: First = "zeros",
        tied: bool = False,
        dropout: float = 0.5,
    ):
        super().__init__(vocabulary, memory)
        at_least_one(hidden=hidden, embedding=embedding)
        for name, given, kinds in (("gate", gate, Gate), ("initial", initial, Initial), ("output", output, Output)):
            if given not in get_args(kinds):
                raise ValueError(f"{name} must be {' or '.join(get_args(kinds))}, got {given!r}")
        self.words = Embedding(vocabulary, embedding, first=first)
        self.attention = attention(hidden, memory)
        read = self.attention.features
        self.cell = Cell(embedding, read, hidden, kind=cell)
        self.gate = None if gate == "none" else nn.Linear(hidden, 1 if gate == "scalar" else read)
        self.initial: Initial = initial
        self.start = None if initial == "zeros" else nn.Linear(memory, self.cell.states * hidden)
        self.dropout = nn.Dropout(dropout)
        self.from_state = nn.Linear(hidden, embedding) if output == "deep" or (tied and hidden != embedding) else None
        self.from_region = nn.Linear(read, embedding, bias=False) if output == "deep" else None
        self.out = nn.Linear(embedding if self.from_state else hidden, vocabulary)
        if tied:
            self.out.weight = self.words.weight

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Told:
        regions = self.attention.prepare(memory, mask, size)
        if self.start is None:
            begin = (memory.new_zeros(memory.shape[0], self.cell.width),) * self.cell.states
        else:
            which: Any = self.initial
            begin = self.start(summary(memory, mask, which)).tanh().chunk(self.cell.states, -1)
        return Told(regions, tuple(begin))

    def begin(self, prepared: Told, count: int) -> State:
        return State(tuple(each[:, None].expand(-1, count, -1) for each in prepared.begin), None)

    def step(
        self, word: Int[Tensor, "b r"] | None, prepared: Told, state: State
    ) -> tuple[Float[Tensor, "b r d"], Any, State]:
        vector = self.words.one(word, state.cell[0].shape[:2])
        found, maps, state = self._look(self.cell.known(vector), prepared, state)
        return self._features(state.cell[0], vector, found), maps, state

    def forward(self, prepared: Told, words: Int[Tensor, "b r t"]) -> Said:
        vectors = self.words(words)
        known = self.cell.known(vectors).unbind(2)  # for all steps at once
        state = self.begin(prepared, words.shape[1])
        hidden, found, maps = [], [], []
        for each in known:
            region, where, state = self._look(each, prepared, state)
            hidden.append(state.cell[0])
            found.append(region)
            maps.append(where)
        return Said(self._features(torch.stack(hidden, 2), vectors, torch.stack(found, 2)), stacked(maps))

    def _look(
        self, known: Float[Tensor, "b r g"], prepared: Told, state: State
    ) -> tuple[Float[Tensor, "b r e"], Any, State]:
        query = state.cell[0]
        weights, after = self.attention.attend(query, prepared.regions, state.attention)
        found = self.attention.read(query, prepared.regions, state.attention, weights=weights)
        if self.gate is not None:
            found = found * self.gate(query).sigmoid()
        return found, weights, State(self.cell(known, found, state.cell), after)

    def _features(
        self, hidden: Float[Tensor, "*b h"], vector: Float[Tensor, "*b e"], found: Float[Tensor, "*b z"]
    ) -> Float[Tensor, "*b d"]:
        features = self.dropout(hidden)
        if self.from_state is not None:
            features = self.from_state(features)
        if self.from_region is not None:
            features = self.dropout((features + vector + self.from_region(found)).tanh())
        return features

    def write(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        return self.out(features)
