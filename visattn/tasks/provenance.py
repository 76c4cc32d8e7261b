"""Where a run comes from: the code, the packages, the devices, the seed."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.callbacks import Callback

from visattn.tasks.run import CHECKPOINTS, folder, newest_checkpoint
from visattn.version import __version__

ENVIRONMENT = "environment.yaml"


class Provenance(Callback):
    """Writes ``environment.yaml`` into the folder of a run: a document for each start.

    Args:
        command: What was typed.
    """

    def __init__(self, command: Sequence[str] = ()):
        self.command = command

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        file = folder(trainer) / ENVIRONMENT
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            yaml.safe_dump(self.found(trainer), opened, explicit_start=True, sort_keys=False, width=120)

    def found(self, trainer: Any) -> dict[str, Any]:
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(self.command),
            "code": code(),
            "seed": int(seed) if seed else None,
            "data_seed": getattr(trainer.datamodule, "seed", None),
            "job": os.environ.get("SLURM_JOB_ID"),
            "host": platform.node(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "processes": trainer.world_size,
            "device": device(trainer.strategy.root_device),
            "precision": str(trainer.precision),
            "packages": dict(sorted({each.metadata["Name"]: each.version for each in distributions()}.items())),
        }


def code() -> dict[str, Any]:
    """Return the version of this package, and the commit it lies in, with whether files differ from it."""
    said: dict[str, Any] = {"visattn": __version__}
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else the package lies in a repository of others
        return said | {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return said


def device(root: torch.device) -> dict[str, Any]:
    """Return what a process trains on."""
    if root.type != "cuda":
        return {"kind": root.type, "threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(root)
    return {
        "kind": root.type,
        "name": about.name,
        "gib": round(about.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def requeued(root: Path) -> Path | None:
    """Find where a job that SLURM starts again goes on: the last checkpoint of the run that it began in ``root``."""
    job, again = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is None or again == "0":
        return None
    for file in root.glob(f"version_*/{ENVIRONMENT}"):
        starts = yaml.safe_load_all(file.read_text(encoding="utf-8"))
        if any(start["job"] == job for start in starts):
            return newest_checkpoint(file.parent / CHECKPOINTS, "last")
    return None
