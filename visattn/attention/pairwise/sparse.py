"""Self-attention in groups of positions: a query reaches some keys only, and no matrix of all pairs is made."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import positions_first, scaled_dot_product


class Groups(NamedTuple):
    """Who attends together: the queries of a group read its keys, where they are reached."""

    queries: Int[Tensor, "g t"]
    """Positions of the queries; what fills up the last group repeats a position."""

    keys: Int[Tensor, "g m"]
    """Positions of the keys; likewise, and not reached."""

    reached: Bool[Tensor, "#g #t #m"]
    """Which keys a query reaches."""

    back: Int[Tensor, "n"]
    """Where the result of each position stands among the groups' queries, counted group by group."""


def product(rows: Groups, columns: Groups) -> Groups:
    """Return the groups of a map whose rows and whose columns meet in groups: a pair meets where both do."""
    (_, t), (g, s), width = rows.queries.shape, columns.queries.shape, columns.back.shape[0]
    reached = rows.reached[:, None, :, None, :, None] & columns.reached[None, :, None, :, None]
    reached = reached.flatten(4).flatten(2, 3).flatten(0, 1)
    a, b = rows.back[:, None], columns.back
    back = (a // t * g + b // s) * (t * s) + a % t * s + b % s
    queries, keys = cross(rows.queries * width, columns.queries), cross(rows.keys * width, columns.keys)
    return Groups(queries, keys, reached, back.flatten())


def cross(rows: Shaped[Tensor, "g t"], columns: Shaped[Tensor, "k s"]) -> Shaped[Tensor, "gk ts"]:
    """Where each row of each group meets each column of each, as a sum (of truths: either)."""
    return (rows[:, None, :, None] + columns[None, :, None]).flatten(2).flatten(0, 1)


def causal(positions: Int[Tensor, "g t"], back: Int[Tensor, "n"]) -> Groups:
    """Return groups in which every position reads itself and those before it; what fills them up comes last."""
    taken, order = positions.clamp(max=back.shape[0] - 1), torch.arange(positions.shape[1], device=back.device)
    return Groups(taken, taken, (order <= order[:, None])[None], back)


def even(length: int, most: int) -> int:
    """Return the size of blocks, the fewest of at most ``most``, that share a line evenly.

    A compiled graph is the same for all lines: there they have ``most``.
    """
    return most if torch.compiler.is_compiling() else -(-length // -(-length // most))


def windows(length: int, block: int, window: int, *, clamp: bool, device: torch.device) -> Groups:
    """Return the groups of a line in which every position reads the window around it: blocks of queries, more keys.

    Args:
        length: Positions on the line.
        block: Queries of a group.
        window: Keys of a query, an odd number.
        clamp: Whether a window that would cross an end is moved inside; otherwise it is cut.
        device: Where the groups are made.
    """
    radius = window // 2
    count, size = -(-length // block), torch.sym_min(length, block + window - 1)
    at = torch.arange(length, device=device)
    starts = block * torch.arange(count, device=device)
    queries = (starts[:, None] + torch.arange(block, device=device)).clamp(max=length - 1)
    keys = (starts - radius).clamp(min=0).clamp(max=length - size)[:, None] + torch.arange(size, device=device)
    return Groups(queries, keys, within(queries[:, :, None], keys[:, None], length, window, clamp=clamp), at)


def pair_up(rows: Bool[Tensor, "h k"], columns: Bool[Tensor, "w l"]) -> Bool[Tensor, "hw kl"]:
    """Which positions of a map meet, where their rows and their columns have to."""
    return (rows[:, None, :, None] & columns[None, :, None]).flatten(2).flatten(0, 1)


def within(
    query: Int[Tensor, "*query"], key: Int[Tensor, "*key"], length: int, window: int, *, clamp: bool
) -> Bool[Tensor, "*pair"]:
    """Is the key in the window of the query, on a line of this length?"""
    first = query - window // 2
    if clamp:
        first = first.clamp(max=length - window).clamp(min=0)
    return (key >= first) & (key < first + window)


def weigh(logits: Float[Tensor, "*batch n m"], reached: Bool[Tensor, "*some n m"]) -> Float[Tensor, "*batch n m"]:
    """Softmax over the keys that a query reaches, in at least float32; a query that reaches none weighs none."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = wide.masked_fill(~reached, -torch.inf).softmax(-1)
    return weights.masked_fill(~reached, 0).to(logits.dtype)


def gather(x: Float[Tensor, "n z d"], at: Int[Tensor, "g m"]) -> Float[Tensor, "g z m d"]:
    """Take the positions of each group."""
    return x.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)


def scatter(y: Float[Tensor, "g z t d"], groups: Groups) -> Float[Tensor, "n z d"]:
    """Put the results of the groups' queries where those stand."""
    return y.transpose(1, 2).flatten(0, 1).index_select(0, groups.back)


def attend_in_groups(
    query: Float[Tensor, "n z d"], key: Float[Tensor, "n z d"], value: Float[Tensor, "n z d"], groups: Groups
) -> Float[Tensor, "n z d"]:
    r"""What every position reads, its logits divided by :math:`\sqrt d`; ``z`` counts samples and heads.

    Positions come first, so that a group is gathered in rows and one mask serves all samples and heads of it.
    """
    query, key, value = gather(query, groups.queries), gather(key, groups.keys), gather(value, groups.keys)
    return scatter(scaled_dot_product(query, key, value, mask=groups.reached[:, None]), groups)


def to_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "n b c"]:
    """Positions first, features last."""
    return positions_first(x).contiguous()


class _SparseSelfAttention(Attention):
    """Multi-head self-attention, each query among the keys within its reach."""

    queried = True

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels={channels}, got {heads}")
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def reach(self, height: int, width: int, device: torch.device | None = None) -> Bool[Tensor, "*heads n n"]:
        """Which positions of a map each position reads, positions counted row by row."""
        raise NotImplementedError

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        tokens = to_tokens(x)
        query, key = self._split(self.query(tokens)), self._split(self.key(tokens))
        logits = torch.einsum("nbhd,mbhd->bhnm", query * query.shape[3] ** -0.5, key)
        return weigh(logits, self.reach(x.shape[2], x.shape[3], x.device))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b c h w"]:
        value = self._split(self.value(to_tokens(x)))
        return self._write(x, torch.einsum("bhnm,mbhd->nbhd", weights, value))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = to_tokens(x)
        query, key, value = (self._split(layer(tokens)).flatten(1, 2) for layer in (self.query, self.key, self.value))
        y = attend_in_groups(query, key, value, self._groups(x.shape[2], x.shape[3], x.device))
        return self._write(x, y.unflatten(1, (-1, self.heads)))

    def _split(self, tokens: Float[Tensor, "n b c"]) -> Float[Tensor, "n b heads d"]:
        return tokens.unflatten(2, (self.heads, -1))

    def _groups(self, height: int, width: int, device: torch.device) -> Groups:
        """The same as :meth:`reach`, in groups."""
        raise NotImplementedError

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "n b heads d"]) -> Float[Tensor, "b c h w"]:
        weight = self.out.weight.expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.out.bias[:, None], weight, y.flatten(2).permute(1, 2, 0)).view(x.shape).to(x.dtype)
