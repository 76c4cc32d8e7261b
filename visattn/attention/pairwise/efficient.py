"""Shen, Zhang, Zhao, Yi, Li: Efficient Attention: Attention with Linear Complexities (WACV 2021)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention


def gather_and_mix(
    x: Float[Tensor, "b c n"],
    query: Float[Tensor, "b k n"],
    key: Float[Tensor, "b k n"],
    value: nn.Linear,
    out: nn.Linear,
    heads: int = 1,
) -> Float[Tensor, "b c n"]:
    """Sum values over positions for each feature of a key, mix the sums by the features of a query, project them back.

    On a large map the map itself is summed and the sums pass through both layers, so values are never made.
    """
    n, (values, channels), split = x.shape[2], value.weight.shape, (heads, -1)
    features = key.shape[1]
    plain, folded = values * (channels + features // heads), features * channels
    if torch.compiler.is_compiling() or n * plain <= n * folded + channels * features * values // heads:
        gathered = torch.bmm(
            key.unflatten(1, split).flatten(0, 1),
            F.conv1d(x, value.weight[..., None], value.bias).unflatten(1, split).flatten(0, 1).mT,
        )
        mixed = torch.bmm(gathered.mT, query.unflatten(1, split).flatten(0, 1))
        return F.conv1d(mixed.unflatten(0, (-1, heads)).flatten(1, 2), out.weight[..., None], out.bias)
    gathered = torch.bmm(key, x.mT).unflatten(1, split) @ value.weight.view(heads, -1, channels).mT
    gathered = gathered + key.sum(2).unflatten(1, split)[..., None] * value.bias.view(heads, 1, -1)
    projected = (gathered @ out.weight.view(channels, heads, -1).permute(1, 2, 0)).flatten(1, 2)
    return torch.baddbmm(out.bias[:, None], projected.mT, query)


class EfficientWeights(NamedTuple):
    """How each position mixes k templates, and where each template is gathered from."""

    query: Float[Tensor, "b k h w"]
    key: Float[Tensor, "b k h w"]


class EfficientAttention(Attention):
    r"""Let every position read from every other in linear time: sum the values for each key feature, then mix the sums.

    .. math:: y = x + W_o\, \bigl(\rho_q(W_q x)^\top \bigl(\rho_k(W_k x)\, (W_v x)^\top\bigr)\bigr)^\top

    :math:`\rho_q` is a softmax over features, :math:`\rho_k` one over positions; or both divide by :math:`\sqrt n` for
    :math:`n` positions. All layers have biases. Several heads are an addition of the released code.

    Args:
        channels: Channels :math:`c` of the feature map.
        keys: Features of queries and keys; None: ``channels``.
        values: Features of values; None: ``channels``.
        heads: Into how many parts the features are split.
        normalize: The paper's two ways to normalise: ``"softmax"`` or ``"scaling"``.

    Raises:
        ValueError: If ``heads`` does not divide ``keys`` and ``values``, or ``normalize`` is unknown.

    Example:
        >>> EfficientAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1812.01243"
    place = ("stages[1].blocks[1::2]", "stages[2].blocks[1::2]")
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        keys: int | None = None,
        values: int | None = None,
        heads: int = 1,
        normalize: Literal["softmax", "scaling"] = "softmax",
    ):
        super().__init__()
        keys, values = channels if keys is None else keys, channels if values is None else values
        if min(keys, values, heads) < 1 or keys % heads or values % heads:
            raise ValueError(f"heads must divide keys={keys} and values={values}, got {heads}")
        if normalize not in ("softmax", "scaling"):
            raise ValueError(f"normalize must be softmax or scaling, got {normalize!r}")
        self.heads = heads
        self.normalize = normalize
        self.query = nn.Conv1d(channels, keys, 1)
        self.key = nn.Conv1d(channels, keys, 1)
        self.value = nn.Linear(channels, values)
        self.out = nn.Linear(values, channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> EfficientWeights:
        query, key = (layer(x.flatten(2)) for layer in (self.query, self.key))
        if self.normalize == "softmax":
            dtype = torch.promote_types(x.dtype, torch.float32)
            query = query.unflatten(1, (self.heads, -1)).softmax(2, dtype=dtype).flatten(1, 2)
            key = key.softmax(2, dtype=dtype)
        else:
            query, key = (each / each.shape[2] ** 0.5 for each in (query, key))
        return EfficientWeights(*(each.to(x.dtype).view(x.shape[0], -1, *x.shape[2:]) for each in (query, key)))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: EfficientWeights) -> Float[Tensor, "b c h w"]:
        y = gather_and_mix(
            x.flatten(2), weights.query.flatten(2), weights.key.flatten(2), self.value, self.out, self.heads
        )
        return x + y.view(x.shape).to(x.dtype)
