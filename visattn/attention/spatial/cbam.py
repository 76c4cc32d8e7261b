"""Woo, Park, Lee, Kweon: CBAM: Convolutional Block Attention Module (ECCV 2018)."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import differentiable, plain, tiles


class Weights(NamedTuple):
    """Where :class:`CBAM` looks."""

    channel: Float[Tensor, "b c 1 1"]
    spatial: Float[Tensor, "b 1 h w"]


class ChannelGate(Attention):
    r"""Weigh every channel by the mean and the maximum of all channels.

    .. math:: y = x \odot \sigma\bigl(\mathrm{MLP}(\mathrm{mean}_{hw}(x)) + \mathrm{MLP}(\max_{hw}(x))\bigr)

    One perceptron serves both. Its layers have biases as in the released code; the paper's formula leaves them out.
    Our squeeze and excite are the paper's :math:`W_0` and :math:`W_1`. Positions that share the maximum share its
    gradient; the released code gives it to the first.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio :math:`r` by which the layer between is narrower than ``channels``.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``.

    Example:
        >>> ChannelGate(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1807.06521"
    place = "residual"
    neutral = 1.0
    dims = (2, 3)

    def __init__(self, channels: int, *, reduction: int = 16):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        highest, mean, _, _ = pool(x, dims=self.dims)
        return self._weigh(highest, mean)

    def _weigh(self, highest: Float[Tensor, "b c 1 1"], mean: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c 1 1"]:
        pools = torch.stack([highest.flatten(1), mean.flatten(1)], dim=1)
        return self.excite(self.squeeze(pools).relu()).sum(1).sigmoid()[:, :, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
        return x * weights.to(x.dtype)


class SpatialGate(Attention):
    r"""Weigh every position by the mean and the maximum over the channels around it.

    .. math:: y = x \odot \sigma\bigl(\mathrm{BN}(\mathrm{conv}_{k \times k}([\max_c(x); \mathrm{mean}_c(x)]))\bigr)

    Differs from the paper as the released code does: the maximum comes before the mean, and a batch norm follows the
    convolution. Channels that share the maximum share its gradient; the released code gives it to the first.

    Args:
        channels: Channels of the feature map. The gate has no parameter that depends on them.
        kernel_size: Width :math:`k` of the convolution.
        zero_init: Whether the norm's weight starts at zero, so that all positions weigh one half, as in the released
            networks. The paper does not mention it.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive; in training, if there is but one position in the batch.

    Example:
        >>> SpatialGate(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1807.06521"
    place = "residual"
    neutral = 1.0
    dims = (1,)

    def __init__(self, channels: int, *, kernel_size: int = 7, zero_init: bool = False):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)
        if zero_init:
            nn.init.zeros_(self.norm.weight)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        highest, mean, _, _ = pool(x, dims=self.dims)
        return self._weigh(highest, mean)

    def _weigh(self, highest: Float[Tensor, "b 1 h w"], mean: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        return self.norm(self.conv(torch.cat([highest, mean], dim=1))).sigmoid()

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
        return x * weights.to(x.dtype)


class CBAM(Attention):
    r"""Weigh every channel of a feature map, then every position of what is left.

    .. math:: y = x' \odot M_s(x'), \quad x' = x \odot M_c(x)

    :math:`M_c` is :class:`ChannelGate`, :math:`M_s` is :class:`SpatialGate`; they say how the released code differs
    from the paper.

    Neither :math:`x'` nor anything else of the map's size is kept for the gradient: it is computed again.

    Args:
        channels: Channels :math:`c` of the feature map.
        reduction: Ratio by which the layer inside the channel gate is narrower than ``channels``.
        kernel_size: Width of the convolution inside the spatial gate.
        order: Which gate comes first.
        zero_init: Whether the spatial gate starts at one half everywhere, as in the released networks.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``, ``kernel_size`` is even or not positive,
            or ``order`` is neither of the two; in training, if there is but one position in the batch.

    Example:
        >>> CBAM(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1807.06521"
    place = "residual"
    neutral = 1.0

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        kernel_size: int = 7,
        order: Literal["channel-spatial", "spatial-channel"] = "channel-spatial",
        zero_init: bool = False,
    ):
        super().__init__()
        if order not in ("channel-spatial", "spatial-channel"):
            raise ValueError(f"order must be 'channel-spatial' or 'spatial-channel', got {order!r}")
        self.order = order
        self.channel = ChannelGate(channels, reduction=reduction)
        self.spatial = SpatialGate(channels, kernel_size=kernel_size, zero_init=zero_init)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Weights:
        first, second, _, _ = self._look(x)
        return Weights(*self._ordered(first, second))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Weights) -> Float[Tensor, "b c h w"]:
        return multiply(x, *self._ordered(*weights))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        first, second, x, scaled = self._look(x, keep=True)
        return multiply(x, first, second, scaled)

    def _look(self, x: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the first and the second weights, ``x``, and ``x`` times the first weights if it is to be kept."""
        gate, next_gate = self._ordered(self.channel, self.spatial)
        highest, mean, x, _ = pool(x, dims=gate.dims)
        first = gate._weigh(highest, mean)
        highest, mean, x, scaled = pool(x, first, dims=next_gate.dims, keep=keep)
        return first, next_gate._weigh(highest, mean), x, scaled

    def _ordered(self, channel: Any, spatial: Any) -> tuple[Any, Any]:
        return (channel, spatial) if self.order == "channel-spatial" else (spatial, channel)


# From here on: the pools of the gates and the product with their weights, as functions that save time and memory. They
# take few samples at a time, which stay in the processor's cache, and for the gradient compute again what others keep.
# A compiler does as much by itself and cannot see through a function of autograd: it gets plain operations.


def pool(x: Tensor, scale: Tensor | None = None, *, dims: tuple[int, ...], keep: bool = False) -> tuple[Any, ...]:
    """Pool ``x * scale`` over ``dims``.

    Returns:
        The maximum; the mean; ``x``, to be used in its place, which spares a map in backward; ``x * scale`` if it is to
        be kept.
    """
    scale = None if scale is None else scale.to(x.dtype)
    if not plain(x):
        return Pool.apply(x, scale, dims, keep)
    highest, mean, scaled = plain_pool(x, scale, dims)
    return highest, mean, x, scaled if keep else None


def plain_pool(x: Tensor, scale: Tensor | None, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    scaled = x if scale is None else x * scale
    return scaled.amax(dims, keepdim=True), scaled.mean(dims, keepdim=True), scaled


def multiply(x: Tensor, first: Tensor, second: Tensor, scaled: Tensor | None = None) -> Tensor:
    """Multiply a map with both weights; ``scaled`` is its product with the first, if that exists, and is used up."""
    first, second = first.to(x.dtype), second.to(x.dtype)
    return plain_multiply(x, first, second, scaled) if plain(x) else Multiply.apply(x, first, second, scaled)


def plain_multiply(x: Tensor, first: Tensor, second: Tensor, scaled: Tensor | None = None) -> Tensor:
    return (x * first if scaled is None else scaled) * second


class Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, dims, keep):
        shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        highest, mean = x.new_empty(shape), x.new_empty(shape)
        scaled = torch.empty_like(x) if keep else None
        scratch = None
        for part, factor, top, middle, out in tiles(x, scale, highest, mean, scaled):
            if factor is not None:
                if out is None:
                    out = scratch = torch.empty_like(part) if scratch is None else scratch[: len(part)]
                part = torch.mul(part, factor, out=out)
            torch.amax(part, dims, keepdim=True, out=top)
            torch.mean(part, dims, keepdim=True, out=middle)
        ctx.dims = dims
        ctx.save_for_backward(x, scale, highest)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.mark_non_differentiable(scaled)
        return highest, mean, x, scaled

    @staticmethod
    def backward(ctx, g_highest, g_mean, g_x, _):
        x, scale, highest = ctx.saved_tensors
        if g_highest is None:  # g_mean as well: a gate takes both
            return g_x, None, None, None
        if torch.is_grad_enabled():
            again, g_scale, _ = differentiable(
                lambda *given: plain_pool(*given)[:2], (x, scale, ctx.dims), (g_highest, g_mean)
            )
            return again if g_x is None else g_x + again, g_scale, None, None
        g_x = torch.zeros_like(x) if g_x is None else g_x  # else a map that only Multiply knows
        g_scale = None if scale is None else torch.empty_like(scale)
        g_mean = g_mean * (g_mean.numel() / x.numel())
        for part, factor, top, g_top, g_middle, into_x, into_scale in tiles(
            x, scale, highest, g_highest, g_mean, g_x, g_scale
        ):
            scaled = part if factor is None else part * factor
            g = torch.eq(scaled, top, out=torch.empty_like(part))
            g = torch.addcmul(g_middle, g, g_top / g.sum(ctx.dims, keepdim=True), out=g)
            if factor is None:
                into_x.add_(g)
            else:
                into_x.addcmul_(g, factor)
                into_scale.copy_(g.mul_(part).sum_to_size(factor.shape))
        return g_x, g_scale, None, None


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first, second, scaled):
        ctx.save_for_backward(x, first, second)
        if scaled is None:
            return (x * first).mul_(second)
        ctx.mark_dirty(scaled)
        return scaled.mul_(second)

    @staticmethod
    def backward(ctx, g):
        x, first, second = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable(plain_multiply, (x, first, second), (g,)), None
        g_x, g_first, g_second = (torch.empty_like(each) for each in (x, first, second))
        for part, one, two, g_part, into, into_one, into_two in tiles(x, first, second, g, g_x, g_first, g_second):
            both = g_part * part
            into_two.copy_(torch.mul(both, one, out=into).sum_to_size(two.shape))
            into_one.copy_(both.mul_(two).sum_to_size(one.shape))
            torch.mul(g_part, one, out=into).mul_(two)
        return g_x, g_first, g_second, None
