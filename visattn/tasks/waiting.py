"""How long a training waits for its data."""

import time
import warnings
from typing import Any

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import PassThroughProfiler

FETCHES, STEPS = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"  # Lightning's names


class Stopwatch(PassThroughProfiler):
    """Adds up the seconds of what Lightning does to get batches, and to learn from them."""

    def __init__(self) -> None:
        super().__init__()
        self.began: dict[str, float] = {}
        self.seconds = dict.fromkeys((FETCHES, STEPS), 0.0)

    def start(self, action_name: str) -> None:
        if action_name in self.seconds:
            self.began[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name in self.began:
            self.seconds[action_name] += time.monotonic() - self.began.pop(action_name)


class Waiting(Callback):
    """Logs the share of each epoch of training that passes in waiting for data, as ``train/waiting``.

    Once, it warns of a share that is too large. With a profiler of one's own it leaves this to that one.

    Args:
        most: The share that is still well.
        after: Seconds of training before it warns.
    """

    def __init__(self, most: float = 0.2, after: float = 60.0):
        self.most = most
        self.after = after
        self.warned = False
        self.watch: Stopwatch | None = None
        self.fetched = self.learned = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.profiler, PassThroughProfiler):
            trainer.profiler = self.watch = Stopwatch()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.watch is None:
            return
        fetches, steps = (self.watch.seconds[name] for name in (FETCHES, STEPS))
        waited, learned = fetches - self.fetched, steps - self.learned
        self.fetched, self.learned = fetches, steps
        share = waited / max(waited + learned, 1e-9)
        pl_module.log("train/waiting", share, sync_dist=trainer.world_size > 1)
        if share > self.most and fetches + steps >= self.after and trainer.is_global_zero and not self.warned:
            self.warned = True
            warnings.warn(
                f"the training waits for data {share:.0%} of its time: more data.workers, smaller images or shards "
                f"would help",
                stacklevel=2,
            )
