"""Graves, Wayne, Danihelka: Neural Turing Machines (2014), a small one."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import uncast, wide
from visattn.attention.memory.core import MemoryAttention, Prepared, places, spread
from visattn.attention.memory.cosine import CosineAttention


class Tape(NamedTuple):
    """What a query has made of the memory, and where it looked last."""

    memory: Float[Tensor, "b r l m"]
    read: Float[Tensor, "b r l"]
    write: Float[Tensor, "b r l"]


class AddressableMemory(MemoryAttention):
    r"""Read from a memory by content and by place, and write to it: each query has its own.

    .. math:: z_t = \sum_i w_{ti} M_{t-1, i}, \quad
        M_{ti} = M_{t-1, i} \odot (1 - \omega_{ti}\, \epsilon_t) + \omega_{ti}\, \alpha_t, \quad M_{0i} = W v_i + b

    Reading weights :math:`w` and writing weights :math:`\omega` are each found by a head of their own:

    .. math:: c = \operatorname{softmax}_i\bigl(\beta \cos(k, M_{t-1, i})\bigr), \quad
        g = \gamma c + (1 - \gamma)\, w_{t-1}, \quad \tilde w_i = \sum_j s_j\, g_{i - j}, \quad
        w_i = \tilde w_i^\rho \Big/ \sum_j \tilde w_j^\rho

    Key :math:`k`, strength :math:`\beta > 0`, gate :math:`\gamma`, shifts :math:`s` (a softmax), sharpness
    :math:`\rho \geq 1`, and what is erased, :math:`\epsilon`, and added, :math:`\alpha`, are linear in the query but
    for their ranges. A shift that leaves the row of words, or the map, comes in from the other side. The memory begins
    as the regions; the first step is preceded by one that looked everywhere alike. Reading comes before writing.

    Differs from the paper: its memory begins empty, and on a map it is ours. Our :math:`w_{t-1}, \gamma, s, \rho,
    \epsilon, \alpha` are their :math:`\mathbf w_{t-1}, g, \mathbf s, \gamma, \mathbf e, \mathbf a`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        width: Features of a cell, and of what is read.
        reach: Regions that a shift goes at most along every axis.
        axes: 1 for words; 2 for a map, which is to have a size.

    Raises:
        ValueError: If a number is less than 1, ``reach`` is negative, or ``axes`` is unknown.

    Example:
        >>> attention = AddressableMemory(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> read, state = attention(torch.randn(2, 5, 16), prepared)  # five queries each
        >>> attention(torch.randn(2, 5, 16), prepared, state)[0].shape  # the next step
        torch.Size([2, 5, 64])
    """

    paper = "arXiv:1410.5401"
    stateful = True

    def __init__(self, query: int, memory: int, *, width: int = 64, reach: int = 1, axes: Literal[1, 2] = 2):
        super().__init__(query, memory)
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if reach < 0:
            raise ValueError(f"reach must not be negative, got {reach}")
        if axes not in (1, 2):
            raise ValueError(f"axes must be 1 or 2, got {axes}")
        self.axes = axes
        self.cell = nn.Linear(memory, width)
        self.reading, self.writing = (Head(query, width, reach, axes) for _ in range(2))
        self.erase = nn.Linear(query, width)
        self.add = nn.Linear(query, width)

    @property
    def features(self) -> int:
        return self.cell.out_features

    @property
    def needs_size(self) -> bool:  # type: ignore[override]
        return self.axes == 2

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l 0"]:
        return memory[..., :0]

    def values(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l m"]:
        return self.cell(memory)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Tape | None = None
    ) -> tuple[Float[Tensor, "b r l"], Tape]:
        self.check(query)
        tape = self._begin(query, prepared) if state is None else state
        size = prepared.size if self.axes == 2 else None
        read = self.reading(query, tape.memory, tape.read, prepared.mask, size)
        write = self.writing(query, tape.memory, tape.write, prepared.mask, size)
        erase, add = wide(self.erase(query)).sigmoid(), wide(self.add(query))
        where = write[..., None]
        written = tape.memory * (1 - where * erase[:, :, None]) + where * add[:, :, None]
        return read.to(query.dtype), Tape(written, read, write)

    def read(
        self,
        query: Float[Tensor, "b r q"],
        prepared: Prepared,
        state: Tape | None = None,
        *,
        weights: Float[Tensor, "b r l"],
    ) -> Float[Tensor, "b r m"]:
        if state is None:
            return super().read(query, prepared, state, weights=weights)
        with uncast(query.device):
            return (wide(weights)[:, :, None] @ state.memory).squeeze(2).to(query.dtype)

    def _begin(self, query: Float[Tensor, "b r q"], prepared: Prepared) -> Tape:
        """Nothing is written yet, and looked at is everything."""
        memory = wide(prepared.values)[:, None].expand(-1, query.shape[1], -1, -1)
        alike = spread(torch.zeros_like(memory[..., 0]), prepared.mask)
        return Tape(memory, alike, alike)


class Head(nn.Module):
    """Where to read or to write.

    Args:
        query: Features of a query.
        width: Features of a cell.
        reach: Regions that a shift goes at most along every axis.
        axes: 1 for words, 2 for a map.
    """

    def __init__(self, query: int, width: int, reach: int, axes: int):
        super().__init__()
        self.reach = reach
        self.content = CosineAttention(query, width)
        self.gate = nn.Linear(query, 1)
        self.shift = nn.Linear(query, (2 * reach + 1) ** axes)
        self.sharpness = nn.Linear(query, 1)

    def forward(
        self,
        query: Float[Tensor, "b r q"],
        memory: Float[Tensor, "b r l m"],
        before: Float[Tensor, "b r l"],
        mask: Bool[Tensor, "b l"] | None,
        size: tuple[int, int] | None,
    ) -> Float[Tensor, "b r l"]:
        """Return the weights of this step, by those of the step before."""
        key, gate = self.content.ask(query), wide(self.gate(query)).sigmoid()
        shift, sharpness = wide(self.shift(query)).softmax(2), 1 + F.softplus(wide(self.sharpness(query)))
        with uncast(query.device):
            scores = (self.content.keys(memory.flatten(0, 1)) @ key.flatten(0, 1)[..., None]).view(before.shape)
            looks = torch.lerp(before, spread(scores, mask), gate)
            moved = (looks[..., self._sources(looks, shift, size)] @ shift[..., None]).squeeze(3)
            logs = moved.clamp_min(torch.finfo(moved.dtype).tiny).log()  # the powers might all be too small for a float
            return spread(sharpness * logs, mask)

    def _sources(
        self, looks: Float[Tensor, "b r l"], shift: Float[Tensor, "b r k"], size: tuple[int, int] | None
    ) -> Int[Tensor, "l k"]:
        """From where each shift brings a weight to each region."""
        side = 2 * self.reach + 1
        steps = places(shift, None if size is None else (side, side)).long() - self.reach
        where = places(looks, size).long()
        source = (where[:, None] - steps) % (where[-1] + 1)
        return source[..., 0] if size is None else source[..., 0] * size[1] + source[..., 1]
