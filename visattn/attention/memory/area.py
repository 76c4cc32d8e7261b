"""Li, Kaiser, Bengio, Si: Area Attention (ICML 2019), on a memory."""

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention, Prepared, spread
from visattn.attention.pairwise.area import Areas


class AreaMemoryAttention(MemoryAttention):
    r"""Read from all rectangles of a map up to some size.

    .. math:: z = \sum_a \operatorname{softmax}_a(q^\top W_q^\top k_a / \sqrt d)\, \sum_{i \in a} v_i

    The key :math:`k_a` of a rectangle is the mean of the keys :math:`W_k v_i` in it, or made of more, as
    :class:`~visattn.attention.pairwise.area.Areas` says. The weights say what is read from each region: the sum over
    the rectangles that contain it. They sum to the mean number of regions in what is read. What is masked counts in no
    rectangle.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        width: Features :math:`d` of what is compared.
        area: Largest height and width of a rectangle, in regions.
        key: What the key of a rectangle is made of: the ``"mean"`` of the keys in it, or ``"features"``, a perceptron
            on their mean, their standard deviation and its size.

    Raises:
        ValueError: If a number is less than 1, or ``key`` is unknown.

    Example:
        >>> attention = AreaMemoryAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1810.10126"
    needs_size = True

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        width: int = 512,
        area: tuple[int, int] = (3, 3),
        key: Literal["mean", "features"] = "mean",
    ):
        super().__init__(query, memory)
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.query = nn.Linear(query, width, bias=False)
        self.key = nn.Linear(memory, width, bias=False)
        self.areas = Areas(width, area=area, key=key)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        prepared = super().prepare(memory, mask, size)
        keys = self.areas.keys(prepared.keys.to(memory.dtype), self._grid(prepared), mask)
        return prepared._replace(keys=wide(keys))

    def keys(self, memory: Float[Tensor, "b l d"]) -> Float[Tensor, "b l a"]:
        return self.key(memory)

    def scores(self, query: Float[Tensor, "b r q"], prepared: Prepared) -> Float[Tensor, "b r areas"]:
        """Return a score of each rectangle for each query, in at least float32, under autocast too."""
        self.check(query)
        return self.areas.scores(self.query(query), prepared.keys, self._grid(prepared), prepared.mask)

    def attend(
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None
    ) -> tuple[Float[Tensor, "b r l"], Any]:
        grid, scores, mask = self._grid(prepared), self.scores(query, prepared), prepared.mask
        if mask is None:
            return self.areas.dense(spread(scores, None), grid).to(query.dtype), state
        weights = self.areas.dense(spread(scores, self.areas.count(grid, scores, mask) > 0), grid)
        return weights.masked_fill(~mask[:, None], 0.0).to(query.dtype), state

    @staticmethod
    def _grid(prepared: Prepared) -> tuple[int, int]:
        assert prepared.size is not None  # prepare wants it
        return prepared.size
