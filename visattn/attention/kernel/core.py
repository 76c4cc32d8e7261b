"""What attention over kernels shares: maps mixed into one, kernels mixed into one, a kernel at every position."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import differentiable, plain, tiles


def mix(maps: Sequence[Float[Tensor, "b c h w"]], weights: Float[Tensor, "b k c 1 1"]) -> Float[Tensor, "b c h w"]:
    """Sum the maps by their weights, without a stack of them."""
    first, *rest = weights.to(maps[0].dtype).unbind(1)
    y = maps[0] * first
    for each, weight in zip(maps[1:], rest, strict=True):
        y = torch.addcmul(y, each, weight) if torch.is_grad_enabled() else y.addcmul_(each, weight)
    return y


def check_groups(groups: int, channels: int, out_channels: int) -> None:
    if groups < 1 or channels % groups or out_channels % groups:
        raise ValueError(f"groups must divide channels={channels} and out_channels={out_channels}, got {groups}")


def check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")


class Kernels(nn.Module):
    r"""Convolutions of one shape, mixed into a single one for every sample: :math:`(\sum_k \pi_k W_k) * x`.

    Args:
        number: How many there are.
        channels: Channels they take.
        out_channels: Channels they return.
        kernel_size: Their height and width in pixels.
        stride: Their stride.
        groups: Their groups.
        bias: Whether each has a bias, mixed likewise.
    """

    def __init__(
        self, number: int, channels: int, out_channels: int, *, kernel_size: int, stride: int, groups: int, bias: bool
    ):
        super().__init__()
        check_kernel_size(kernel_size)
        check_groups(groups, channels, out_channels)
        self.stride, self.padding, self.groups = stride, kernel_size // 2, groups
        self.weight = nn.Parameter(torch.empty(number, out_channels, channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(number, out_channels)) if bias else None
        bound = self.weight[0, 0].numel() ** -0.5  # as a convolution starts
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}, bias={self.bias is not None}"

    def forward(self, x: Float[Tensor, "b c h w"], weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d h2 w2"]:
        """Convolve all samples at once: as groups of one, or as matrices where the kernels outweigh the map."""
        (batch, channels, height, width), (_, out_channels, *shape) = x.shape, self.weight.shape
        weights = weights.to(self.weight.dtype)
        kernel = weights @ self.weight.flatten(1)
        bias = None if self.bias is None else weights @ self.bias
        if self.groups == 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            rows, columns = (-(-side // self.stride) for side in (height, width))
            if 2 * rows * columns < channels:  # as measured; the library arranges every kernel anew
                patches = F.unfold(x, shape[-1], padding=self.padding, stride=self.stride)
                y = torch.bmm(kernel.view(batch, out_channels, -1), patches).view(batch, out_channels, rows, columns)
                return (y if bias is None else y + bias[..., None, None]).to(x.dtype)
        y = F.conv2d(
            x.reshape(1, batch * channels, height, width),
            kernel.view(batch * out_channels, *shape),
            None if bias is None else bias.flatten(),
            self.stride,
            self.padding,
            groups=batch * self.groups,
        )
        return y.view(batch, out_channels, *y.shape[2:]).to(x.dtype)


def aggregate(
    x: Float[Tensor, "b g d h w"], kernels: Float[Tensor, "b g k k h2 w2"], stride: int = 1
) -> Float[Tensor, "b g d h2 w2"]:
    """Sum the k×k neighbours of every position, of every ``stride``-th one, by the kernel there.

    The ``d`` channels of a group share its kernel; beyond the border are zeros. No neighbourhood is ever copied: the
    map is shifted from tap to tap, and for the gradient again. Sums are made in at least float32.
    """
    kernels = kernels.to(x.dtype)
    return plain_aggregate(x, kernels, stride) if plain(x) else Aggregate.apply(x, kernels, stride)


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def pad(x: Float[Tensor, "b g d h w"], kernels: Float[Tensor, "b g k k h2 w2"]) -> Float[Tensor, "b g d h3 w3"]:
    return F.pad(x.flatten(1, 2), (kernels.shape[2] // 2,) * 4).unflatten(1, x.shape[1:3])


def shifts(padded: Tensor, kernels: Tensor, stride: int) -> list[tuple[int, int, Tensor]]:
    """What each tap sees of a padded map: its row, its column and a view."""
    k, height, width = kernels.shape[3:]
    return [
        (i, j, padded[..., i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride])
        for i in range(k)
        for j in range(k)
    ]


def plain_aggregate(x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    taps = [row.unbind(3) for row in kernels[:, :, None].unbind(3)]
    (i, j, first), *rest = shifts(pad(x, kernels), kernels, stride)
    y = (first * taps[i][j]).to(wide(x))
    for i, j, seen in rest:
        y = torch.addcmul(y, seen, taps[i][j])
    return y.to(x.dtype)


class Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernels, stride):
        ctx.stride = stride
        ctx.save_for_backward(x, kernels)
        y = x.new_zeros(*x.shape[:3], *kernels.shape[4:], dtype=wide(x))
        for part, kernel, into in tiles(x, kernels, y):
            for i, j, seen in shifts(pad(part, kernel), kernel, stride):
                into.addcmul_(seen, kernel[:, :, None, i, j])
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, kernels = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable(plain_aggregate, (x, kernels, ctx.stride), (g,))[:2], None
        g_x, g_kernels = torch.empty_like(x), torch.empty_like(kernels)
        margin = kernels.shape[2] // 2
        for part, kernel, g_part, into_x, into_kernels in tiles(x, kernels, g, g_x, g_kernels):
            padded = pad(part, kernel)
            g_padded, scratch = torch.zeros_like(padded, dtype=wide(x)), torch.empty_like(g_part)
            g_seen = shifts(g_padded, kernel, ctx.stride)
            for (i, j, seen), (_, _, into) in zip(shifts(padded, kernel, ctx.stride), g_seen, strict=True):
                into.addcmul_(g_part, kernel[:, :, None, i, j])
                into_kernels[:, :, i, j] = torch.mul(g_part, seen, out=scratch).sum(2)
            into_x.copy_(g_padded[..., margin : margin + x.shape[3], margin : margin + x.shape[4]])
        return g_x, g_kernels, None
