"""What a run leaves behind: whole files, a log that goes on when resumed, the checkpoint folder, a way to go on."""

import copy
import csv
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.plugins.io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.layer_sync import LayerSync
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from visattn.checkpoint import load, save
from visattn.surgery import restore

CHECKPOINTS, LAST, BEST = "checkpoints", "last.ckpt", "best.ckpt"
RECENT, INTERRUPTED = "recent.ckpt", "interrupted.ckpt"


class RunError(RuntimeError):
    """A run cannot go on; the message says in one line why, and what is left."""


class Preempted(SIGTERMException):
    """All processes end a training after the same step, because one of them was told to."""


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints under another name and renames them when they are whole, in the same folder.

    Args:
        disk: GiB that the checkpoints of a run may take; left out, any number. Beyond, the oldest are removed, but
            neither the best nor those from which a run goes on: where these alone take more, it ends.

    Raises:
        ValueError: If ``disk`` is not positive.
    """

    def __init__(self, disk: float | None = None):
        if disk is not None and disk <= 0:
            raise ValueError(f"disk must be positive, got {disk}")
        super().__init__()
        self.disk = disk

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._write(checkpoint, path)
        except KeyboardInterrupt:  # what the run goes on from says that this file is there
            self._write(checkpoint, path)
            raise

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            self.make_room(path, part.stat().st_size)
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError, and an interruption too
            cause = error if isinstance(error, OSError) else error.__context__ or error
            if not isinstance(cause, Exception):
                raise cause from None
            kept = f"the one before it is whole: {path}" if path.exists() else "earlier ones are whole"
            raise RunError(f"checkpoint {path} cannot be written ({cause}); {kept}") from error
        finally:
            with suppress(OSError):
                part.unlink()

    def make_room(self, path: Path, size: int) -> None:
        """Remove the oldest checkpoints beside ``path`` until one of so many bytes fits, or say that it cannot."""
        others = [f for f in path.parent.glob("*.ckpt") if f != path and not f.is_symlink()]
        taken = {file: file.stat() for file in others}
        over = size + sum(stat.st_size for stat in taken.values()) - (self.disk or float("inf")) * 2**30
        kept = [path.with_name(name).resolve() for name in (BEST, LAST, RECENT, INTERRUPTED)]
        removed = []
        for file in sorted(others, key=lambda file: taken[file].st_mtime):
            if over > 0 and file.resolve() not in kept:
                removed.append(file)
                over -= taken[file].st_size
        if over > 0:
            raise RunError(
                f"checkpoint {path} would take {over / 2**30:.3g} GiB more than disk={self.disk} leaves beside the "
                f"best and those from which the run goes on"
            )
        for file in removed:
            file.unlink()


class TimmSyncBatchNorm(LayerSync):
    """Batch norm over all processes by timm's converter, which knows timm's norms; what it unhooks is put back."""

    def apply(self, model: nn.Module) -> nn.Module:
        model.model = restore(timm.layers.convert_sync_batchnorm(model.model))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model  # in evaluation it is plain batch norm


class Log(CSVLogger):
    """Lightning's CSV log, which goes on where that of a resumed run left off; a row is written when it is known.

    Args:
        since: The step from which a run goes on; what was logged of it and of later ones is left out. None: nothing.
        options: As of ``CSVLogger``.
    """

    def __init__(self, *args: Any, since: int | None = None, **options: Any):
        super().__init__(*args, **{"flush_logs_every_n_steps": 1} | options)
        self.since = since

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            file = Path(self.log_dir, "metrics.csv")
            rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
            if self.since is not None:
                rows = [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) < self.since]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                started = super().experiment
            started.metrics = rows
            started.save()
        return self._experiment


class Best(ModelCheckpoint):
    """Keeps the best state, by default of top-1, or of the mean precision where an image has many labels.

    Where several are kept, they are named by epoch and step, and the best of them is linked by the usual name.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.save_top_k not in (0, 1) and self.filename == Path(BEST).stem:
            self.filename, self.auto_insert_metric_name = f"{self.filename}-{{epoch:03d}}-{{step}}", False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor == "val/top1" and pl_module.hparams.get("multi_label"):
            self.monitor = "val/mAP"

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        best = Path(self.best_model_path)
        if best.name.startswith(f"{Path(BEST).stem}-") and trainer.is_global_zero:
            link = best.with_name(f".{BEST}.link")
            link.unlink(missing_ok=True)
            link.symlink_to(best.name)
            link.replace(best.with_name(BEST))


class Last(ModelCheckpoint):
    """Keeps the state at the end of the newest epoch, from which a run resumes exactly."""

    def __init__(self) -> None:
        super().__init__(filename=Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False)


class Recent(ModelCheckpoint):
    """Keeps the state of some minutes ago, for epochs that take hours.

    Args:
        minutes: How often, by a clock that nobody sets.

    Raises:
        ValueError: If ``minutes`` is not positive.
    """

    def __init__(self, minutes: float):
        if minutes <= 0:
            raise ValueError(f"save_minutes must be positive, got {minutes}")
        interval = timedelta(minutes=minutes)
        super().__init__(filename=Path(RECENT).stem, train_time_interval=interval, enable_version_counter=False)


class Outcome(Callback):
    """Leaves a visattn checkpoint folder, ``model``, in the folder of a run that finishes or is interrupted.

    It holds the best weights (the last ones, where nothing is monitored) and a card with data, command, metrics and
    versions.
    An interruption saves the state of the training and prints how to go on.

    Args:
        program: What starts the command line, such as ``"python train.py"``; left out, no command is printed.
        arguments: The arguments it was started with, for the card.
    """

    def __init__(self, program: str | None = None, arguments: Sequence[str] = ()):
        self.program = program
        self.arguments = arguments

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._leave(trainer, pl_module, "finished")
            print(f"the model is in {folder(trainer) / 'model'}")
            for name in (RECENT, INTERRUPTED):
                Path(folder(trainer), CHECKPOINTS, name).unlink(missing_ok=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, Exception):
            end_others(trainer.strategy.launcher)
        began = trainer.state.fn == "fit" and trainer.global_step and not trainer.fast_dev_run
        together = isinstance(exception, Preempted)  # all processes are here, after the same step
        if not began or not (trainer.is_global_zero or together):
            return
        alone = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if together and not alone:
            self._save_state(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        interrupted = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        print(f"stopped at step {trainer.global_step} (epoch {trainer.current_epoch})", file=sys.stderr)
        with suppress(OSError, RuntimeError, ValueError):  # what ended the run is what is to be seen
            if interrupted and alone:
                self._save_state(trainer, pl_module)
            self._leave(trainer, pl_module, f"interrupted in epoch {trainer.current_epoch}")
        newest = newest_checkpoint(folder(trainer) / CHECKPOINTS, "last")
        if newest is None:
            print("no checkpoint was written yet", file=sys.stderr)
            return
        print(f"the last good checkpoint is {newest}", file=sys.stderr)
        if self.program:
            config = shlex.quote(str(folder(trainer) / "config.yaml"))
            print(
                f"go on: {self.program} fit --config {config} --ckpt_path {shlex.quote(str(newest))}", file=sys.stderr
            )

    def _save_state(self, trainer: Any, pl_module: Any) -> None:
        if trainer.validating:
            for callback in trainer.callbacks:  # its averaged weights stand in for those in training
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)
        state = trainer._checkpoint_connector.dump_checkpoint()
        trainer.strategy.save_checkpoint(state, folder(trainer) / CHECKPOINTS / INTERRUPTED)

    def _leave(self, trainer: Any, pl_module: Any, how: str) -> None:
        file = self._best(trainer)
        if file is None:
            return
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(pl_module, FSDPModule):  # parts of which cannot be copied
            network: Any = load(file)
        else:
            network = copy.deepcopy(pl_module.model).cpu()
            weights = checkpoint["state_dict"].items()
            network.load_state_dict({k.removeprefix("model."): v for k, v in weights if k.startswith("model.")})
        save(
            network,
            folder(trainer) / "model",
            card=self._card(trainer, checkpoint, file, how),
            **pl_module.described,
        )

    def _best(self, trainer: Any) -> Path | None:
        paths = [
            c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor
        ]
        newest = newest_checkpoint(folder(trainer) / CHECKPOINTS, "last")
        return next((Path(p) for p in [*paths, newest] if p and Path(p).is_file()), None)

    def _card(self, trainer: Any, checkpoint: Mapping[str, Any], file: Path, how: str) -> str:
        scored: Mapping[str, Any] = next(
            (s for s in checkpoint["callbacks"].values() if s.get("best_model_path") == str(file)), {}
        )
        score = f", {scored['monitor']} {scored['best_model_score']:.4g}" if scored.get("monitor") else ""
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("gate/")}
        last = ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
        return "\n".join(
            [
                f"- Data: {_said(trainer.datamodule)}",
                f"- Command: `{shlex.join([*(self.program or 'python').split(), *self.arguments])}`",
                f"- Run: {how}, at step {trainer.global_step}, on {trainer.world_size} × "
                f"{trainer.strategy.root_device.type}, {trainer.precision}",
                f"- Weights: of epoch {checkpoint['epoch']}, step {checkpoint['global_step']}{score}",
                f"- Metrics at the end: {last}",
                f"- Trained with: Python {platform.python_version()}, torch {torch.__version__}, "
                f"timm {timm.__version__}, Lightning {pl.__version__}",
            ]
        )


class Predictions(Callback):
    """Writes what ``predict`` finds to ``predictions.csv``: a row an image, its best labels with their probabilities.

    Where several targets are named one after another, these are the best label of each; of a captioner, its sentence;
    of questions, a row each with its answer and the probability of it.

    Args:
        most: How many labels a row has at most.
    """

    def __init__(self, most: int = 5):
        self.most = most
        self.rows: list[list[Any]] = []

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if isinstance(outputs, list):
            for name, said in zip(getattr(batch, "names", batch[1]), outputs, strict=True):
                self.rows += ([name, *line] for line in ([(said,)] if isinstance(said, str) else said))
            return
        several, classes = outputs.ndim == 3, outputs.shape[-1]
        best = outputs.cpu().max(-1) if several else outputs.cpu().topk(min(self.most, classes))
        labels = pl_module.labels or [str(number) for number in range(classes)]
        for name, probabilities, numbers in zip(batch[1], best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip((labels[number] for number in numbers), (f"{p:.4f}" for p in probabilities), strict=True)
            self.rows.append([name, *(value for pair in pairs for value in pair)])

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = folder(trainer) / f"predictions{rank}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        width = max(map(len, self.rows), default=1)
        pairs = [f"{what}{place}" for place in range(1, width // 2 + 1) for what in ("label", "probability")]
        with file.open("w", newline="", encoding="utf-8") as opened:
            header = getattr(pl_module, "columns", pairs)
            csv.writer(opened).writerows([["image", *header], *self.rows])
        print(f"{len(self.rows)} predictions are in {file}")
        self.rows = []


def end_others(launcher: Any, seconds: float = 5.0) -> None:
    """Say how processes have ended that this one started, and end those that go on, in vain, without it."""
    others = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
    until = time.monotonic() + seconds
    while any(other.poll() is None for other in others) and time.monotonic() < until:
        time.sleep(0.1)
    for number, other in enumerate(others, 1):
        if other.poll() is None:
            other.kill()
        elif other.returncode < 0:  # else it says itself why
            print(f"process {number} ended by {signal.Signals(-other.returncode).name}", file=sys.stderr)


def _said(data: Any) -> str:
    """What is known of the data, for the card."""
    if data is None:
        return "given in Python"
    counts = ", ".join(f"{len(split)} {name}" for name, split in getattr(data, "splits", {}).items())
    return " ".join(
        str(part) for part in (type(data).__name__, getattr(data, "root", ""), f"({counts})" * bool(counts))
    )


def folder(trainer: pl.Trainer) -> Path:
    """Where a run keeps what it leaves."""
    logger = trainer.logger
    return Path((logger.log_dir if logger else None) or trainer.default_root_dir)


def newest_checkpoint(at: Path, which: str) -> Path | None:
    """Find the ``"best"`` or the ``"last"`` checkpoint in a folder of checkpoints."""
    names = {"best": [BEST], "last": [LAST, RECENT, INTERRUPTED]}[which]
    files = [at / name for name in names if (at / name).is_file()]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)
