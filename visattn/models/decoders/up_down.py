"""Anderson et al.: Bottom-Up and Top-Down Attention for Image Captioning and Visual Question Answering (CVPR 2018)."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention
from visattn.models.decoders.core import First
from visattn.models.decoders.recurrent import Cell, Initial, Kind, RecurrentDecoder, State, Told, Turn


class UpDownDecoder(RecurrentDecoder):
    r"""Have a cell for where to look and another for what to say.

    .. math:: h^1_t = \operatorname{LSTM}_1([h^2_{t-1}; \bar v; E y_{t-1}]), \quad
        h^2_t = \operatorname{LSTM}_2([z_t; h^1_t]), \quad p(y_t) = \operatorname{softmax}(W h^2_t)

    where :math:`z_t` is what :math:`h^1_t` reads, and :math:`\bar v` the mean region. What goes with the paper, regions
    proposed by a detector, is replaced by a grid; its cells start at zeros.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory.
        hidden: Units of a cell.
        embedding: Features of a word.
        cell: ``"lstm"`` as in the paper, or ``"gru"``.
        initial: What the first state of the first cell is made of: the ``"mean"`` region, the ``"last"``, or
            ``"zeros"``.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number of what words are said from.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> decoder = UpDownDecoder(100, 32, hidden=64)
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
        embedding: int = 1000,
        cell: Kind = "lstm",
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
            cell=cell,
        )
        self.cells = nn.ModuleList(
            [
                Cell(embedding, hidden, hidden, kind=cell),
                Cell(hidden, self.attention.features, hidden, kind=cell),
            ]
        )
        self.image = nn.Linear(memory, (4 if cell == "lstm" else 3) * hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, vocabulary)

    def ahead(self, vectors: Float[Tensor, "b r *t e"], prepared: Told) -> Float[Tensor, "b r *t g"]:
        image = self.image(prepared.mean)
        return super().ahead(vectors, prepared) + (image[:, None] if vectors.ndim == 3 else image[:, None, None])

    def turn(self, known: Float[Tensor, "*b g"], prepared: Told, state: State) -> Turn:
        where, what = self.cells
        top = where(known, state.cells[1][0], state.cells[0])
        found, maps, after = self.look(top[0], prepared, state.attention)
        said = what(what.known(top[0]), found, state.cells[1])  # type: ignore[operator]
        return (said[0],), maps, State((top, said), None, after)

    def features(self, vectors: Float[Tensor, "*b e"], found: tuple[Tensor, ...]) -> Float[Tensor, "*b h"]:
        (said,) = found
        return self.dropout(said)

    def write(self, features: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        return self.out(features)
