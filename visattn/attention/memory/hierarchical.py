"""Yang, Yang, Dyer, He, Smola, Hovy: Hierarchical Attention Networks for Document Classification, asked by a query."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention, Prepared, scoring, spread


class HierarchicalAttention(MemoryAttention):
    r"""Choose a window of the map, then the regions in it.

    .. math:: z = \sum_w p(w) \sum_{i \in w} p(i \mid w)\, v_i, \quad
        p(w) = \operatorname{softmax}_w\bigl(e(q, \bar v_w)\bigr), \quad
        p(i \mid w) = \operatorname{softmax}_{i \in w}\bigl(e'(q, v_i)\bigr)

    where :math:`\bar v_w` is the mean region of a window, made once for a memory, and :math:`e, e'` are scores of two
    attentions of one kind. The weights :math:`p(w)\, p(i \mid w)` sum to one over all regions. Windows at the right and
    lower border hold what is left.

    Differs from the paper: the words and sentences of a document are the regions and windows of a map, a query asks in
    place of its context vectors, and the mean stands for what its lower level reads. Our :math:`p(i \mid w), p(w)` are
    their :math:`\alpha_{it}, \alpha_i`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        window: Height and width of a window, in regions; ``(1, k)`` for ``k`` words of a memory of size ``(1, l)``.
        top: How many windows a query looks into; None: all.
        attention: Attention that gives the scores of both levels.

    Raises:
        ValueError: If a number is less than 1, or the attention has more than a softmax of scores, or is for maps of
            one size.

    Example:
        >>> attention = HierarchicalAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "doi:10.18653/v1/N16-1174"
    needs_size = True

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        window: tuple[int, int] = (2, 2),
        top: int | None = None,
        attention: Callable[[int, int], MemoryAttention] = AdditiveAttention,
    ):
        super().__init__(query, memory)
        if min(window) < 1:
            raise ValueError(f"window must be a positive height and width, got {window}")
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        self.window, self.top = window, top
        self.windows, self.regions = (scoring(attention(query, memory), sizes=True) for _ in range(2))

    @property
    def features(self) -> int:
        return self.regions.features

    def extra_repr(self) -> str:
        return f"window={self.window}, top={self.top}"

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        super().prepare(memory, mask, size)  # refuses what does not fit
        assert size is not None
        means, counts = means_of_windows(memory, mask, size, self.window)
        grid = -(-size[0] // self.window[0]), -(-size[1] // self.window[1])
        windows = self.windows.prepare(means, None if mask is None else counts > 0, grid)
        return self.regions.prepare(memory, mask, size)._replace(size=size, more=windows)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r l"], Any]:
        windows, size = prepared.more, prepared.size
        assert size is not None
        weights = spread_in_windows(self.regions.scores(query, prepared), prepared.mask, size, self.window)
        scores, mask = self.windows.scores(query, windows), windows.mask
        if self.top is not None and self.top < scores.shape[2]:
            kept = scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)
            best = torch.zeros_like(scores, dtype=torch.bool).scatter(2, kept.topk(self.top).indices, True)
            mask = best if mask is None else best & mask[:, None]
        weights = weights * spread(scores, mask)[..., None]
        return from_windows(weights, size, self.window).to(query.dtype), state


def in_windows(x: Shaped[Tensor, "*b l"], size: tuple[int, int], window: tuple[int, int]) -> Shaped[Tensor, "*b n k"]:
    """Put the regions of each window of a map side by side; beyond the border there are zeros.

    Example:
        >>> in_windows(torch.arange(1, 7), (2, 3), (2, 2))
        tensor([[1, 2, 4, 5],
                [3, 0, 6, 0]])
    """
    down, across = (-side % each for side, each in zip(size, window, strict=True))
    x = F.pad(x.unflatten(-1, size), (0, across, 0, down))
    x = x.unflatten(-1, (-1, window[1])).unflatten(-3, (-1, window[0]))
    return x.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def from_windows(x: Shaped[Tensor, "*b n k"], size: tuple[int, int], window: tuple[int, int]) -> Shaped[Tensor, "*b l"]:
    """Put the regions back where they were.

    Example:
        >>> from_windows(torch.tensor([[1, 2, 4, 5], [3, 0, 6, 0]]), (2, 3), (2, 2))
        tensor([1, 2, 3, 4, 5, 6])
    """
    x = x.unflatten(-1, window).unflatten(-3, (-(-size[0] // window[0]), -1)).transpose(-3, -2)
    return x.flatten(-2).flatten(-3, -2)[..., : size[0], : size[1]].flatten(-2)


def spread_in_windows(
    scores: Float[Tensor, "b r l"], mask: Bool[Tensor, "b l"] | None, size: tuple[int, int], window: tuple[int, int]
) -> Float[Tensor, "b r n k"]:
    """Spread a weight of one over the regions of each window that are there."""
    there = scores.new_ones(1, scores.shape[2], dtype=torch.bool) if mask is None else mask
    return spread(in_windows(scores, size, window), in_windows(there[:, None], size, window))


def means_of_windows(
    memory: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None, size: tuple[int, int], window: tuple[int, int]
) -> tuple[Float[Tensor, "b n d"], Shaped[Tensor, "#b n"]]:
    """Return the mean of the regions of each window that are there, and how many they are."""
    there = memory.new_ones(1, memory.shape[1], dtype=torch.bool) if mask is None else mask
    counts = in_windows(there, size, window).sum(2)
    sums = in_windows(memory.masked_fill(~there[..., None], 0.0).mT, size, window).sum(3).mT
    return sums / counts.clamp_min(1)[..., None], counts
