"""Jetley, Lord, Lee, Torr: Learn To Pay Attention (ICLR 2018)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax


class PayAttention(Attention):
    r"""Sum the positions of a map by how compatible each is with what the network says of the whole image.

    .. math:: y = \sum_i a_i\, W x_i, \quad a = \operatorname{softmax}_i(c_i), \quad
        c_i = u^\top (W x_i + g) \ \text{ or } \ (W x_i)^\top g

    :math:`g` is a global vector, a further input; left out, the mean of the map. :math:`W` is there where its width is
    another than that of the map. With the softmax, the first, parametrised form does not depend on :math:`g` at all:
    what it adds is the same at every position. :math:`W` is applied to what asks and to what is read, not to the map.

    Args:
        channels: Channels :math:`c` of the map.
        global_channels: Width :math:`d` of the global vector and of what is returned; None: ``channels``.
        compatibility: ``"parametrised"`` by :math:`u`, or the ``"dot"`` product.
        normalise: ``"softmax"`` as in the paper; or ``"sigmoid"`` of each :math:`c_i` alone, and the mean of
            :math:`a_i W x_i` in place of their sum, as some do.

    Raises:
        ValueError: If ``compatibility`` or ``normalise`` is unknown, or there is no global vector and
            ``global_channels`` is not ``channels``.

    Example:
        >>> PayAttention(64, global_channels=128)(torch.randn(2, 64, 8, 8), torch.randn(2, 128)).shape
        torch.Size([2, 128])
    """

    paper = "arXiv:1804.02391"
    place = "pool"
    replaces = "pool"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        global_channels: int | None = None,
        compatibility: Literal["parametrised", "dot"] = "parametrised",
        normalise: Literal["softmax", "sigmoid"] = "softmax",
    ):
        super().__init__()
        if compatibility not in ("parametrised", "dot"):
            raise ValueError(f"compatibility must be parametrised or dot, got {compatibility!r}")
        if normalise not in ("softmax", "sigmoid"):
            raise ValueError(f"normalise must be softmax or sigmoid, got {normalise!r}")
        width = global_channels or channels
        self.normalise = normalise
        self.projector = nn.Linear(channels, width, bias=False) if width != channels else None
        self.score = nn.Linear(width, 1, bias=False) if compatibility == "parametrised" else None

    def attend(self, x: Float[Tensor, "b c h w"], g: Float[Tensor, "b d"] | None = None) -> Float[Tensor, "b 1 h w"]:
        if g is None:
            if self.projector is not None:
                raise ValueError(f"g must be given: the mean of the map is not {self.projector.out_features} wide")
            g = x.mean((2, 3))
        query = g if self.score is None else self.score.weight.to(x.dtype)
        if self.projector is not None:
            query = query @ self.projector.weight.to(query.dtype)
        logits = query[:, None] @ x.flatten(2)
        if self.score is not None:
            logits = logits + self.score(g)[:, None]
        weights = softmax(logits) if self.normalise == "softmax" else logits.sigmoid()
        return weights.to(x.dtype).unflatten(2, x.shape[2:])

    def read(
        self,
        x: Float[Tensor, "b c h w"],
        g: Float[Tensor, "b d"] | None = None,
        *,
        weights: Float[Tensor, "b 1 h w"],
    ) -> Float[Tensor, "b d"]:
        found = (x.flatten(2) @ weights.flatten(2).mT)[:, :, 0]
        if self.normalise == "sigmoid":
            found = found / (x.shape[2] * x.shape[3])
        return (found if self.projector is None else self.projector(found)).to(x.dtype)
