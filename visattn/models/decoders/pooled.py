"""Sutskever, Vinyals, Le: Sequence to Sequence Learning with Neural Networks (NeurIPS 2014), of one vector."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.memory.core import fits
from visattn.models.decoders.core import Embedding, First
from visattn.models.decoders.parallel import ParallelDecoder
from visattn.models.decoders.recurrent import Initial, Kind, Layers, summary
from visattn.models.network import at_least_one

Fed = Literal["mean", "last", "none"]


class Told(NamedTuple):
    """A memory made ready."""

    begin: tuple[Float[Tensor, "b h"], ...]
    """The state of the first layer before the first word."""
    fed: Float[Tensor, "b e"] | None
    """What each step is told."""


State = tuple[Float[Tensor, "b r depth h"], ...]


class PooledDecoder(ParallelDecoder):
    r"""Look nowhere: tell all that one vector holds of the image, for comparison with attention.

    .. math:: h_t = \operatorname{LSTM}\bigl([E y_{t-1}; W_v \bar v + b_v],\, h_{t-1}\bigr), \quad
        h_0, c_0 = \tanh(W_h \bar v + b_h), \quad p(y_t) = \operatorname{softmax}(W_o h_t)

    with the mean region :math:`\bar v`, or the last, where the paper has the last state of an encoder. It is told to
    the first state, as in the paper, to each step, or to both. Layers stand one on the other; there are no maps.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        hidden: Units of a layer.
        embedding: Features of a word, and of the image beside it.
        depth: How many layers there are.
        cell: ``"lstm"`` or ``"gru"``.
        initial: What the first state is made of: the ``"mean"`` region, the ``"last"``, or ``"zeros"``.
        fed: What each step is told: the ``"mean"`` region, the ``"last"``, or ``"none"``.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number between layers, and of what words are said from.

    Raises:
        ValueError: If an option is out of its range, or nothing tells of the image.

    Example:
        >>> decoder = PooledDecoder(100, 32, depth=2)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape
        torch.Size([2, 5, 12, 100])
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        hidden: int = 512,
        embedding: int = 512,
        depth: int = 1,
        cell: Kind = "lstm",
        initial: Initial = "mean",
        fed: Fed = "mean",
        first: First = "begin",
        dropout: float = 0.5,
    ):
        super().__init__(vocabulary, memory)
        at_least_one(hidden=hidden, embedding=embedding, depth=depth)
        for name, given, kinds in (("initial", initial, Initial), ("fed", fed, Fed)):
            if given not in get_args(kinds):
                raise ValueError(f"{name} must be {' or '.join(get_args(kinds))}, got {given!r}")
        if initial == "zeros" and fed == "none":
            raise ValueError("initial or fed must tell of the image, got initial='zeros' and fed='none'")
        self.holds, self.hidden = memory, hidden
        self.initial: Initial = initial
        self.fed: Fed = fed
        self.words = Embedding(vocabulary, embedding, first=first)
        inputs = embedding if fed == "none" else 2 * embedding
        self.layers = Layers(inputs, hidden, depth=depth, kind=cell, dropout=dropout)
        self.start = None if initial == "zeros" else nn.Linear(memory, self.layers.states * hidden)
        self.image = None if fed == "none" else nn.Linear(memory, embedding)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, vocabulary)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Told:
        fits(memory, self.holds, size)
        begin = (memory.new_zeros(memory.shape[0], self.hidden),) * self.layers.states
        if self.start is not None and self.initial != "zeros":
            begin = self.start(summary(memory, mask, self.initial)).tanh().chunk(self.layers.states, -1)
        if self.image is None or self.fed == "none":
            return Told(begin, None)
        return Told(begin, self.image(summary(memory, mask, self.fed)))

    def begin(self, prepared: Told, count: int) -> State:
        others = len(self.layers.cells) - 1
        return tuple(
            nn.functional.pad(each[:, None, None].expand(-1, count, -1, -1), (0, 0, 0, others))
            for each in prepared.begin
        )

    def turn(
        self, vectors: Float[Tensor, "b r t e"], prepared: Told, state: State
    ) -> tuple[Float[Tensor, "b r t h"], None, State]:
        shape = vectors.shape[:3]
        if prepared.fed is not None:
            vectors = torch.cat((vectors, prepared.fed[:, None, None].expand(*shape, -1)), 3)
        before = tuple(each.flatten(0, 1).movedim(1, 0) for each in state)
        said, after = self.layers(vectors.flatten(0, 1), before)
        state = tuple(each.movedim(0, 1).unflatten(0, shape[:2]) for each in after)
        return self.dropout(said.unflatten(0, shape[:2])), None, state

    def write(self, features: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        return self.out(features)
