"""Say what a training takes on so many GPUs: memory on each, time of an epoch, the largest batch."""

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from visattn.tasks.plan import ON_CPU, Plan, plan

GIB = 2**30


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", help="a configuration")
    parser.add_argument("--config", action="append", default=[], dest="more", help="another one on top")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option on top, as data.batch_size=64"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many train together (default: 1)")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GIB", help="of each (default: 80)")
    parser.add_argument(
        "--measure", type=int, metavar="N", help=f"images of the measured step (default: the batch; on a CPU {ON_CPU})"
    )
    parser.add_argument("--images", type=int, metavar="N", help="of an epoch, where the data is not at hand")
    parser.add_argument("--classes", type=int, metavar="N", help="the same for classes")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    for name in ("gpus", "memory"):
        if getattr(args, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(args, name)}")
    arguments = [*(f"--config={config}" for config in (args.config, *args.more)), *(f"--{each}" for each in args.set)]
    found = plan(arguments, batch=args.measure, classes=args.classes, images=args.images)
    rows = {kind: row(found, args.gpus, args.memory, kind == "FSDP") for kind in ("DDP", "FSDP")}
    if args.json:
        print(json.dumps(summary(found) | {kind.lower(): row for kind, row in rows.items()}, indent=2))
    else:
        show(found, rows, args)
    return 0


def summary(found: Plan) -> dict[str, Any]:
    step = found.many
    return {
        "parameters": step.parameters,
        "trained": step.trained,
        "macs": step.macs,
        "images": step.images,
        "batch": found.batch,
        "measured": {"batch": step.batch, "seconds": step.seconds, "device": device()},
    }


def row(found: Plan, gpus: int, memory: float, divided: bool) -> dict[str, Any]:
    parts = found.memory(found.batch, gpus=gpus, divided=divided)
    return {
        **parts,
        "sum": sum(parts.values()),
        "largest": found.largest(memory * GIB, gpus=gpus, divided=divided),
        "epoch": found.epoch(gpus),
    }


def show(found: Plan, rows: dict[str, dict[str, Any]], args: Namespace) -> None:
    step, console = found.many, Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{step.parameters:,} parameters, {step.trained:,} of them trained; {step.macs:,} multiply-adds an image; "
        f"{step.images:,} images an epoch",
        highlight=False,
    )
    table = Table(title=f"on each of {args.gpus} GPUs, {found.batch} images")
    table.add_column("")
    for kind in rows:
        table.add_column(kind, justify="right")
    for name in next(iter(rows.values())):
        if not any(values[name] for values in rows.values()) and name != "largest":
            continue
        if name == "largest":
            table.add_section()
        said = {"largest": f"largest batch in {args.memory:g} GiB", "epoch": "time of an epoch"}.get(name, name)
        table.add_row(said, *(cell(name, values[name]) for values in rows.values()))
    console.print(table)
    console.print(
        f"Measured on {device()}: steps of {found.few.batch} and {step.batch} images, {step.seconds:.3g} s the latter, "
        f"not compiled. Memory is what tensors take: workspaces, fragments and the context of CUDA come on top. The "
        f"time is that of these steps, shared by all GPUs as if they were such devices and waited neither for data nor "
        f"for each other.",
        highlight=False,
    )


def cell(name: str, value: Any) -> str:
    if name == "epoch":
        hours, rest = divmod(value, 3600)
        return f"{hours:.0f} h {rest / 60:02.0f} min" if hours else f"{rest / 60:.1f} min"
    if name == "largest":
        return f"{value:,}"
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:.1f} MiB"


def device() -> str:
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU ({torch.get_num_threads()} of its cores)"
    )
