"""Vaswani et al.: Attention Is All You Need (NeurIPS 2017), on feature maps."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import scaled_dot_product
from visattn.attention.pairwise.core import Softmax
from visattn.attention.pairwise.positions import LearnedPositions, RelativeSoftmax, rotate, sinusoid, sinusoid_2d


class MultiHeadSelfAttention2d(Attention):
    r"""Let every position of a feature map read from every other, in several ways at once.

    .. math:: y_i = W_o\, \bigl[\textstyle\sum_j \operatorname{softmax}_j(q_i^{a\top} k_j^a / \sqrt d)\, v_j^a\bigr]_a

    Each head :math:`a` has its own :math:`d = c / \text{heads}` features of query, key and value. There is no residual
    connection; :class:`TransformerBlock2d` has one. The paper has no feature maps; the place is that of DETR
    (arXiv:2005.12872), the last map of a backbone.

    ============== ==============================================================================================
    ``positions``  what a head knows of places
    ============== ==============================================================================================
    None           nothing
    sinusoidal     sines and cosines of row and column are added to the map, half of the channels each
    sinusoidal-1d  those of the place row by row, in all channels, as in the paper
    learned        a learned vector for every position is added, resized for maps of another size
    relative       :math:`q^\top (r^h_{\Delta y} + r^w_{\Delta x})` is added to :math:`q^\top k`, with learned vectors
                   of distances that the heads share (arXiv:1904.09925)
    rotary         queries and keys turn with row and column (arXiv:2104.09864, arXiv:2403.13298)
    ============== ==============================================================================================

    Args:
        channels: Channels :math:`c` of the feature map.
        heads: How many heads share the channels.
        positions: One of the above.
        causal: Whether a position reads only itself and those before it, row by row.
        bias: Whether the four projections have biases.
        size: Height and width of the feature map, for learned and relative positions.

    Raises:
        ValueError: If ``channels`` is not divisible by ``heads`` or as ``positions`` want, ``positions`` is unknown,
            ``size`` is missing where it is needed, or a map for relative positions is of another size.

    Example:
        >>> MultiHeadSelfAttention2d(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1706.03762"
    place = "head"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 8,
        positions: Literal["sinusoidal", "sinusoidal-1d", "learned", "relative", "rotary"] | None = None,
        causal: bool = False,
        bias: bool = True,
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels={channels}, got {heads}")
        if positions not in (None, "sinusoidal", "sinusoidal-1d", "learned", "relative", "rotary"):
            raise ValueError(
                f"positions must be None, sinusoidal, sinusoidal-1d, learned, relative or rotary, got {positions!r}"
            )
        if positions in ("learned", "relative") and size is None:
            raise ValueError("size must be the (height, width) of the feature map, got None")
        width = channels // heads
        divisor = {"sinusoidal": 4, "sinusoidal-1d": 2, "rotary": 4 * heads}.get(positions or "", 1)
        if channels % divisor:
            raise ValueError(f"channels must be divisible by {divisor} for {positions} positions, got {channels}")
        self.heads, self.positions, self.size = heads, positions, size
        self.query = nn.Linear(channels, channels, bias=bias)
        self.key = nn.Linear(channels, channels, bias=bias)
        self.value = nn.Linear(channels, channels, bias=bias)
        self.out = nn.Linear(channels, channels, bias=bias)
        self.affinity = Softmax(width**-0.5, causal=causal)
        if positions == "relative" and size:
            self.affinity = RelativeSoftmax(width, size, causal=causal)
        if positions == "learned" and size:
            self.learned = LearnedPositions(channels, size)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        query, key = self._compared(self._tokens(x), x.shape[2:])
        return self.affinity.weights(query.flatten(0, 1), key.flatten(0, 1)).unflatten(0, (-1, self.heads))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b c h w"]:
        return self._write(x, weights @ self._split(self.value(self._tokens(x))))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = self._tokens(x)
        query, key = self._compared(tokens, x.shape[2:])
        value = self._split(self.value(tokens))
        if self.positions == "relative":
            y = self.affinity.read(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
            return self._write(x, y.unflatten(0, (-1, self.heads)))
        scale, causal = self.affinity.scale, self.affinity.causal
        return self._write(x, scaled_dot_product(query, key, value, causal=causal, scale=scale))

    def _tokens(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        channels, height, width = x.shape[1:]
        if self.positions == "sinusoidal":
            x = x + sinusoid_2d(height, width, channels, dtype=x.dtype, device=x.device)
        elif self.positions == "sinusoidal-1d":
            places = torch.arange(height * width, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            x = x + sinusoid(places, channels).mT.unflatten(1, (height, width)).to(x.dtype)
        elif self.positions == "learned":
            x = x + self.learned(height, width).to(x.dtype)
        return x.movedim(1, -1).flatten(1, 2).contiguous()

    def _compared(
        self, tokens: Float[Tensor, "b n c"], grid: torch.Size
    ) -> tuple[Float[Tensor, "b heads n d"], Float[Tensor, "b heads n d"]]:
        query, key = self._split(self.query(tokens)), self._split(self.key(tokens))
        if self.positions == "rotary":
            query, key = (rotate(each.unflatten(2, grid)).flatten(2, 3) for each in (query, key))
        elif self.positions == "relative" and grid != self.size:
            raise ValueError(f"size must be {self.size} as constructed, got {tuple(grid)}")
        return query, key

    def _split(self, projected: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n d"]:
        return projected.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b c h w"]:
        return self.out(y.transpose(1, 2).flatten(2)).unflatten(1, x.shape[2:]).movedim(-1, 1).to(x.dtype)
