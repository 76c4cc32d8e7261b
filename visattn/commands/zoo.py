"""List the attention modules: paper, weights and what they are over, parameters, multiply-adds and place."""

import inspect
import json
import typing
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from visattn import attention
from visattn.attention import Attention
from visattn.commands import cell, show

INPUT = (256, 14, 14)


def add_arguments(parser: ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a table in Markdown")


def run(args: Namespace) -> int:
    rows = [describe(getattr(attention, name)) for name in attention.__all__ if name != "Attention"]
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.markdown:
        print("|", " | ".join(rows[0]), "|")
        print("|", " | ".join("---:" if isinstance(value, int) else "---" for value in rows[0].values()), "|")
        for row in rows:
            print("|", " | ".join(cell(value) for value in row.values()), "|")
    else:
        title = "Parameters and multiply-adds at {} × {} × {}".format(*INPUT)
        show(rows, title=title, caption="weights: over b images, c channels, h w positions, n m pairs of positions")
    return 0


def describe(cls: type[Attention]) -> dict[str, Any]:
    """Return the row of a module with its default options."""
    tied = "size" in inspect.signature(cls).parameters and {"size": INPUT[1:]}
    module = cls(INPUT[0], **(tied or {})).eval()
    given = [p for p in inspect.signature(module.attend).parameters.values() if p.default is p.empty]
    maps = [p for p in given if p.kind is not p.VAR_POSITIONAL]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*(torch.randn(1, *INPUT) for _ in maps))
    place = cls.place
    return {
        "module": cls.__name__,
        "family": cls.__module__.split(".")[2],
        "paper": cls.paper,
        "weights": weights(cls),
        "weighs": "locations" if cls.locations else "items",
        "choice": "hard" if cls.hard else "soft",
        "asked": "by a query" if cls.queried else "bottom-up",
        "parameters": sum(p.numel() for p in module.parameters()),
        "MACs": counter.get_total_flops() // 2,
        "place": place if isinstance(place, str) else ", ".join(place or ["inside models"]),
    }


def weights(cls: type[Attention]) -> str:
    """Return the axes of what ``attend`` returns, as its signature states them."""
    kind = typing.get_type_hints(cls.attend)["return"]
    if issubclass(kind, tuple):
        return ", ".join(f"{name}: {part.dim_str}" for name, part in typing.get_type_hints(kind).items())
    return kind.dim_str
