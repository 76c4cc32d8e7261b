"""Rush, Chopra, Weston: A Neural Attention Model for Abstractive Sentence Summarization (EMNLP 2015)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.core import wide
from visattn.attention.memory.core import Prepared
from visattn.attention.memory.multiplicative import MultiplicativeAttention


class SmoothedAttention(MultiplicativeAttention):
    r"""Find a region by what it holds, and read what is around it.

    .. math:: z = \sum_i a_i \bar v_i, \quad a = \operatorname{softmax}_i(q^\top P v_i), \quad
        \bar v_i = \frac{1}{|\Omega_i|} \sum_{j \in \Omega_i} v_j

    The neighbours :math:`\Omega_i` are those up to :math:`Q` regions away, on a map along both axes if the memory has a
    size; what is masked or beyond the border does not count. They are averaged once for a memory. In the paper the
    query is what the last few words are embedded as, and so knows no state: all steps can ask at once.

    Differs from the paper: it divides by :math:`Q`, at the ends too. Our :math:`q, v, z` are their
    :math:`\tilde y'_c, \tilde x, \mathrm{enc}`, and :math:`P` is transposed.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        radius: Regions :math:`Q` up to which neighbours are averaged.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> attention = SmoothedAttention(16, 32)
        >>> prepared = attention.prepare(torch.randn(2, 49, 32), size=(7, 7))  # two images
        >>> attention(torch.randn(2, 5, 16), prepared)[0].shape  # five queries each
        torch.Size([2, 5, 32])
    """

    paper = "arXiv:1509.00685"

    def __init__(self, query: int, memory: int, *, radius: int = 2):
        super().__init__(query, memory)
        if radius < 1:
            raise ValueError(f"radius must be at least 1, got {radius}")
        self.radius = radius

    def extra_repr(self) -> str:
        return f"radius={self.radius}"

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        prepared = super().prepare(memory, mask, size)
        grid = (1, memory.shape[1]) if size is None else size
        values = wide(prepared.values)
        if mask is None:
            return prepared._replace(values=self._average(values, grid).to(memory.dtype))
        means = self._average(values.masked_fill(~mask[..., None], 0.0), grid)
        share = self._average(mask[..., None].to(values.dtype), grid)  # of the neighbours that are there
        return prepared._replace(values=(means / torch.where(share > 0, share, 1)).to(memory.dtype))

    def _average(self, x: Float[Tensor, "b l d"], grid: tuple[int, int]) -> Float[Tensor, "b l d"]:
        """The mean of the neighbours on the map."""
        reach = tuple(min(self.radius, side - 1) for side in grid)
        window = tuple(2 * each + 1 for each in reach)
        pooled = F.avg_pool2d(x.mT.unflatten(2, grid), window, 1, reach, count_include_pad=False)
        return pooled.flatten(2).mT
