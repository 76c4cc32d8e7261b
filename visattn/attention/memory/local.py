"""Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine Translation (EMNLP 2015), local."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention, Prepared, places, scoring, spread
from visattn.attention.memory.multiplicative import MultiplicativeAttention


class LocalAttention(MemoryAttention):
    r"""Look at what is around one place, most at its middle.

    .. math:: z = \sum_{i \in \Omega} a_i v_i, \quad a_i = \operatorname{softmax}_{i \in \Omega}(e_i)\,
        \exp\Bigl(-\frac{|x_i - p|^2}{2 \sigma^2}\Bigr), \quad \sigma = \frac{D}{2}

    The window :math:`\Omega` reaches :math:`D` regions from the region nearest to :math:`p`, in a row of words or on a
    map both ways; what is beyond the border is left out. Weights do not sum to one, and :math:`p` learns from the bell
    alone. Scores are those of any attention that is a softmax of them.

    ============== =================================================================================================
    ``alignment``  the place :math:`p`
    ============== =================================================================================================
    predictive     :math:`(S - 1)\, \sigma(U \tanh(W q))` for a memory of :math:`S` words, or rows and columns
    monotonic      at step :math:`t` word :math:`t`; on a map the mean place of the last look, at first the middle
    ============== =================================================================================================

    Differs from the paper: it has words only, and :math:`S` for :math:`S - 1`, which leaves the memory. Our
    :math:`q, U` are their :math:`h_t, v_p^\top`.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        alignment: One of the above.
        radius: Regions :math:`D` that the window reaches.
        axes: 1 for words; 2 for a map, which is to have a size.
        width: Units of the perceptron that predicts a place.
        attention: Attention that gives the scores.

    Raises:
        ValueError: If a number is less than 1, ``alignment`` or ``axes`` is unknown, or the attention has
            more than a softmax of scores.

    Example:
        >>> attention = LocalAttention(16, 32, radius=2)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1508.04025"

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        alignment: Literal["predictive", "monotonic"] = "predictive",
        radius: int = 10,
        axes: Literal[1, 2] = 2,
        width: int = 512,
        attention: Callable[[int, int], MemoryAttention] = MultiplicativeAttention,
    ):
        super().__init__(query, memory)
        if alignment not in ("predictive", "monotonic"):
            raise ValueError(f"alignment must be predictive or monotonic, got {alignment!r}")
        if axes not in (1, 2):
            raise ValueError(f"axes must be 1 or 2, got {axes}")
        for name, number in {"radius": radius, "width": width}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.alignment, self.radius, self.axes = alignment, radius, axes
        self.attention = scoring(attention(query, memory))
        self.size = self.attention.size
        if alignment == "predictive":
            self.hidden = nn.Linear(query, width, bias=False)
            self.centre = nn.Linear(width, axes, bias=False)

    @property
    def features(self) -> int:
        return self.attention.features

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.alignment == "monotonic"

    @property
    def needs_size(self) -> bool:  # type: ignore[override]
        return self.axes == 2 or self.attention.needs_size

    def extra_repr(self) -> str:
        return f"alignment={self.alignment}, radius={self.radius}, axes={self.axes}"

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        super().prepare(memory, mask, size)  # refuses what does not fit
        return self.attention.prepare(memory, mask, size)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Float[Tensor, "b r axes"] | None = None
    ) -> tuple[Float[Tensor, "b r l"], Float[Tensor, "b r axes"] | None]:
        scores = self.attention.scores(query, prepared)
        where = places(scores, prepared.size if self.axes == 2 else None)
        centre = self._centre(query, prepared, where) if state is None else state
        near = (where - centre.detach().round()[:, :, None]).abs().amax(3) <= self.radius
        mask = near if prepared.mask is None else near & prepared.mask[:, None]
        bell = torch.exp((where - centre[:, :, None]).square().sum(3) * (-2 / self.radius**2))
        weights = spread(scores, mask) * bell
        return weights.to(query.dtype), self._after(weights, centre, where) if self.stateful else None

    def _centre(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, where: Float[Tensor, "l axes"]
    ) -> Float[Tensor, "b r axes"]:
        """The place of a query that has no last look."""
        end = where[-1].expand(query.shape[0], 1, -1)
        if self.axes == 1 and prepared.mask is not None:
            end = (prepared.mask.sum(1) - 1).clamp_min(0).to(end.dtype)[:, None, None]
        if self.alignment == "predictive":
            return end * wide(self.centre(torch.tanh(self.hidden(query)))).sigmoid()
        return (end * (0.5 if self.axes == 2 else 0)).expand(-1, query.shape[1], -1)

    def _after(
        self, weights: Float[Tensor, "b r l"], centre: Float[Tensor, "b r axes"], where: Float[Tensor, "l axes"]
    ) -> Float[Tensor, "b r axes"]:
        """The place of the next step."""
        if self.axes == 1:
            return centre + 1
        total = weights.sum(2, keepdim=True)
        return torch.where(total > 0, weights @ where / torch.where(total > 0, total, 1), centre)
