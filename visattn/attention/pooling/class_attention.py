"""Touvron, Cord, Sablayrolles, Synnaeve, Jégou: Going deeper with Image Transformers (ICCV 2021)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.pooling.core import SingleQuery


class ClassAttentionLayer(nn.Module):
    """One layer of class attention and its perceptron, both behind learned scales.

    Args:
        channels: Features of class token and positions.
        heads: Number of heads.
        scale: Where the learned scales start.
    """

    def __init__(self, channels: int, heads: int, scale: float):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = SingleQuery(channels, heads, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.mlp_scale = nn.Parameter(torch.full((channels,), scale))

    def weights(self, token: Float[Tensor, "b c"], positions: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads 1 m"]:
        tokens = self._tokens(token, positions)
        return self.attention.weights(tokens[:, 0], tokens)

    def read(
        self, token: Float[Tensor, "b c"], positions: Float[Tensor, "b n c"], weights: Float[Tensor, "b heads 1 m"]
    ) -> Float[Tensor, "b c"]:
        token = token + self.scale * self.attention.read(self._tokens(token, positions), weights)
        return token + self.mlp_scale * self.mlp(self.mlp_norm(token))

    def _tokens(self, token: Float[Tensor, "b c"], positions: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        return self.norm(torch.cat((token[:, None], positions), 1)).to(positions.dtype)


class ClassAttention(Attention):
    r"""Let a learned class token read the map in a few layers, while the map stays as it is.

    .. math:: z \leftarrow z + \lambda \odot W_o \sum_i \operatorname{softmax}_i(q_z^\top k_i / \sqrt d)\, v_i, \quad
              z \leftarrow z + \lambda' \odot \mathrm{MLP}(\mathrm{LN}(z))

    The keys are the token itself and all positions, each behind a layer norm. The weights have the heads of one layer
    after those of the other, and the token's weight for itself first. As in the paper :math:`\lambda` is learned for
    each channel and starts small. No key and no value is made: both layers act on the query and on what is read. The
    released code's layer of the keys has a bias; it changes nothing and is left out.

    Args:
        channels: Channels :math:`c` of the map.
        heads: Number of heads of each layer.
        layers: Number of layers.
        scale: Where :math:`\lambda` starts.

    Raises:
        ValueError: If ``heads`` does not divide ``channels`` or ``layers`` is not positive.

    Example:
        >>> ClassAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    paper = "arXiv:2103.17239"
    place = "pool"
    replaces = "pool"
    queried = True

    def __init__(self, channels: int, *, heads: int = 8, layers: int = 2, scale: float = 1e-5):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be positive, got {layers}")
        self.token = nn.Parameter(torch.empty(1, channels))
        nn.init.trunc_normal_(self.token, std=0.02)
        self.layers = nn.ModuleList(ClassAttentionLayer(channels, heads, scale) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads 1 m"]:
        return self._walk(x)[1]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b heads 1 m"]) -> Float[Tensor, "b c"]:
        return self._walk(x, weights.chunk(len(self.layers), 1))[0]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return self._walk(x)[0]

    def _walk(
        self, x: Float[Tensor, "b c h w"], given: tuple[Tensor, ...] | None = None
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b heads 1 m"]]:
        positions, used = x.flatten(2).mT, []
        token = self.token.to(x.dtype).expand(x.shape[0], -1)
        layers: list[ClassAttentionLayer] = list(self.layers)  # type: ignore[arg-type]
        for number, layer in enumerate(layers):
            weights = layer.weights(token, positions) if given is None else given[number]
            token = layer.read(token, positions, weights)
            used.append(weights)
        return self.norm(token).to(x.dtype), torch.cat(used, 1)
