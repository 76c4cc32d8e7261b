"""Gradients of layers that are applied step after step, formed by one product for all steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from visattn.attention.core import plain


class AtOnce(TorchFunctionMode):
    r"""Within it, the gradient of a linear layer's weight is formed once, not added up step by step.

    .. math:: \frac{\partial L}{\partial W} = \sum_t g_t^\top x_t = [g_1; \dots; g_T]^\top [x_1; \dots; x_T]

    The one product on the right reads and writes a weight once; that counts where steps have few rows and weights are
    large. What is computed is the same. Under autocast, and where a compiler looks, layers are left as they are.
    Gradients can be had once: not of gradients.

    Args:
        steps: How many times a layer is applied, at most; from there on it is counted anew.

    Example:
        >>> layer, x = torch.nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
        >>> with AtOnce(4):
        ...     for _ in range(4):
        ...         x = layer(x)
        >>> x.sum().backward()
        >>> layer.bias.grad.shape
        torch.Size([3])
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps
        self.layers: dict[int, Layer] = {}

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if function is not F.linear or kwargs or not self.fits(args[0], args[1]):
            return function(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        rows, layer = x.numel() // x.shape[-1], self.layers.get(id(weight))
        if layer is None or not layer.marks or layer.rows < rows:
            layer = self.layers[id(weight)] = Layer(weight, bias, rows, self.steps)
        return layer(x)

    @staticmethod
    def fits(x: Tensor, weight: Tensor) -> bool:
        """Is this a layer that learns, from inputs that have gradients?"""
        learns = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad and weight.is_leaf
        return learns and not plain(x) and not torch.is_autocast_enabled(x.device.type)


class Layer:
    """A linear layer, and what it was given so far.

    Args:
        weight: Its weight.
        bias: Its bias.
        rows: How many rows it is given in a step, at most.
        steps: How many steps there are, at most.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, steps: int):
        self.rows = rows
        self.given: list[Tensor] = []
        self.marks = list(Gathered.apply(weight, bias, self.given, rows, steps))
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        self.given.append(x.detach())
        return Step.apply(x, self.weight, self.bias, self.marks.pop(0))


class Gathered(torch.autograd.Function):
    """Marks, one a step, by whose gradients what comes back from the steps is gathered. They hold no memory."""

    @staticmethod
    def forward(ctx, weight, bias, given, rows, steps):
        ctx.given, ctx.biased = given, bias is not None
        ctx.set_materialize_grads(False)
        return tuple(weight.new_zeros(()).expand(rows, weight.shape[0]) for _ in range(steps))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        pairs = [(x.flatten(0, -2), g) for x, g in zip(ctx.given, gradients, strict=False) if g is not None]
        x, g = torch.cat([x for x, _ in pairs]), torch.cat([g[: len(x)] for x, g in pairs])
        return g.mT @ x, g.sum(0) if ctx.biased else None, None, None, None


class Step(torch.autograd.Function):
    """A step, whose gradient goes back to what it was given, and to its mark."""

    @staticmethod
    def forward(ctx, x, weight, bias, mark):
        ctx.save_for_backward(weight)
        ctx.rows = len(mark)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (weight,) = ctx.saved_tensors
        flat = g.flatten(0, -2)
        return g @ weight, None, None, F.pad(flat, (0, 0, 0, ctx.rows - len(flat)))
