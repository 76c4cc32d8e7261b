"""Cao, Xu, Lin, Wei, Hu: GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond (ICCV-W 2019)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.channel.core import quick, scale
from visattn.attention.core import differentiable, softmax


class SimplifiedNonLocal(Attention):
    r"""Let every position read the same sum over all positions.

    .. math:: y_i = x_i + W_v \sum_j \operatorname{softmax}_j(w_k^\top x_j)\, x_j

    What a non-local block comes to where its weights do not depend on who asks. A fresh module returns its input, and
    learns: :math:`W_v` starts at zero, as the last layer of :class:`GlobalContext` does.

    Args:
        channels: Channels of the feature map.

    Example:
        >>> SimplifiedNonLocal(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1904.11492"
    place = "stages[1:].residual"
    neutral = 0.0

    def __init__(self, channels: int):
        super().__init__()
        self.key = nn.Linear(channels, 1, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        nn.init.kaiming_normal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        return attend(x, self.key.weight, self.key.bias)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
        return add(x, self._transform(read(x, weights)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        context, x = gather(x, self.key)
        return add(x, self._transform(context))

    def _transform(self, context: Float[Tensor, "b c"]) -> Float[Tensor, "b c 1 1"]:
        return self.value(context)[:, :, None, None]


class GlobalContext(Attention):
    r"""Change all positions alike, by what is read from those that matter.

    .. math::
        y_i = x_i + t \ \text{ or }\ x_i \odot \sigma(t), \quad
        t = W_2\, \mathrm{ReLU}\Bigl(\mathrm{LN}\bigl(W_1 \textstyle\sum_j \alpha_j x_j\bigr)\Bigr), \quad
        \alpha = \operatorname{softmax}_j(w_k^\top x_j)

    As in the released code all layers have biases, and the last of them starts at zero: a fresh module returns its
    input if it adds, half of it if it scales, and learns. The bias of :math:`w_k` cancels in the softmax.

    Args:
        channels: Channels of the feature map.
        reduction: Ratio by which the layer between is narrower than ``channels``.
        fusion: Whether to add, as in the paper, or to scale by a sigmoid, which the released code has too.

    Raises:
        ValueError: If ``reduction`` does not lie between 1 and ``channels``, or ``fusion`` is neither of the two.

    Example:
        >>> GlobalContext(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1904.11492"
    place = "stages[1:].residual"

    def __init__(self, channels: int, *, reduction: int = 16, fusion: Literal["add", "scale"] = "add"):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if fusion not in ("add", "scale"):
            raise ValueError(f"fusion must be 'add' or 'scale', got {fusion!r}")
        self.fusion = fusion
        width = channels // reduction
        self.key = nn.Linear(channels, 1)
        self.squeeze = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.excite = nn.Linear(width, channels)
        nn.init.kaiming_normal_(self.key.weight)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    @property
    def identity_at_init(self) -> bool:
        return self.fusion == "add"

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        return attend(x, self.key.weight, self.key.bias)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
        return self._fuse(x, self._transform(read(x, weights)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        context, x = gather(x, self.key, own=self.fusion == "scale")
        return self._fuse(x, self._transform(context))

    def _transform(self, context: Float[Tensor, "b c"]) -> Float[Tensor, "b c 1 1"]:
        return self.excite(self.norm(self.squeeze(context)).relu())[:, :, None, None]

    def _fuse(self, x: Tensor, t: Tensor) -> Tensor:
        return add(x, t) if self.fusion == "add" else scale(x, t.sigmoid())


def attend(x: Float[Tensor, "b c h w"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "b 1 h w"]:
    """Spread a weight of one over the positions; the softmax in at least float32."""
    logits = torch.bmm(weight.expand(x.shape[0], -1, -1), x.flatten(2))
    if bias is not None:
        logits = logits + bias
    return softmax(logits).to(x.dtype).view(x.shape[0], 1, *x.shape[2:])


def read(x: Float[Tensor, "b c h w"], weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c"]:
    """Sum the positions by their weights."""
    return torch.bmm(x.flatten(2), weights.flatten(2).mT)[:, :, 0]


def gather(
    x: Float[Tensor, "b c h w"], key: nn.Linear, *, own: bool = False
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c h w"]]:
    """Return what is read where the key attends, and ``x``, to be used in its place, which spares a map in backward.

    With ``own``, that ``x`` is only multiplied by :func:`scale`, whose gradient is then written to.
    """
    if not quick(x):
        return plain_gather(x, key.weight, key.bias), x
    context, again = Gather.apply(x, key.weight, key.bias, own)
    return context, again if x.requires_grad else x


def plain_gather(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return read(x, attend(x, weight, bias))


def add(x: Float[Tensor, "b c h w"], t: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c h w"]:
    return x + t.to(x.dtype)


class Gather(torch.autograd.Function):
    """Goes through the batch image by image, which stays in the processor's cache while it is read again.

    The gradient makes no map but the one it returns.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, own):
        weights, context = x.new_empty(len(x), 1, x.shape[2] * x.shape[3]), x.new_empty(len(x), 1, x.shape[1])
        for image, alpha, out in zip(x.flatten(2), weights, context, strict=True):
            alpha.copy_(torch.mm(weight, image).softmax(1))  # in which the bias cancels
            torch.mm(alpha, image.mT, out=out)
        ctx.own = own
        ctx.save_for_backward(x, weight, bias, weights)
        return context[:, 0], x

    @staticmethod
    def backward(ctx, g_context, g_x):
        x, weight, bias, weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            again, g_weight, g_bias = differentiable(plain_gather, (x, weight, bias), (g_context,))
            return (None if again is None else g_x + again), g_weight, g_bias, None
        flat = g_x.flatten(2)
        whole = flat if ctx.own else torch.empty_like(flat)
        g_weight, g_bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for image, alpha, g, g_image, out in zip(x.flatten(2), weights, g_context[:, None], flat, whole, strict=True):
            g_alpha = torch.mm(g, image)
            g_logits = (g_alpha - (alpha * g_alpha).sum()).mul_(alpha)
            g_weight.addmm_(g_logits, image.mT)
            if g_bias is not None:
                g_bias += g_logits.sum()
            torch.addmm(g_image, torch.cat((g, weight)).mT, torch.cat((alpha, g_logits)), out=out)
        return whole.unflatten(2, x.shape[2:]), g_weight, g_bias, None
