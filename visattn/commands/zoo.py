"""List the attention modules: what they weigh and how, parameters, multiply-adds and place; papers by family."""

import inspect
import json
import typing
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from visattn import attention
from visattn.attention import Attention
from visattn.attention.memory.core import MemoryAttention
from visattn.commands import cell, show

INPUT = (256, 14, 14)
NAMES = [name for name in attention.__all__ if name != "Attention"]

ALL = ("module", "family", "weights", "weighs", "choice", "asked", "parameters", "MACs", "place")
BRIEF = ("module", "family", "weights", "parameters", "MACs", "place")
FAMILY = ("module", "paper", "weights", "asked", "fresh", "sizes", "parameters", "MACs", "place")


def add_arguments(parser: ArgumentParser) -> None:
    families = list(dict.fromkeys(family(getattr(attention, name)) for name in NAMES))
    parser.add_argument("--family", choices=families, metavar="NAME", help=f"of one family only: {', '.join(families)}")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a table in Markdown, a brief one of all families")


def run(args: Namespace) -> int:
    classes = [getattr(attention, name) for name in NAMES]
    rows = [describe(cls) for cls in classes if args.family in (None, family(cls))]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    columns = FAMILY if args.family else BRIEF if args.markdown else ALL
    rows = [{name: row[name] for name in columns} for row in rows]
    if args.markdown:
        print(markdown(rows))
    else:
        title = "Parameters and multiply-adds at {} × {} × {}".format(*INPUT)
        show(rows, title=title, caption="weights: over b images, c channels, h w positions, n m pairs of positions")
    return 0


def family(cls: type[Attention]) -> str:
    return cls.__module__.split(".")[2]


def describe(cls: type[Attention]) -> dict[str, Any]:
    """Return the row of a module with its default options."""
    features = (INPUT[0],) * (2 if issubclass(cls, MemoryAttention) else 1)
    try:
        module, sizes = cls(*features), "any"
    except ValueError:
        module, sizes = cls(*features, size=INPUT[1:]), "one"
    place = cls.place
    return {
        "module": cls.__name__,
        "family": family(cls),
        "paper": cls.paper,
        "weights": weights(cls),
        "weighs": "locations" if cls.locations else "items",
        "choice": "hard" if cls.hard else "soft",
        "asked": "by a query" if cls.queried else "bottom-up",
        "fresh": "identity" if module.identity_at_init else "changes",
        "sizes": sizes,
        "parameters": sum(p.numel() for p in module.parameters()),
        "MACs": cost(module, INPUT),
        "place": place if isinstance(place, str) else ", ".join(place or ["inside models"]),
    }


def cost(module: Attention, size: tuple[int, int, int]) -> int:
    """Return the multiply-adds of convolutions and matrix products for one map of this size, asked once if at all."""
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(module, MemoryAttention):
            held = torch.randn(1, size[1] * size[2], size[0])
            module(torch.randn(1, 1, module.asks), module.prepare(held, size=size[1:]))
        else:
            given = [p for p in inspect.signature(module.attend).parameters.values() if p.default is p.empty]
            module(*(torch.randn(1, *size) for p in given if p.kind is not p.VAR_POSITIONAL))
    return counter.get_total_flops() // 2


def weights(cls: type[Attention]) -> str:
    """Return the axes of what ``attend`` returns, as its signature states them."""
    kind = typing.get_type_hints(cls.attend)["return"]
    if typing.get_origin(kind) is tuple:  # and a state
        kind = typing.get_args(kind)[0]
    if issubclass(kind, tuple):
        return ", ".join(f"{name}: {part.dim_str}" for name, part in typing.get_type_hints(kind).items())
    return kind.dim_str


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table whose papers are links."""
    lines = [
        list(rows[0]),
        ["---:" if isinstance(value, int) else "---" for value in rows[0].values()],
        *([link(value) if name == "paper" else cell(value) for name, value in row.items()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def link(paper: str) -> str:
    """Return the address of a paper in Markdown.

    Example:
        >>> link("arXiv:1807.06521")
        '[arXiv:1807.06521](https://arxiv.org/abs/1807.06521)'
    """
    kind, _, name = paper.partition(":")
    site = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
    return f"[{paper}]({site}{name})" if site else f"[{name.split('/')[2]}]({paper})"
