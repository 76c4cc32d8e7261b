"""A training that is told to end saves its state between two steps, and has itself started again by SLURM."""

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any

from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from visattn.tasks.run import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(Callback):
    """Ends a training at the next step after SIGTERM or SIGUSR1, on all processes if any of them is told to.

    :class:`~visattn.tasks.run.Outcome` saves the state, and the process ends with code 75, "try again". Under SLURM the
    job is put back into the queue by ``scontrol requeue``, unless Lightning's ``SLURMEnvironment`` has
    ``auto_requeue=False``.

    Lightning would save from within the handler of the signal: in the middle of a step, and each process by itself.
    """

    def __init__(self) -> None:
        self.told: int | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Be the last: a job that is put back is ended, so its state must be saved before."""
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the place of Lightning's handlers, which it puts back what was before at the end."""
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.told = number

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.told is not None, all=False):
            self.end(trainer)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.told is not None and trainer.world_size == 1 and trainer.state.fn == "fit":
            self.end(trainer)

    def end(self, trainer: Any) -> None:
        why = signal.Signals(self.told).name if self.told else "another process"
        print(f"told to end by {why}", file=sys.stderr)
        launched = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher) and not trainer.is_global_zero
        raise Preempted(0 if launched else os.EX_TEMPFAIL)  # else Lightning kills the one that saves

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if isinstance(exception, Preempted) and requeues and trainer.is_global_zero:
            array = os.environ.get("SLURM_ARRAY_JOB_ID")
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
            subprocess.run(["scontrol", "requeue", job], check=False)
