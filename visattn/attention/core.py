"""What modules of several families share: a safe softmax, and what functions with gradients of their own need.

Such functions save time and memory: they take few samples at a time, which stay in the processor's cache, and for the
gradient compute again what others keep. A compiler does as much by itself and cannot see through them: it gets plain
operations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SMALL = 2**22
"""Weights of a batch up to which the CPU is faster with the matrix than without it: 16 MiB in float32."""


def positions_first(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "n b c"]:
    """View a map as positions, images, channels.

    A gradient through such a permutation has a stride of one position between images. For a single image torch's batch
    norm misreads it on the CPU (its backward is silently wrong), so there the image is selected, whose gradient is laid
    out anew.
    """
    if x.shape[0] == 1 and not torch.compiler.is_compiling():
        return x[0].flatten(1).mT[:, None]
    return x.flatten(2).permute(2, 0, 1)


def uncast(device: torch.device) -> AbstractContextManager[object]:
    """Leave autocast, where it is on: products of queries and keys overflow in float16 and are coarse in bfloat16."""
    lowered = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if lowered else nullcontext()


def softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """Spread a weight of one over an axis, in at least float32, under autocast too."""
    return logits.softmax(dim, torch.promote_types(logits.dtype, torch.float32))


def wide(x: Tensor) -> Tensor:
    """Return numbers in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scaled_dot_product(
    query: Float[Tensor, "*b n d"],
    key: Float[Tensor, "*b m d"],
    value: Float[Tensor, "*b m e"],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*b n e"]:
    """Read by softmax attention: ``F.scaled_dot_product_attention``, but for few weights where that is slow.

    On a processor with ``torch.set_float32_matmul_precision("medium")`` the kernel hands tiny products to a library one
    by one: 800 matrices of 19×19 then take it 16 times as long, forward and backward, as what is written out here.
    From some millions of weights on it is faster again, as it is at any size without that setting.

    Args:
        query: What asks.
        key: What is asked.
        value: What is read.
        mask: True where a key can be read by a query, at least one by each; or what is added to the logits.
        causal: Whether a query reads the keys up to its own place only.
        scale: Factor of the logits; None: of the square root of the width the reciprocal.
    """
    if plain(query) or query.shape[:-1].numel() * key.shape[-2] > SMALL or not slow(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    logits = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    if causal:
        mask = torch.ones_like(logits[(0,) * (logits.ndim - 2)], dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ value


def slow(x: Tensor) -> bool:
    """Is torch's kernel for softmax attention slow on few weights?"""
    rounded = torch.get_float32_matmul_precision() == "medium" and x.dtype == torch.float32
    return rounded and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def plain(x: Tensor) -> bool:
    """Does a compiler, an exporter, a tracer or a transform of ``torch.func`` look, which wants plain operations?"""
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()  # what torch.autograd.Function.apply itself asks
    )


def tiles(*maps: Tensor | None) -> Iterator[list[Any]]:
    """Go through the batch of all maps together, on a processor by as many samples as stay in its cache."""
    x = maps[0]
    assert x is not None
    size = max(1, 2**18 * len(x) // max(1, x.numel()) if x.device.type == "cpu" else len(x))
    count = max(1, -(-len(x) // size))
    yield from map(list, zip(*([None] * count if each is None else each.split(size) for each in maps), strict=True))


def differentiable(function: Callable[..., Any], inputs: Sequence[Any], gradients: Sequence[Tensor]) -> list[Any]:
    """Gradients that can be differentiated again, by autograd through plain operations."""
    inputs = [each.view_as(each) if isinstance(each, Tensor) else each for each in inputs]  # cut off how they depend
    wanted = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, gradients, create_graph=True))
    return [next(found) if isinstance(each, Tensor) and each.requires_grad else None for each in inputs]
