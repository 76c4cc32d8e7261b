"""Meng, Lu, Wang, Li, Jiang, Liu: Encoding Source Language with Convolutional Neural Network for MT (ACL 2015)."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention, Prepared, scoring, silenced, spread
from visattn.attention.memory.hierarchical import from_windows, in_windows, spread_in_windows


class ConvolutionalSummary(MemoryAttention):
    r"""Sum up the regions by a convolution whose results are gated, from near to far, by what a query is about.

    .. math:: y = \tanh\Bigl(W \sum_w b_w s_w + c\Bigr), \quad s_w = \sum_{i \in w} a_i u_i, \quad
        u = \operatorname{ReLU}(F * v + d), \\
        a = \operatorname{softmax}_{i \in w}\bigl(e(q, u_i)\bigr), \quad
        b = \operatorname{softmax}_w\bigl(e'(q, s_w)\bigr)

    The features :math:`u` are made once for a memory. The first gate chooses in each window of two words, or of two by
    two regions; the second among all windows, by what the first one left of them. The weights of the regions are
    :math:`a_i b_w`. What is masked is zero to the convolution.

    Differs from the paper: it has words only; its gates are single layers, and its guiding signal enters the
    convolution, so that all would be made anew for each query; a second convolution between the gates is left out for
    the same reason. Our :math:`u_i, s_w` are their :math:`z^{(1)}_i, z^{(2)}_i`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        width: Features of the convolution, and of what is read.
        kernel_size: Regions that a filter sees along every axis.
        window: Regions of a window along every axis.
        axes: 1 for words; 2 for a map, which is to have a size.
        attention: Attention that gives the scores of both gates, and the first one the values that are read.

    Raises:
        ValueError: If a number is less than 1, ``kernel_size`` is even, ``axes`` is unknown, or the attention has more
            than a softmax of scores, or is for maps of one size.

    Example:
        >>> attention = ConvolutionalSummary(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 512])
    """

    paper = "arXiv:1503.01838"

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        width: int = 512,
        kernel_size: int = 3,
        window: int = 2,
        axes: Literal[1, 2] = 2,
        attention: Callable[[int, int], MemoryAttention] = AdditiveAttention,
    ):
        super().__init__(query, memory)
        for name, number in {"width": width, "window": window}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if axes not in (1, 2):
            raise ValueError(f"axes must be 1 or 2, got {axes}")
        self.axes = axes
        self.window = (1, window) if axes == 1 else (window, window)
        make = nn.Conv1d if axes == 1 else nn.Conv2d
        self.filters = make(memory, width, kernel_size, padding="same")
        self.near = scoring(attention(query, width), sizes=True)
        self.far = scoring(attention(query, self.near.features), sizes=True)
        self.out = nn.Linear(self.near.features, width)

    @property
    def features(self) -> int:
        return self.out.out_features

    @property
    def needs_size(self) -> bool:  # type: ignore[override]
        return self.axes == 2 or self.near.needs_size

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        super().prepare(memory, mask, size)  # refuses what does not fit
        x = (memory if mask is None else memory.masked_fill(~mask[..., None], 0.0)).mT
        if self.axes == 2:
            assert size is not None
            x = x.unflatten(2, size)
        values = self.filters(x).relu().flatten(2).mT
        near = self.near.prepare(values, mask, size)
        return near._replace(size=size, more=near)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r l"], Any]:
        size = prepared.size if self.axes == 2 and prepared.size is not None else (1, prepared.values.shape[1])
        near = spread_in_windows(self.near.scores(query, prepared.more), prepared.mask, size, self.window)
        regions = in_windows(prepared.values.mT, size, self.window).permute(0, 2, 3, 1)
        sums = (near.to(regions.dtype)[:, :, :, None] @ regions[:, None]).squeeze(3)  # b r n w
        mask = None if prepared.mask is None else in_windows(prepared.mask, size, self.window).any(2)
        each = None if mask is None else mask.repeat_interleave(query.shape[1], 0)
        grid = -(-size[0] // self.window[0]), -(-size[1] // self.window[1])
        asked, windows = query.flatten(0, 1)[:, None], self.far.prepare(sums.flatten(0, 1), each, grid)
        far = self.far.scores(asked, windows).view(near.shape[:3])
        weights = from_windows(near * spread(far, mask)[..., None], size, self.window)
        return weights.to(query.dtype), state

    def read(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None, *, weights: Float[Tensor, "b r l"]
    ) -> Float[Tensor, "b r w"]:
        summary = super().read(query, prepared, state, weights=weights)
        return silenced(self.out(summary).tanh().to(query.dtype), prepared)
