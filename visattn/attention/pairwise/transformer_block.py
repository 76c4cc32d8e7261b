"""Xiong et al.: On Layer Normalization in the Transformer Architecture (ICML 2020), on feature maps."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.pairwise.multi_head import MultiHeadSelfAttention2d


class TransformerBlock2d(Attention):
    r"""Multi-head attention between positions and a perceptron at each, both with a residual connection.

    .. math::
        \text{pre:}\quad & z = x + \gamma_1 \odot A(\mathrm{LN}(x)), \quad y = z + \gamma_2 \odot M(\mathrm{LN}(z)) \\
        \text{post:}\quad & z = \mathrm{LN}(x + \gamma_1 \odot A(x)), \quad y = \mathrm{LN}(z + \gamma_2 \odot M(z))

    The norm before each part is the paper's; after the sum is where the first transformer has it (arXiv:1706.03762).
    From the vision transformer (arXiv:2010.11929) is the GELU of the perceptron, from CaiT (arXiv:2103.17239) the
    learned factor :math:`\gamma` of every channel. A stack of pre-norm blocks wants one more norm at its end. The place
    is that of DETR (arXiv:2005.12872), the last map of a backbone.

    Args:
        channels: Channels :math:`c` of the feature map.
        heads: How many heads share the channels.
        norm: Whether layer norm comes before each part or after the sum.
        expansion: Ratio by which the layer inside the perceptron is wider than ``channels``.
        layer_scale: What :math:`\gamma` starts from; None: there is none. With 0 a fresh pre-norm block returns its
            input, and learns.
        positions: As in :class:`MultiHeadSelfAttention2d`.
        causal: As there.
        size: As there.

    Raises:
        ValueError: If ``norm`` is unknown or ``expansion`` is not positive, and as :class:`MultiHeadSelfAttention2d`.

    Example:
        >>> TransformerBlock2d(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2002.04745"
    place = "head"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 8,
        norm: Literal["pre", "post"] = "pre",
        expansion: int = 4,
        layer_scale: float | None = None,
        positions: Literal["sinusoidal", "sinusoidal-1d", "learned", "relative", "rotary"] | None = None,
        causal: bool = False,
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be pre or post, got {norm!r}")
        if expansion < 1:
            raise ValueError(f"expansion must be positive, got {expansion}")
        self.norm, self.layer_scale = norm, layer_scale
        self.attention = MultiHeadSelfAttention2d(channels, heads=heads, positions=positions, causal=causal, size=size)
        self.perceptron = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])
        self.gammas: Iterable[Tensor | None] = (None, None)
        if layer_scale is not None:
            self.gammas = nn.ParameterList([torch.full((channels,), layer_scale) for _ in range(2)])

    @property
    def identity_at_init(self) -> bool:
        return self.norm == "pre" and self.layer_scale == 0

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        return self.attention.attend(_outside(self.norms[0](_inside(x))) if self.norm == "pre" else x)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b c h w"]:
        return self._around(x, partial(self.attention.read, weights=weights))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self._around(x, self.attention)

    def _around(self, x: Float[Tensor, "b c h w"], attention: Callable[[Tensor], Tensor]) -> Float[Tensor, "b c h w"]:
        parts: list[Callable[[Tensor], Tensor]] = [lambda t: _inside(attention(_outside(t))), self.perceptron]
        tokens = _inside(x)
        for part, norm, gamma in zip(parts, self.norms, self.gammas, strict=True):
            y = part(norm(tokens) if self.norm == "pre" else tokens)
            tokens = tokens + (y if gamma is None else gamma * y)
            tokens = norm(tokens) if self.norm == "post" else tokens
        return _outside(tokens).to(x.dtype)


def _inside(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w c"]:
    return x.movedim(1, -1).contiguous()


def _outside(x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
    return x.movedim(-1, 1)
