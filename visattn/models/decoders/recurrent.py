"""What recurrent decoders have in common: cells whose inputs come in parts, where they start, and how they step."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from visattn.attention.core import plain
from visattn.attention.memory.core import MemoryAttention, Prepared
from visattn.models.at_once import AtOnce
from visattn.models.decoders.core import Decoder, Embedding, First, Said, over, stacked
from visattn.models.decoders.packing import Packing, Step
from visattn.models.network import at_least_one

Kind = Literal["lstm", "gru"]
Initial = Literal["mean", "last", "zeros"]
STATES: dict[Kind, int] = {"lstm": 2, "gru": 1}
"""How many vectors the state of a cell has; the first is what others see."""


class Now(NamedTuple):
    """What holds for one step only."""

    asks: Int[Tensor, "b r"] | None = None
    """Which of the captions that go on asks at each place of the attention's queries; None: they are those places."""
    finds: Int[Tensor, " n"] | None = None
    """At which of those places each caption that goes on finds its answer."""
    choice: Int[Tensor, "b r *heads"] | None = None
    """The regions to read from, for an attention that picks; None: those that it draws."""


class Told(NamedTuple):
    """A memory made ready."""

    regions: Prepared
    begin: tuple[Float[Tensor, "b h"], ...]
    """The state of the first cell before the first word."""
    mean: Float[Tensor, "b d"]
    """The mean of the regions."""
    now: Now = Now()


class State(NamedTuple):
    """What is kept from word to word."""

    cells: tuple[tuple[Float[Tensor, "b r h"], ...], ...]
    """The state of each cell."""
    fed: Float[Tensor, "b r e"] | None
    """What a word leaves to the next beside it."""
    attention: Any


Turn = tuple[tuple[Tensor, ...], Any, State]
"""What a step found, where it looked, and the state after it."""


class RecurrentDecoder(Decoder):
    """A decoder of recurrent cells, which takes what the words say to all steps at once, and then step by step.

    A subclass has ``cells`` and says what happens in a step, by :meth:`turn`, and what a word is said from, by
    :meth:`features`.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory.
        hidden: Units of a cell.
        embedding: Features of a word.
        initial: What the first state is made of: the ``"mean"`` region, the ``"last"``, or ``"zeros"``.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        cell: What the first cell is: ``"lstm"`` or ``"gru"``.
    """

    cells: nn.ModuleList

    asks: ClassVar[int] = 1
    """How many times as many features as a cell has a query has."""

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention],
        hidden: int,
        embedding: int,
        initial: Initial,
        first: First,
        cell: Kind,
    ):
        super().__init__(vocabulary, memory)
        at_least_one(hidden=hidden, embedding=embedding)
        if cell not in STATES:
            raise ValueError(f"cell must be {' or '.join(STATES)}, got {cell!r}")
        if initial not in get_args(Initial):
            raise ValueError(f"initial must be {' or '.join(get_args(Initial))}, got {initial!r}")
        self.words = Embedding(vocabulary, embedding, first=first)
        self.attention = self.carried(attention(hidden, memory), self.asks * hidden)
        self.initial: Initial = initial
        self.start = None if initial == "zeros" else nn.Linear(memory, STATES[cell] * hidden)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Told:
        regions, mean = self.attention.prepare(memory, mask, size), summary(memory, mask)
        cell: Any = self.cells[0]
        if self.start is None:
            begin = (memory.new_zeros(memory.shape[0], cell.width),) * cell.states
        else:
            of = mean if self.initial == "mean" else summary(memory, mask, "last")
            begin = self.start(of).tanh().chunk(cell.states, -1)
        return Told(regions, begin, mean)

    def begin(self, prepared: Told, count: int) -> State:
        first = tuple(each[:, None].expand(-1, count, -1) for each in prepared.begin)
        others = [(torch.zeros_like(first[0]),) * cell.states for cell in list(self.cells)[1:]]  # type: ignore[operator]
        return State((first, *others), None, None)

    def ahead(self, vectors: Float[Tensor, "b r *t e"], prepared: Told) -> Float[Tensor, "b r *t g"]:
        """Return what the first cell makes of the words, for all steps at once."""
        cell: Any = self.cells[0]
        return cell.known(vectors)

    def turn(self, known: Float[Tensor, "*b g"], prepared: Told, state: State) -> Turn:
        """Take a step: return what was found in it, where was looked, and the state after it."""
        raise NotImplementedError

    def features(self, vectors: Float[Tensor, "*b e"], found: tuple[Tensor, ...]) -> Float[Tensor, "*b d"]:
        """Return what the next word is said from, by the last one and what was found."""
        raise NotImplementedError

    def look(self, query: Float[Tensor, "*b q"], prepared: Told, state: Any) -> tuple[Tensor, Any, Any]:
        """Return what a query reads, where it looks, and the attention's state after it."""
        asks, finds, choice = prepared.now
        query = query if asks is None else query[asks]
        options = {} if choice is None else {"choice": choice}
        weights, after = self.attention.attend(query, prepared.regions, state, **options)
        found = self.attention.read(query, prepared.regions, state, weights=weights)
        return found if finds is None else found.flatten(0, 1)[finds], weights, after

    def step(
        self, word: Int[Tensor, "b r"] | None, prepared: Told, state: State
    ) -> tuple[Float[Tensor, "b r d"], Any, State]:
        vectors = self.words.one(word, state.cells[0][0].shape[:2])
        found, maps, state = self.turn(self.ahead(vectors, prepared), prepared, state)
        return self.features(vectors, found), maps, state

    def forward(
        self,
        prepared: Told,
        words: Int[Tensor, "b r t"],
        lengths: Int[Tensor, "b r"] | None = None,
        choice: Int[Tensor, "b r s *heads"] | None = None,
    ) -> Said:
        """Take all steps, with the words known that are said before each step but the first.

        Args:
            prepared: What :meth:`prepare` returned.
            words: What is said; of t words come t + 1 steps.
            lengths: How many steps of each sentence count; None: all. Others are not taken, and have zeros.
            choice: The regions to read from in each step, for an attention that picks; None: those that it draws.

        Raises:
            ValueError: If there is a choice for attention that does not pick.
        """
        if choice is not None and not self.attention.hard:
            raise ValueError(f"choice must be None for {type(self.attention).__name__}, which does not pick")
        vectors, state = self.words(words), self.begin(prepared, words.shape[1])
        known = self.ahead(vectors, prepared)
        packing = None if lengths is None else Packing(lengths, known.shape[2])
        if packing is None:
            inputs = known.unbind(2)
        else:
            inputs, vectors = packing.split(packing.pack(known)), packing.pack(vectors)
            choice = None if choice is None else packing.sort_each(choice)
            state = state._replace(cells=over(packing.sort, state.cells))
        everything, maps = [], []
        with nullcontext() if plain(vectors) else AtOnce(len(inputs)):
            for t, each in enumerate(inputs):
                now = Now(choice=None if choice is None else choice[:, :, t])
                if packing is not None:
                    now, state = going(packing.step(t), now, state)
                turned, where, state = self.turn(each, prepared._replace(now=now), state)
                everything.append(turned)
                maps.append(where)
        if packing is None:
            found = tuple(torch.stack(each, 2) for each in zip(*everything, strict=True))
            return Said(self.features(vectors, found), stacked(maps))
        found = tuple(torch.cat(each) for each in zip(*everything, strict=True))
        return Said(packing.unpack(self.features(vectors, found)), packing.maps(maps))


def going(step: Step, now: Now, state: State) -> tuple[Now, State]:
    """Return what holds for those sentences alone that go on."""
    cells, fed = over(lambda x: x[: step.going], (state.cells, state.fed))
    attention, choice = over(lambda x: x[:, : step.width], (state.attention, now.choice))
    return Now(step.asks, step.finds, choice), State(cells, fed, attention)


class Cell(nn.Module):
    r"""A long short-term memory, or a gated recurrent unit, whose inputs come in parts.

    .. math:: \begin{pmatrix} i & f & g & o \end{pmatrix} = W_x x + W_z z + W_h h + b, \quad
        c' = \sigma(f)\, c + \sigma(i) \tanh g, \quad h' = \sigma(o) \tanh c'

    Args:
        known: Features of what is known of all steps before the first, such as words.
        found: Features of what is found step by step; 0: nothing.
        width: Units.
        kind: ``"lstm"`` or ``"gru"``.
    """

    def __init__(self, known: int, found: int, width: int, *, kind: Kind = "lstm"):
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"cell must be {' or '.join(get_args(Kind))}, got {kind!r}")
        self.kind, self.width = kind, width
        gates = 4 if kind == "lstm" else 3
        self.known = nn.Linear(known, gates * width)
        self.found = nn.Linear(found, gates * width, bias=False) if found else None
        self.hidden = nn.Linear(width, gates * width, bias=kind == "gru")  # the reset gate stands before its bias
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    @property
    def states(self) -> int:
        """How many vectors its state has; the first is what others see."""
        return STATES[self.kind]

    def forward(
        self,
        known: Float[Tensor, "*b g"],
        found: Float[Tensor, "*b z"] | None,
        state: tuple[Float[Tensor, "*b h"], ...],
    ) -> tuple[Float[Tensor, "*b h"], ...]:
        """Return the state after a step.

        Args:
            known: What ``self.known`` made of what is known.
            found: What was found in this step; None: nothing yet.
            state: The state before it.
        """
        hidden = self.hidden(state[0])
        if found is not None and self.found is not None:
            known = known + self.found(found)
        if self.kind == "lstm":
            in_, forget, new, out = (known + hidden).chunk(4, -1)
            memory = torch.addcmul(forget.sigmoid() * state[1], in_.sigmoid(), new.tanh())
            return out.sigmoid() * memory.tanh(), memory
        reset, update, new = known.chunk(3, -1)
        old_reset, old_update, old = hidden.chunk(3, -1)
        new = (new + (reset + old_reset).sigmoid() * old).tanh()
        return (new + (update + old_update).sigmoid() * (state[0] - new),)


class Layers(nn.Module):
    """Recurrent layers one on the other, all of whose inputs are known: torch's own take all steps at once.

    Args:
        known: Features of an input.
        width: Units of a layer.
        depth: How many layers there are.
        kind: ``"lstm"`` or ``"gru"``.
        dropout: Probability to drop a number between layers.
    """

    def __init__(self, known: int, width: int, *, depth: int = 1, kind: Kind = "lstm", dropout: float = 0.0):
        super().__init__()
        self.cells = nn.ModuleList(Cell(width if n else known, 0, width, kind=kind) for n in range(depth))
        self.dropout = dropout

    @property
    def states(self) -> int:
        """How many vectors the state of a layer has."""
        return self._each()[0].states

    def forward(
        self, x: Float[Tensor, "b t d"], state: tuple[Float[Tensor, "depth b h"], ...]
    ) -> tuple[Float[Tensor, "b t h"], tuple[Float[Tensor, "depth b h"], ...]]:
        """Return the outputs of the last layer, and the state of all after the last step."""
        if plain(x):
            return self._one_by_one(x, state)
        weights = []
        for cell in self._each():
            bias = cell.hidden.bias if cell.hidden.bias is not None else torch.zeros_like(cell.known.bias)
            weights += [each.to(x.dtype) for each in (cell.known.weight, cell.hidden.weight, cell.known.bias, bias)]
        first = [each.to(x.dtype).contiguous() for each in state]
        dropout = self.dropout if self.training else 0.0
        backward = self.training or torch.is_grad_enabled()  # on a GPU there is one of a training pass alone
        options = True, len(self.cells), dropout, backward, False, True
        if self.states == 2:
            y, *after = torch.lstm(x, first, weights, *options)
        else:
            y, *after = torch.gru(x, first[0], weights, *options)
        return y, tuple(after)

    def _one_by_one(
        self, x: Float[Tensor, "b t d"], state: tuple[Float[Tensor, "depth b h"], ...]
    ) -> tuple[Float[Tensor, "b t h"], tuple[Float[Tensor, "depth b h"], ...]]:
        """The same of plain operations, for compilers."""
        last = []
        for n, cell in enumerate(self._each()):
            x = nn.functional.dropout(x, self.dropout, self.training) if n else x
            now, outputs = tuple(each[n] for each in state), []
            for known in cell.known(x).unbind(1):
                now = cell(known, None, now)
                outputs.append(now[0])
            x = torch.stack(outputs, 1)
            last.append(now)
        return x, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def _each(self) -> list[Any]:
        return list(self.cells)


def summary(
    memory: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None, which: Literal["mean", "last"] = "mean"
) -> Float[Tensor, "b d"]:
    """Return the mean of the regions that are there, or the last of them; zeros where there are none."""
    if mask is None:
        return memory.mean(1) if which == "mean" else memory[:, -1]
    if which == "mean":
        chosen = mask / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        chosen = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.bmm(chosen.to(memory.dtype)[:, None], memory)[:, 0]
