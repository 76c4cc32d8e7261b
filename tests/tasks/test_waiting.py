import time

import pytest
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import SimpleProfiler

from visattn.tasks import Classification
from visattn.tasks.waiting import Waiting


class Logged(Callback):
    def on_train_end(self, trainer, pl_module):
        self.found = float(trainer.callback_metrics["train/waiting"])


def slow(data, seconds: float):
    """Each image takes so long to read."""
    data.setup()
    read = data.splits["train"].read

    def late(index):
        time.sleep(seconds)
        return read(index)

    object.__setattr__(data.splits["train"], "read", late)
    return data


def test_waiting_for_data_is_measured_and_warned_of_once(digits, trainer):
    logged = Logged()
    task, data = Classification("test_resnet"), slow(digits(train_per_class=4), 0.03)
    made = trainer(Waiting(after=0.0), logged, max_epochs=2)
    with pytest.warns(UserWarning, match=r"the training waits for data \d+% of its time: more data.workers") as warned:
        made.fit(task, datamodule=data)
    assert len([w for w in warned if "waits for data" in str(w.message)]) == 1
    assert 0.2 < logged.found < 1


def test_nothing_is_said_of_a_short_training(digits, trainer, recwarn):
    logged = Logged()
    trainer(Waiting(), logged).fit(Classification("test_resnet"), datamodule=slow(digits(), 0.01))
    assert 0 < logged.found < 1
    assert not [w for w in recwarn if "waits for data" in str(w.message)]


def test_a_profiler_of_ones_own_stays(digits, trainer):
    made = trainer(Waiting(), profiler=SimpleProfiler())
    made.fit(Classification("test_resnet"), datamodule=digits())
    assert isinstance(made.profiler, SimpleProfiler)
    assert "train/waiting" not in made.callback_metrics
