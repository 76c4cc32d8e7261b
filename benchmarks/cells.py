"""Tables whose cells are trainings, each a process of its own that goes on where it was stopped."""

import json
import os
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Cell:
    """One training: its name, and what it adds to the configuration."""

    name: str
    options: list[str] = field(default_factory=list)


def train(cell: Cell, runs: Path, commands: Callable[[Cell, Path, list[str]], list[list[str]]]) -> dict[str, float]:
    """Train a cell with one thread, unless that was done before, and return what ``result.json`` in its folder says.

    Args:
        cell: What is trained.
        runs: Where its folder is, or will be.
        commands: Called with the cell, its folder and the options by which a training goes on that was begun; returns
            what trains it and then writes its result.
    """
    root = runs / cell.name
    result = root / "result.json"
    if not result.exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        root.mkdir(parents=True, exist_ok=True)
        began = any(root.glob("version_0/checkpoints/last.ckpt"))
        with (root / "log.txt").open("a") as log:
            for command in commands(cell, root, ["--ckpt_path", "last"] if began else []):
                subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    found = json.loads(result.read_text())
    print(cell.name, found, flush=True)
    return found


def shown(values: list[float], digits: int) -> str:
    """Return the mean of several numbers, with their spread, or a dash where there are none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
