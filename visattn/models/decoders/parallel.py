"""What parallel decoders have in common: no step waits for what another found, so all can be taken at once."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention, Prepared, fits
from visattn.attention.pairwise.positions import sinusoid, sinusoid_2d
from visattn.models.decoders.core import Decoder, Embedding, Said, over

Maps = Literal["last", "all"]


class ParallelDecoder(Decoder):
    """A decoder that takes any number of steps at once: all of a sentence, or the next one.

    A subclass has ``words`` and takes steps by :meth:`turn`, in which a step knows the words before it, whether they
    come with it or are kept in the state.
    """

    parallel = True

    words: Embedding

    def turn(self, vectors: Float[Tensor, "b r t e"], prepared: Any, state: Any) -> tuple[Tensor, Any, Any]:
        """Take as many steps as there are words: return the features of the next ones, the maps, and the state after.

        Args:
            vectors: The words, or what stands before the first.
            prepared: What :meth:`prepare` returned.
            state: What :meth:`begin` or the steps before returned.
        """
        raise NotImplementedError

    def step(self, word: Int[Tensor, "b r"] | None, prepared: Any, state: Any) -> tuple[Tensor, Any, Any]:
        vectors = self.words.one(word, tree_leaves(state)[0].shape[:2])
        features, maps, state = self.turn(vectors[:, :, None], prepared, state)
        return features[:, :, 0], over(lambda each: each[:, :, 0], maps), state

    def forward(self, prepared: Any, words: Int[Tensor, "b r t"], lengths: Int[Tensor, "b r"] | None = None) -> Said:
        features, maps, _ = self.turn(self.words(words), prepared, self.begin(prepared, words.shape[1]))
        return Said(features, maps)


class LayeredDecoder(ParallelDecoder):
    """A parallel decoder that looks in each of its layers.

    Attention that picks is taught by its picks: while it learns, all layers say where they looked.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        depth: How many layers there are.
        placed: Whether places of regions are told, which wants features for rows and columns.
        maps: Whether the ``"last"`` layer says where it looked, or ``"all"`` do, in an axis behind the steps.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(self, vocabulary: int, memory: int, *, depth: int, placed: bool, maps: Maps):
        super().__init__(vocabulary, memory)
        if maps not in get_args(Maps):
            raise ValueError(f"maps must be {' or '.join(get_args(Maps))}, got {maps!r}")
        if placed and memory % 4:
            raise ValueError(f"memory must be divisible by 4 to be told its places, got {memory}")
        self.holds, self.placed, self.depth, self.maps = memory, placed, depth, maps
        self.watched = range(depth) if maps == "all" else range(depth - 1, depth)

    def forward(
        self,
        prepared: Any,
        words: Int[Tensor, "b r t"],
        lengths: Int[Tensor, "b r"] | None = None,
        choice: Int[Tensor, "b r s *looks"] | None = None,
    ) -> Said:
        """Take all steps, with the words known that are said before each step but the first.

        Args:
            prepared: What :meth:`prepare` returned.
            words: What is said; of t words come t + 1 steps.
            lengths: How many steps of each sentence count. All are taken.
            choice: The regions to read from in each step, for attention that picks, with the axes of its maps while it
                learns; None: those that it draws.
        """
        features, maps, _ = self.turn(self.words(words), prepared, self.begin(prepared, words.shape[1]), choice)
        return Said(features, maps)

    def turn(
        self,
        vectors: Float[Tensor, "b r t e"],
        prepared: Any,
        state: Any,
        choice: Int[Tensor, "b r t *looks"] | None = None,
    ) -> tuple[Tensor, Any, Any]:
        """Take as many steps as there are words, as said of :class:`ParallelDecoder`.

        Args:
            vectors: The words, or what stands before the first.
            prepared: What :meth:`prepare` returned.
            state: What :meth:`begin` or the steps before returned.
            choice: As of :meth:`forward`.
        """
        raise NotImplementedError

    def look(
        self,
        layer: int,
        attention: MemoryAttention,
        query: Float[Tensor, "b r t q"],
        prepared: Prepared,
        choice: Int[Tensor, "b r t *looks"] | None = None,
    ) -> tuple[Float[Tensor, "b r t e"], Any]:
        """Return what all steps of all sentences read, and where they look, if this layer is to say so.

        Raises:
            ValueError: If there is a choice for attention that does not pick.
        """
        asked, options = query.flatten(1, 2), {}
        if choice is not None:
            if not attention.hard:
                raise ValueError(f"choice must be None for {type(attention).__name__}, which does not pick")
            each = choice[:, :, :, layer] if self.maps == "all" or self.depth > 1 else choice
            options = {"choice": each.flatten(1, 2)}
        if layer in self.watched or (attention.hard and attention.training):
            weights, _ = attention.attend(asked, prepared, **options)
            read = attention.read(asked, prepared, weights=weights)
        else:
            (read, _), weights = attention(asked, prepared), None
        return over(lambda each: each.unflatten(1, query.shape[1:3]), (read, weights))

    def seen(self, maps: list[Any]) -> Any:
        """Return the maps of the last layer, or of all that are to say where they looked, side by side."""
        if self.maps == "last" and (self.depth == 1 or maps[0] is None):
            return maps[-1]
        return tree_map(lambda *each: torch.stack(each, 3), *maps)

    def placing(self, memory: Float[Tensor, "b l d"], size: tuple[int, int] | None) -> Float[Tensor, "b l d"]:
        """Add to regions where they are: sines and cosines of rows and columns, or of places in a row."""
        fits(memory, self.holds, size)
        if size is None:
            return memory + row(memory, 0, memory.shape[1])
        return memory + sinusoid_2d(*size, self.holds, dtype=memory.dtype, device=memory.device).flatten(1).mT


def row(like: Float[Tensor, "*b d"], start: int, count: int) -> Float[Tensor, "t d"]:
    """Return sines and cosines of places in a row, as many features as there are."""
    places = torch.arange(start, start + count, device=like.device, dtype=wide(like).dtype)
    return sinusoid(places, like.shape[-1]).to(like.dtype)


def recent(
    x: Float[Tensor, "b r t c"], past: Float[Tensor, "b r p c"], count: int, dilation: int = 1
) -> tuple[Float[Tensor, "b r t d"], Float[Tensor, "b r p c"]]:
    """Return at each step the last ``count`` inputs side by side, and what later steps want to know of the past.

    Args:
        x: The inputs.
        past: Those before; ``(count - 1) * dilation`` of them are wanted.
        count: How many inputs a step has.
        dilation: How many steps they are apart.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
        >>> windows, past = recent(x, torch.zeros(1, 1, 1, 1), 2)
        >>> windows.squeeze(), past.item()
        (tensor([[0., 1.],
                [1., 2.],
                [2., 3.]]), 3.0)
    """
    steps, kept = x.shape[2], past.shape[2]
    x = torch.cat((past, x), 2)
    windows = [x[:, :, i * dilation : i * dilation + steps] for i in range(count)]
    return torch.cat(windows, 3), x[:, :, x.shape[2] - kept :]
