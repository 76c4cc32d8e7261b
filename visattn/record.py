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
from visattn.surgery import Inserted


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Record where a model looks: the weights of every attention module during a forward.

    What was inserted, every other :class:`Attention` in the model, and the attention that timm itself owns: gates such
    as squeeze-and-excitation, and the heads of transformers, fused or not (batch, heads, queries, keys).

    Args:
        model: The model, in eval mode; compiled is fine, it then runs as it was before compilation.

    Yields:
        A dictionary that each forward fills: the name of the site or module and the class of the attention, as in
        ``"layer3.2/NonLocal"``, to the weights (what ``attend`` returns: a tensor, or a ``NamedTuple`` of tensors).
        Another forward writes over it.

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
    training = [name for name, module in ours.items() if module.training]
    if training:
        raise ValueError(f"model must be in eval mode to record, {training[0]} is in training mode: call model.eval()")
    maps: dict[str, Any] = {}
    heads = _Heads(maps)
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in ours.items():
            stack.callback(module.register_forward_pre_hook(partial(_attend, maps, name)).remove)
        for name, module in timms.items():
            if isinstance(gate := getattr(module, "gate", None), nn.Module):
                stack.callback(gate.register_forward_hook(partial(_keep_gate, maps, name)).remove)
            else:
                stack.callback(module.register_forward_pre_hook(partial(heads.enter, name)).remove)
                stack.callback(module.register_forward_hook(heads.leave).remove)
        stack.enter_context(heads)
        yield maps


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
        elif isinstance(module, Attention):
            inside += (f"{name}.",)
            _put(ours, f"{name}/{type(module).__name__}" if name else type(module).__name__, module)
        elif type(module).__module__.startswith("timm.") and _is_attention(module):
            _put(timms, f"{name}/{type(module).__name__}", module)
    return ours, timms


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    gated = isinstance(getattr(module, "gate", None), nn.Module) and "mlp" not in kind
    return gated or "attention" in kind or "attn" in kind


def _put(named: dict[str, nn.Module], name: str, module: nn.Module) -> None:
    free, count = name, 1
    while free in named:
        count += 1
        free = f"{name}.{count}"
    named[free] = module


def _attend(maps: dict[str, Any], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    attention = module.attention if isinstance(module, Inserted) else module
    with torch.no_grad():
        maps[name] = attention.attend(*args)  # type: ignore[operator]


def _keep_gate(maps: dict[str, Any], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    weights = output.detach()
    maps[name] = weights.reshape(weights.shape[0], -1, 1, 1) if weights.ndim == 3 else weights


class _Heads(TorchFunctionMode):
    """The weights of softmax attention, wherever it is computed inside one of timm's attention modules."""

    def __init__(self, maps: dict[str, Any]):
        super().__init__()
        self.maps = maps
        self.stack: list[str] = []

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
                self.maps[self.stack[-1]] = output.detach()
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
