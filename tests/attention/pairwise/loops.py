"""Multi-head self-attention in loops, over the keys that a predicate allows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Place = tuple[int, int]


def lively(module: nn.Module, std: float = 0.5) -> nn.Module:
    """In double precision, with nothing zero."""
    for parameter in module.double().eval().parameters():
        nn.init.normal_(parameter, std=std)
    return module


def multi_head(module: nn.Module, x: Tensor, reaches: Callable[[int, Place, Place], bool]) -> Tensor:
    """What each position reads, in each head, from the keys it reaches; zeros where it reaches none."""
    y, width = torch.empty_like(x), x.shape[1] // module.heads
    for b in range(x.shape[0]):
        places = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]
        query, key, value = (
            {(i, j): layer.weight @ x[b, :, i, j] + layer.bias for i, j in places}
            for layer in (module.query, module.key, module.value)
        )
        for p in places:
            read = torch.zeros(x.shape[1], dtype=x.dtype)
            for head in range(module.heads):
                part = slice(head * width, (head + 1) * width)
                e = {
                    r: math.exp(query[p][part] @ key[r][part] / math.sqrt(width)) for r in places if reaches(head, p, r)
                }
                for r, each in e.items():
                    read[part] += each / sum(e.values()) * value[r][part]
            y[b, :, p[0], p[1]] = module.out.weight @ read + module.out.bias
    return y


def torch_s_own(module: nn.Module) -> nn.MultiheadAttention:
    """Torch's dense attention with the same weights."""
    dense = nn.MultiheadAttention(module.out.in_features, module.heads, batch_first=True).double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            layers = [getattr(layer, name) for layer in (module.query, module.key, module.value)]
            getattr(dense, f"in_proj_{name}").copy_(torch.cat(layers))
            getattr(dense.out_proj, name).copy_(getattr(module.out, name))
    return dense
