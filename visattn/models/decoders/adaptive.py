"""Lu, Xiong, Parikh, Socher: Knowing When to Look: Adaptive Attention via a Visual Sentinel (CVPR 2017)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.memory.core import MemoryAttention
from visattn.attention.memory.sentinel import SentinelAttention
from visattn.models.decoders.core import First
from visattn.models.decoders.recurrent import Cell, Initial, RecurrentDecoder, State, Told, Turn


class AdaptiveDecoder(RecurrentDecoder):
    r"""Decide at each word whether to look, or to rely on what the decoder knows: a visual sentinel.

    .. math:: x_t = [E y_{t-1}; \operatorname{ReLU}(W_g \bar v)], \quad h_t = \operatorname{LSTM}(x_t,\, h_{t-1}), \quad
        s_t = \sigma(W_x x_t + W_h h_{t-1}) \odot \tanh c_t, \\
        p(y_t) = \operatorname{softmax}\bigl(W_o \tanh(W_p (z_t + h_t))\bigr)

    where :math:`\bar v` is the mean region, :math:`c_t` what the cell keeps, and :math:`z_t` what the present state and
    sentinel :math:`[h_t; s_t]` read, as wide as a state.

    Differs from the paper: as in the released code, the output has a tanh layer. That code's layers on sentinel and
    state before they ask are left out. Our :math:`z, \bar v` are their :math:`\hat c, a^g`.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of state and memory, and asked by state and
            sentinel side by side.
        hidden: Units of the cell.
        embedding: Features of a word, and of the image beside it.
        initial: What the first state is made of: the ``"mean"`` region, the ``"last"``, or ``"zeros"``.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number of what words are said from.

    Raises:
        ValueError: If an option is out of its range, or the attention is not asked by a state and a sentinel.

    Example:
        >>> decoder = AdaptiveDecoder(100, 32)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape
        torch.Size([2, 5, 12, 100])
        >>> decoder.attention.grounding(said.maps).shape  # how much each word is read from the image
        torch.Size([2, 5, 12])
    """

    asks = 2

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = SentinelAttention,
        hidden: int = 512,
        embedding: int = 512,
        initial: Initial = "zeros",
        first: First = "begin",
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
            cell="lstm",
        )
        self.carried(self.attention, 2 * hidden, hidden)
        self.image = nn.Linear(memory, embedding)
        self.cells = nn.ModuleList([Cell(2 * embedding, 0, hidden)])
        self.sentinel = nn.ModuleList([nn.Linear(2 * embedding, hidden), nn.Linear(hidden, hidden, bias=False)])
        self.dropout = nn.Dropout(dropout)
        self.join = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, vocabulary)

    def ahead(self, vectors: Float[Tensor, "b r *t e"], prepared: Told) -> Float[Tensor, "b r *t g"]:
        image = self.image(prepared.mean).relu()
        image = image[:, None] if vectors.ndim == 3 else image[:, None, None]
        inputs = torch.cat((vectors, image.expand_as(vectors)), -1)
        return torch.cat((super().ahead(inputs, prepared), self.sentinel[0](inputs)), -1)

    def turn(self, known: Float[Tensor, "*b g"], prepared: Told, state: State) -> Turn:
        (cell,), (before, *_) = self.cells, state.cells[0]
        known, gate = known.split((4 * cell.width, cell.width), -1)  # type: ignore[operator]
        hidden, kept = cell(known, None, state.cells[0])
        sentinel = (gate + self.sentinel[1](before)).sigmoid() * kept.tanh()
        found, maps, after = self.look(torch.cat((hidden, sentinel), -1), prepared, state.attention)
        return (found + hidden,), maps, State(((hidden, kept),), None, after)

    def features(self, vectors: Float[Tensor, "*b e"], found: tuple[Tensor, ...]) -> Float[Tensor, "*b h"]:
        (joined,) = found
        return self.dropout(self.join(self.dropout(joined)).tanh())

    def write(self, features: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        return self.out(features)
