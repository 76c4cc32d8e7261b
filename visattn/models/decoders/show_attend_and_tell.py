"""Xu et al.: Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (ICML 2015)."""

from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention
from visattn.models.decoders.core import First
from visattn.models.decoders.recurrent import Cell, Initial, Kind, RecurrentDecoder, State, Told, Turn

Gate = Literal["scalar", "vector", "none"]
Output = Literal["deep", "state"]


class ShowAttendAndTell(RecurrentDecoder):
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
        for name, given, kinds in (("gate", gate, Gate), ("output", output, Output)):
            if given not in get_args(kinds):
                raise ValueError(f"{name} must be {' or '.join(get_args(kinds))}, got {given!r}")
        read = self.attention.features
        self.cells = nn.ModuleList([Cell(embedding, read, hidden, kind=cell)])
        self.gate = None if gate == "none" else nn.Linear(hidden, 1 if gate == "scalar" else read)
        self.dropout = nn.Dropout(dropout)
        self.from_state = nn.Linear(hidden, embedding) if output == "deep" or (tied and hidden != embedding) else None
        self.from_region = nn.Linear(read, embedding, bias=False) if output == "deep" else None
        self.out = nn.Linear(embedding if self.from_state else hidden, vocabulary)
        if tied:
            self.out.weight = self.words.weight

    def turn(self, known: Float[Tensor, "*b g"], prepared: Told, state: State) -> Turn:
        query = state.cells[0][0]
        found, maps, after = self.look(query, prepared, state.attention)
        if self.gate is not None:
            found = found * self.gate(query).sigmoid()
        cell = self.cells[0](known, found, state.cells[0])
        return (cell[0], found), maps, State((cell,), None, after)

    def features(self, vectors: Float[Tensor, "*b e"], found: tuple[Tensor, ...]) -> Float[Tensor, "*b d"]:
        hidden, region = found
        features = self.dropout(hidden)
        if self.from_state is not None:
            features = self.from_state(features)
        if self.from_region is not None:
            features = self.dropout((features + vectors + self.from_region(region)).tanh())
        return features

    def write(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        return self.out(features)
