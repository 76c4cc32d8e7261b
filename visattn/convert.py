"""Weights as others name them, under our names and in our shapes."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visattn.surgery import insertions


class ConversionError(ValueError):
    """Weights cannot be converted; the message lists the names and shapes that do not fit."""


class Rule(NamedTuple):
    """One tensor of ours, and what it is made of."""

    ours: str
    theirs: str
    change: Callable[[Tensor], Tensor]
    absent: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    """What stands for it where theirs is absent; None: it must be there."""


def same(tensor: Tensor) -> Tensor:
    return tensor


def dense(tensor: Tensor) -> Tensor:
    """A 1 × 1 convolution as a linear layer."""
    return tensor.flatten(1)


def line(tensor: Tensor) -> Tensor:
    """A 1 × 1 convolution over two axes as one over one axis."""
    return tensor.flatten(2)


def vector(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def flipped(tensor: Tensor) -> Tensor:
    """A kernel whose two input channels stand in the other order."""
    return tensor.flip(1)


def third(tensor: Tensor, number: int) -> Tensor:
    """One of query, key and value, which stand one after the other."""
    return tensor.chunk(3)[number]


def zeros(name: str, state: Mapping[str, Tensor]) -> Tensor:
    return state[name].new_zeros(len(state[name]))


def never(state: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(0)


def layer(ours: str, theirs: str, change: Callable[[Tensor], Tensor] = same, *, bias: bool | None = True) -> list[Rule]:
    """Weight and bias of a layer; with ``bias=None`` theirs may have none, which is a bias of zero."""
    rules = [Rule(f"{ours}.weight", f"{theirs}.weight", change)]
    if bias is not False:
        absent = partial(zeros, f"{theirs}.weight") if bias is None else None
        rules.append(Rule(f"{ours}.bias", f"{theirs}.bias", same, absent))
    return rules


def norm(ours: str, theirs: str) -> list[Rule]:
    """A batch norm; old ones have not counted their batches."""
    names = ("weight", "bias", "running_mean", "running_var")
    counted = Rule(f"{ours}.num_batches_tracked", f"{theirs}.num_batches_tracked", same, never)
    return [*(Rule(f"{ours}.{name}", f"{theirs}.{name}", same) for name in names), counted]


def context(mask: str, transform: str, squeeze: str, between: str, excite: str) -> list[Rule]:
    """Global context, whose transform adds or scales."""
    between, excite = f"{transform}.{between}", f"{transform}.{excite}"
    return [
        *layer("key", mask, dense),
        *layer("squeeze", f"{transform}.{squeeze}", dense),
        Rule("norm.weight", f"{between}.weight", vector),
        Rule("norm.bias", f"{between}.bias", vector),
        *layer("excite", excite, dense),
    ]


def coordinate(height: str, width: str, *, bias: bool | None = True) -> list[Rule]:
    return [
        *layer("squeeze", "conv1", line, bias=bias),
        *norm("norm", "bn1"),
        *layer("height", height, line, bias=bias),
        *layer("width", width, line, bias=bias),
    ]


GATE = "channel_att.gate_c.gate_c", "spatial_att.gate_s.gate_s"

SOURCES: dict[str, list[list[Rule]]] = {
    "cbam": [
        [
            *layer("channel.squeeze", "ChannelGate.mlp.1"),
            *layer("channel.excite", "ChannelGate.mlp.3"),
            *layer("spatial.conv", "SpatialGate.spatial.conv", bias=False),
            *norm("spatial.norm", "SpatialGate.spatial.bn"),
        ]
    ],
    "bam": [
        [
            *layer("channel.0", f"{GATE[0]}_fc_0"),
            *norm("channel.1", f"{GATE[0]}_bn_1"),
            *layer("channel.3", f"{GATE[0]}_fc_final"),
            *layer("spatial.0", f"{GATE[1]}_conv_reduce0"),
            *norm("spatial.1", f"{GATE[1]}_bn_reduce0"),
            *layer("spatial.3", f"{GATE[1]}_conv_di_0"),
            *norm("spatial.4", f"{GATE[1]}_bn_di_0"),
            *layer("spatial.6", f"{GATE[1]}_conv_di_1"),
            *norm("spatial.7", f"{GATE[1]}_bn_di_1"),
            *layer("spatial.9", f"{GATE[1]}_conv_final"),
        ]
    ],
    "gcnet": [context("conv_mask", f"channel_{way}_conv", "0", "1", "3") for way in ("add", "mul")],
    "coordinate": [coordinate("conv_h", "conv_w"), coordinate("conv2", "conv3")],
    "eca": [layer("conv", "conv", bias=False)],
    "timm.AttentionPool2d": [
        [
            Rule("position", "pos_embed", same),
            *(
                Rule(f"attention.{ours}.{name}", f"qkv.{name}", partial(third, number=number))
                for number, ours in enumerate(("query", "key", "value"))
                for name in ("weight", "bias")
                if (ours, name) != ("key", "bias")
            ),
            *layer("attention.out", "proj"),
        ]
    ],
    "timm.BottleneckAttn": [
        [
            *(
                Rule(f"{ours}.weight", "qkv.weight", partial(third, number=number))
                for number, ours in enumerate(("query", "key", "value"))
            ),
            Rule("affinity.rows", "pos_embed.height_rel", same),
            Rule("affinity.columns", "pos_embed.width_rel", same),
        ]
    ],
    "timm.CbamModule": [
        [
            *layer("channel.squeeze", "channel.fc1", dense, bias=None),
            *layer("channel.excite", "channel.fc2", dense, bias=None),
            *layer("spatial.conv", "spatial.conv.conv", flipped, bias=False),
            *norm("spatial.norm", "spatial.conv.bn"),
        ]
    ],
    "timm.CoordAttn": [coordinate("conv_h", "conv_w", bias=None)],
    "timm.EcaModule": [layer("conv", "conv", bias=False)],
    "timm.EffectiveSEModule": [layer("excite", "fc", dense)],
    "timm.GlobalContext": [context("conv_attn", f"mlp_{way}", "fc1", "norm", "fc2") for way in ("add", "scale")],
    "timm.SEModule": [
        [*layer("squeeze", "fc1", dense), *layer("excite", "fc2", dense)],
        [*layer("squeeze", "fc1", dense, bias=False), *layer("excite", "fc2", dense, bias=False)],
    ],
    "timm.SelectiveKernel": [
        [
            *(
                rule
                for k in range(2)
                for rule in (
                    *layer(f"branches.{k}.0", f"paths.{k}.conv", bias=False),
                    *norm(f"branches.{k}.1", f"paths.{k}.bn"),
                )
            ),
            *layer("squeeze.0", "attn.fc_reduce", dense, bias=False),
            *norm("squeeze.1", "attn.bn"),
            *layer("select", "attn.fc_select", dense, bias=False),
        ]
    ],
    "timm.SplitAttn": [
        [
            *layer("split.0", "conv", bias=False),
            *norm("split.1", "bn0"),
            *layer("squeeze.0", "fc1"),
            *norm("squeeze.1", "bn1"),
            *layer("select", "fc2"),
        ]
    ],
}


def convert(state: Mapping[str, Tensor], source: str, *, into: nn.Module | None = None) -> dict[str, Tensor]:
    """Give released weights our names and shapes.

    ====================== ============================= ==================================================
    ``source``             released in                   for
    ====================== ============================= ==================================================
    cbam                   Jongchan/attention-module     ``CBAM``
    bam                    Jongchan/attention-module     ``BAM(combine="product")``
    gcnet                  xvjiarui/GCNet, mmcv          ``GlobalContext``, ``fusion="add" | "scale"``
    coordinate             houqb/CoordAttention          ``CoordinateAttention``
    eca                    BangguWu/ECANet               ``EfficientChannelAttention``
    timm.AttentionPool2d   timm                          ``AttentionPool(size=…)``
    timm.BottleneckAttn    timm                          ``BottleneckSelfAttention(scale_positions=False)``
    timm.CbamModule        timm                          ``CBAM``
    timm.CoordAttn         timm                          ``CoordinateAttention``
    timm.EcaModule         timm; CecaModule alike        ``EfficientChannelAttention``
    timm.EffectiveSEModule timm                          ``EffectiveSqueezeExcitation``
    timm.GlobalContext     timm                          ``GlobalContext``, ``fusion="add" | "scale"``
    timm.SEModule          timm                          ``SqueezeExcitation``
    timm.SelectiveKernel   timm, without ``split_input`` ``SelectiveKernel``
    timm.SplitAttn         timm, with ``norm_layer``     ``SplitAttention(downsample="convolution")``
    ====================== ============================= ==================================================

    Widths are those of the weights: build the module with the reduction, kernel size, heads or groups of the original.
    The norm in timm's global context adds 1e-6 to the variance, the released one and ours 1e-5.

    Args:
        state: The weights of one such module; or, with ``into``, of a network that has several.
        source: Whose names they have, as above.
        into: What the weights are for, to be compared with: a module of ours; or a backbone with such modules inserted
            and the names of the original, such as timm's ResNets, which have those of torchvision. Its gates come out
            open, so that the modules act as in the original.

    Returns:
        What ``load_state_dict`` takes.

    Raises:
        ConversionError: If the source is unknown, or names are missing or left over, or shapes differ.

    Example:
        >>> import visattn
        >>> state = {"conv.weight": torch.randn(1, 1, 3)}
        >>> visattn.EfficientChannelAttention(64).load_state_dict(convert(state, "eca"))
        <All keys matched successfully>
    """
    if source not in SOURCES:
        raise ConversionError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    parallel = all(name.startswith("module.") for name in state)
    state = {name.removeprefix("module.") if parallel else name: tensor for name, tensor in state.items()}
    if into is None:
        return _module(state, source)
    converted = _network(state, source, into) if insertions(into) else _module(state, source)
    expected = into.state_dict()
    uncounted = {name for name in expected.keys() - converted.keys() if name.endswith(".num_batches_tracked")}
    converted |= {name: torch.zeros_like(expected[name]) for name in uncounted}
    shapes = [
        f"{name} is {tuple(converted[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    _refuse(source, expected.keys() - converted.keys(), converted.keys() - expected.keys(), shapes)
    return converted


def _module(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Convert one module, by the names that fit best."""

    def misfits(rules: list[Rule]) -> tuple[set[str], set[str]]:
        return {r.theirs for r in rules if not r.absent} - state.keys(), state.keys() - {r.theirs for r in rules}

    rules = min(SOURCES[source], key=lambda rules: sum(map(len, misfits(rules))))
    _refuse(source, *misfits(rules))
    return {r.ours: r.change(state[r.theirs]) if r.theirs in state or not r.absent else r.absent(state) for r in rules}


def _network(state: Mapping[str, Tensor], source: str, model: nn.Module) -> dict[str, Tensor]:
    """Convert all modules of a network, each by the place of its insertion, and keep the rest."""
    here = [(name, i) for name, i in model.named_modules() if i in insertions(model)]
    names = sorted(set(_modules(state, source)), key=_natural)
    converted = {n: t for n, t in state.items() if not n.startswith(tuple(f"{name}." for name in names))}
    if len(names) != len(here):
        left = ", ".join(sorted(converted.keys() - model.state_dict().keys())) or "nothing"
        counts = f"there are {len(names)} whole modules in the weights, {len(here)} are inserted"
        raise ConversionError(f"{source}: {counts}; left over: {left}")
    known = dict(model.named_modules())
    for theirs, (ours, inserted) in zip(names, here, strict=True):
        parent, site = theirs.rpartition(".")[0], inserted.site.name
        if parent in known and not f"{site}.".startswith(f"{parent}." if parent else ""):
            raise ConversionError(f"{source}: there is {theirs} in the weights where {site} has something inserted")
        part = {name.removeprefix(f"{theirs}."): t for name, t in state.items() if name.startswith(f"{theirs}.")}
        prefix = f"{site}." if inserted.site.side == "instead" else f"{ours}.attention."
        converted |= {f"{prefix}{name}": tensor for name, tensor in _module(part, source).items()}
        if inserted.gate is not None:
            converted[f"{ours}.gate"] = torch.ones_like(inserted.gate)
    return converted


def _modules(state: Mapping[str, Tensor], source: str) -> Iterator[str]:
    """The names of modules that have just the names of a source below them."""
    for rules in SOURCES[source]:
        anchor, needed = f".{rules[0].theirs}", {r.theirs for r in rules if not r.absent}
        for module in (name.removesuffix(anchor) for name in state if name.endswith(anchor)):
            below = {name.removeprefix(f"{module}.") for name in state if name.startswith(f"{module}.")}
            if needed <= below <= {r.theirs for r in rules}:
                yield module


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _refuse(source: str, missing: set[str], left: set[str], shapes: list[str] | None = None) -> None:
    parts = (("missing", sorted(missing)), ("left over", sorted(left)), ("of another shape", shapes or []))
    if said := [f"{what}: {', '.join(names)}" for what, names in parts if names]:
        raise ConversionError(f"{source}: {'; '.join(said)}")
