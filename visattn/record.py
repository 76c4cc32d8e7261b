"""The maps of every attention module in a model, as it looks at an image."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visattn.attention.base import Attention
from visattn.attention.memory.core import MemoryAttention
from visattn.surgery import Inserted


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Record where a model looks: the weights of every attention module during a forward.

    What was inserted, every other :class:`Attention` in the model, and the attention that timm itself owns: gates that
    have a module ``gate`` (squeeze-and-excitation, ECA, CBAM, …), and softmax attention, fused or not, in modules that
    are called attention (batch, heads, queries, keys). Attention on a memory is left out: the network that asks it step
    by step returns its maps.

    Args:
        model: The model, in eval mode; compiled is fine, it then runs as it was before compilation.

    Yields:
        A dictionary that each forward fills: the name of the site or module and the class of the attention, as in
        ``"layer3.2/NonLocal"``, to the weights (what ``attend`` returns: a tensor, or a ``NamedTuple`` of tensors).
        Another forward, or another use of the same module, writes over it.

    Raises:
        ValueError: If an attention module is in training mode: norms would be updated twice, and dropout would draw
            another map than the one that was used.

    Example:
        >>> import timm, visattn
        >>> model = visattn.insert(timm.create_model("resnet18"), visattn.CBAM, at="head").eval()
        >>> with visattn.record(model) as maps:
        ...     _ = model(torch.randn(1, 3, 64, 64))
        >>> {name: weights.spatial.shape for name, weights in maps.items()}
        {'layer4/CBAM': torch.Size([1, 1, 2, 2])}
    """
    compiled, model = hasattr(model, "_orig_mod"), getattr(model, "_orig_mod", model)
    ours, timms = _found(model)
    training = [name for name, module in ours.items() if any(m.training for m in module.modules())]
    if training:
        raise ValueError(f"model must be in eval mode to record, {training[0]} is in training mode: call model.eval()")
    maps: dict[str, Any] = {}
    heads = _Heads(maps)
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in ours.items():
            hook = partial(_attend, maps, name)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for name, module in timms.items():
            if (gate := _gate(module)) is not None:
                stack.callback(module.register_forward_pre_hook(partial(_forget, maps, name)).remove)
                stack.callback(gate.register_forward_hook(partial(_keep_gate, maps, name)).remove)
            else:
                stack.callback(module.register_forward_pre_hook(partial(heads.enter, name)).remove)
                stack.callback(module.register_forward_hook(heads.leave).remove)
        stack.callback(model.register_forward_pre_hook(heads.begin).remove)
        stack.enter_context(heads)
        yield maps


def attentions(model: nn.Module) -> dict[str, Attention]:
    """Return the attention modules of ours whose maps are recorded, by the names of their maps.

    Example:
        >>> import timm, visattn
        >>> list(attentions(visattn.insert(timm.create_model("resnet18"), visattn.SimAM, at="head")))
        ['layer4/SimAM']
    """
    ours, _ = _found(getattr(model, "_orig_mod", model))
    return {name: each.attention if isinstance(each, Inserted) else each for name, each in ours.items()}  # type: ignore[misc]


def _found(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Our attention and timm's, by the names of their maps; not what lies within another."""
    ours: dict[str, nn.Module] = {}
    timms: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, Inserted) and not module.original:
            inside += (f"{name}.",)
            _put(ours, f"{module.site.name}/{type(module.attention).__name__}", module)
        elif isinstance(module, MemoryAttention):  # the network that steps returns its maps
            inside += (f"{name}.",)
        elif isinstance(module, Attention):
            inside += (f"{name}.",)
            _put(ours, f"{name}/{type(module).__name__}" if name else type(module).__name__, module)
        elif type(module).__module__.startswith("timm.") and _is_attention(module):
            _put(timms, f"{name}/{type(module).__name__}", module)
    return ours, timms


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return _gate(module) is not None or "attention" in kind or "attn" in kind


def _gate(module: nn.Module) -> nn.Module | None:
    """The activation that makes the weights of a gate; a projection of that name, or one in an MLP, is none."""
    gate = getattr(module, "gate", None)
    is_one = isinstance(gate, nn.Module) and not any(True for _ in gate.parameters())
    return gate if is_one and "mlp" not in type(module).__name__.lower() else None


def _put(named: dict[str, nn.Module], name: str, module: nn.Module) -> None:
    free, count = name, 1
    while free in named:
        count += 1
        free = f"{name}.{count}"
    named[free] = module


def _attend(maps: dict[str, Any], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    attention = module.attention if isinstance(module, Inserted) else module
    with torch.no_grad():
        maps[name] = attention.attend(*args, **kwargs)  # type: ignore[operator]


def _forget(maps: dict[str, Any], name: str, module: nn.Module, args: Any) -> None:
    maps.pop(name, None)


def _keep_gate(maps: dict[str, Any], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    weights = output.detach()
    weights = weights.reshape(weights.shape[0], -1, 1, 1) if weights.ndim == 3 else weights
    before = maps.get(name, ())  # coordinate attention calls its gate once for each axis
    maps[name] = (*(before if isinstance(before, tuple) else (before,)), weights) if name in maps else weights


class _Heads(TorchFunctionMode):
    """The weights of softmax attention, wherever it is computed inside one of timm's attention modules."""

    def __init__(self, maps: dict[str, Any]):
        super().__init__()
        self.maps = maps
        self.stack: list[str] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        self.stack.clear()  # an error in the forward before may have left something

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.stack.append(name)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.stack:
            if func is F.scaled_dot_product_attention:
                with torch.no_grad():
                    self.maps[self.stack[-1]] = _weights(*args, **kwargs)
            elif getattr(func, "__name__", "") == "softmax" and output.ndim >= 3:
                weights, dim = output.detach(), kwargs.get("dim", args[1] if len(args) > 1 else None)
                split = weights.ndim == 4 and dim == 1  # of several items, for each channel
                self.maps[self.stack[-1]] = weights.flatten(2)[..., None, None] if split else weights
        return output


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What scaled dot-product attention multiplies its values with, in its own signature."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)).to(wide) @ key.to(wide).mT
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1).nan_to_num(0.0).to(query.dtype)
