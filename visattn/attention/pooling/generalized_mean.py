"""Radenović, Tolias, Chum: Fine-tuning CNN Image Retrieval with No Human Annotation (TPAMI 2018)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class GeneralizedMeanPool(Attention):
    r"""Pool every channel by a power mean, between the mean (:math:`p = 1`) and the maximum (:math:`p \to \infty`).

    .. math:: y = \Bigl(\tfrac1n \sum_i x_i^p\Bigr)^{1/p} = \sum_i a_i x_i, \quad a_i = \frac{x_i^{p-1}}{n\, y^{p-1}}

    Here :math:`x` is at least ``floor``, since powers want positive features. The weights say by how much each position
    counts in its channel.

    Args:
        channels: Channels of the map; one exponent serves all.
        exponent: Where :math:`p` starts.
        learned: Whether :math:`p` is learned.
        floor: Least value of a feature.

    Raises:
        ValueError: If ``exponent`` or ``floor`` is not positive.

    Example:
        >>> GeneralizedMeanPool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    paper = "arXiv:1711.02512"
    place = "pool"
    replaces = "pool"

    def __init__(self, channels: int, *, exponent: float = 3.0, learned: bool = True, floor: float = 1e-6):
        super().__init__()
        if exponent <= 0:
            raise ValueError(f"exponent must be positive, got {exponent}")
        if floor <= 0:
            raise ValueError(f"floor must be positive, got {floor}")
        self.floor = floor
        self.exponent = nn.Parameter(torch.tensor([exponent]), requires_grad=learned)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        positive, p = self._positive(x)
        return ((positive / self._mean(positive, p)).pow(p - 1) / x[0, 0].numel()).to(x.dtype)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return (x.clamp(min=self.floor) * weights).sum((2, 3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return self._mean(*self._positive(x)).flatten(1).to(x.dtype)

    def _positive(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "1"]]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(dtype).clamp(min=self.floor), self.exponent.to(dtype)

    def _mean(self, x: Float[Tensor, "b c h w"], p: Float[Tensor, "1"]) -> Float[Tensor, "b c 1 1"]:
        top = x.detach().amax((2, 3), keepdim=True)  # so that no power overflows
        return top * (x / top).pow(p).mean((2, 3), keepdim=True).pow(1 / p)
