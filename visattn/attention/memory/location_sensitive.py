"""Chorowski, Bahdanau, Serdyuk, Cho, Bengio: Attention-Based Models for Speech Recognition (NIPS 2015)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import uncast, wide
from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import Prepared, places, spread


class LocationSensitiveAttention(AdditiveAttention):
    r"""Compare a query with each region by what it holds and by how much the last steps looked around it.

    .. math:: z_t = \sum_i a_{ti} v_i, \quad a_t = \operatorname{softmax}_i(\beta e_{ti}), \quad
        e_{ti} = u^\top \tanh\bigl(W_q q + W_k v_i + U f_{ti} + b\bigr), \quad f_t = F * a_{t-1}

    The convolution's filters :math:`F` run over words, or over a map. At the first step nothing was looked at:
    :math:`a_0 = 0`. With ``cumulative`` the filters also see :math:`\sum_{s<t} a_s`, as in Tacotron 2
    (arXiv:1712.05884).

    A long memory blurs the weights. They get sharper by :math:`\beta > 1`, by leaving only the ``top`` regions of the
    best scores, or only those in a ``window`` around the middle of the last look (the medians of its rows and columns);
    with ``smooth``, :math:`\sigma(\beta e) / \sum \sigma(\beta e)` takes the place of the softmax, and several regions
    are looked at alike.

    Differs from the paper: on a map it is ours. Our :math:`q, v, W_q, W_k, u` are their :math:`s_{i-1}, h_j, W, V, w`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        width: Units of the perceptron.
        filters: Filters of the convolution.
        kernel_size: Regions that a filter sees along every axis.
        axes: 1 for words; 2 for a map, which is to have a size.
        cumulative: Whether the filters also see the sum of all looks before.
        sharpness: Factor :math:`\beta` of the scores.
        top: How many regions a query looks at; None: all.
        window: How many regions from the middle of the last look the next one reaches along every axis; None: all.
        smooth: Whether sigmoids take the place of exponentials.

    Raises:
        ValueError: If a number is less than 1, ``kernel_size`` is even, ``axes`` is unknown, or ``sharpness`` is not
            positive.

    Example:
        >>> attention = LocationSensitiveAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> read, state = attention(torch.randn(2, 5, 16), prepared)  # five queries each
        >>> attention(torch.randn(2, 5, 16), prepared, state)[0].shape  # the next step
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1506.07503"
    stateful = True

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        width: int = 512,
        filters: int = 10,
        kernel_size: int = 5,
        axes: Literal[1, 2] = 2,
        cumulative: bool = False,
        sharpness: float = 1.0,
        top: int | None = None,
        window: int | None = None,
        smooth: bool = False,
    ):
        super().__init__(query, memory, width=width)
        for name, number in {"filters": filters, "top": top, "window": window}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if axes not in (1, 2):
            raise ValueError(f"axes must be 1 or 2, got {axes}")
        if sharpness <= 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        self.axes, self.cumulative, self.sharpness = axes, cumulative, sharpness
        self.top, self.window, self.smooth = top, window, smooth
        make = nn.Conv1d if axes == 1 else nn.Conv2d
        self.filters = make(1 + cumulative, filters, kernel_size, padding="same", bias=False)
        self.location = nn.Linear(filters, width, bias=False)

    @property
    def needs_size(self) -> bool:  # type: ignore[override]
        return self.axes == 2

    def extra_repr(self) -> str:
        return f"sharpness={self.sharpness:.4g}, top={self.top}, window={self.window}, smooth={self.smooth}"

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Float[Tensor, "b r looks l"] | None = None
    ) -> tuple[Float[Tensor, "b r l"], Float[Tensor, "b r looks l"]]:
        mask = prepared.mask
        size = prepared.size if self.axes == 2 else None
        if state is not None:
            with uncast(query.device):
                prepared = prepared._replace(keys=prepared.keys + self._seen(state, size))
        scores = self.sharpness * self.scores(query, prepared)
        if self.window is not None and state is not None:
            mask = _both(_near(state[:, :, 0], size, self.window), mask)
        if self.top is not None and self.top < scores.shape[2]:
            kept = scores if mask is None else scores.masked_fill(~_both(mask, None), -torch.inf)
            best = torch.zeros_like(scores, dtype=torch.bool).scatter(2, kept.topk(self.top).indices, True)
            mask = _both(best, mask)
        weights = spread(F.logsigmoid(scores) if self.smooth else scores, mask)
        looks = [weights]
        if self.cumulative:
            looks.append(weights if state is None else state[:, :, 1] + weights)
        return weights.to(query.dtype), torch.stack(looks, 2)

    def _seen(self, state: Float[Tensor, "b r looks l"], size: tuple[int, int] | None) -> Float[Tensor, "b r l a"]:
        """What the filters say of each region."""
        looks = state.flatten(0, 1)
        looks = looks if size is None else looks.unflatten(2, size)
        convolve = F.conv1d if size is None else F.conv2d
        features = convolve(looks, wide(self.filters.weight), padding="same").flatten(2).mT
        return F.linear(features, wide(self.location.weight)).unflatten(0, state.shape[:2])


def _both(one: Bool[Tensor, "b *r l"], other: Bool[Tensor, "b ... l"] | None) -> Bool[Tensor, "b _ l"]:
    """Where both masks are true, for queries."""
    masks = [mask if mask.ndim == 3 else mask[:, None] for mask in (one, other) if mask is not None]
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def _near(look: Float[Tensor, "b r l"], size: tuple[int, int] | None, window: int) -> Bool[Tensor, "b r l"]:
    """The regions within a window around the middle of a look."""
    look = look.detach()
    where = places(look, size)
    near = torch.ones_like(look, dtype=torch.bool)
    sides = [look] if size is None else [look.unflatten(2, size).sum(axis) for axis in (3, 2)]
    for axis, side in enumerate(sides):
        sums = side.cumsum(2)
        middle = (sums < sums[..., -1:] / 2).sum(2, keepdim=True)
        near = near & ((where[:, axis] - middle).abs() <= window)
    return near
