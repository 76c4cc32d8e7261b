"""Self-attention in place of a convolution: all positions read each other, and know distances."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.pairwise.core import read
from visattn.attention.pairwise.positions import RelativeSoftmax


class _RelativeSelfAttention(Attention):
    """Multi-head self-attention of a map of one size, with three bias-free projections and none at the end."""

    replaces = "convolution"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        size: tuple[int, int] | None,
        stride: int,
        heads: int,
        width: int,
        values: int,
        scale_positions: bool = True,
    ):
        super().__init__()
        if size is None:
            raise ValueError("size must be the (height, width) of the feature map, got None")
        if stride < 1:
            raise ValueError(f"stride must be positive, got {stride}")
        self.size, self.stride, self.heads = size, stride, heads
        self.query = nn.Conv2d(channels, heads * width, 1, bias=False)
        self.key = nn.Conv2d(channels, heads * width, 1, bias=False)
        self.value = nn.Conv2d(channels, values, 1, bias=False)
        self.affinity = RelativeSoftmax(width, size, scale_positions=scale_positions)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n m"]:
        weights = self.affinity.weights(self._heads(x, self.query), self._heads(x, self.key))
        return weights.unflatten(0, (-1, self.heads))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b o h2 w2"]:
        return self._write(x, read(self._heads(x, self.value), weights.flatten(0, 1)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        query, key, value = (self._heads(x, layer) for layer in (self.query, self.key, self.value))
        return self._write(x, self.affinity.read(query, key, value))

    def _heads(self, x: Float[Tensor, "b c h w"], project: nn.Module) -> Float[Tensor, "bh n d"]:
        if x.shape[2:] != self.size:
            raise ValueError(f"size must be {self.size} as constructed, got {tuple(x.shape[2:])}")
        return project(x).flatten(2).unflatten(1, (self.heads, -1)).flatten(0, 1).mT

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "bh n d"]) -> Float[Tensor, "b o h2 w2"]:
        y = y.mT.unflatten(0, (-1, self.heads)).flatten(1, 2).contiguous().unflatten(2, x.shape[2:]).to(x.dtype)
        return y if self.stride == 1 else F.avg_pool2d(y, self.stride, ceil_mode=True)
