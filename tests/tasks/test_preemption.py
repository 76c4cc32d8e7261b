import os
import signal

import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.callbacks import Callback

from visattn.tasks import Classification
from visattn.tasks.preemption import Preemption


class Told(Callback):
    """Has the process told to end, in the middle of its third step."""

    def __init__(self, number: int):
        self.number = number

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def _handlers():
    """What signals did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_ends_behind_the_step_with_its_state_and_a_code(number, digits, trainer, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        trainer(Told(number), Preemption()).fit(Classification("test_resnet"), datamodule=digits())
    assert ended.value.code == 75
    said = capsys.readouterr().err
    assert f"told to end by {number.name}" in said
    assert "stopped at step 3 (epoch 0)" in said
    file = tmp_path / "checkpoints/interrupted.ckpt"
    assert f"the last good checkpoint is {file}" in said
    assert torch.load(file, weights_only=True)["global_step"] == 3
    assert signal.getsignal(number) == signal.SIG_DFL

    again = trainer(Preemption())
    again.fit(Classification("test_resnet"), datamodule=digits(), ckpt_path=file)
    assert again.global_step >= 5
    assert not file.exists()


@pytest.mark.parametrize(("array", "requeues"), [(None, True), ("7", True), (None, False)])
def test_slurm_has_the_job_back_in_its_queue(array, requeues, digits, trainer, tmp_path, monkeypatch):
    stand_in = tmp_path / "bin/scontrol"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nls {tmp_path}/checkpoints >> {tmp_path}/asked\n')
    stand_in.chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_LOCALID": "0"}
    job |= {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    job |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "3"} if array else {}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    environment = SLURMEnvironment(auto_requeue=requeues)
    made = trainer(Told(signal.SIGUSR1), Preemption(), plugins=[environment])
    with pytest.raises(SystemExit) as ended:
        made.fit(Classification("test_resnet"), datamodule=digits())
    assert ended.value.code == 75
    if not requeues:
        assert not (tmp_path / "asked").exists()
        return
    asked, *there = (tmp_path / "asked").read_text().splitlines()
    assert asked == ("requeue 7_3" if array else "requeue 42")
    assert "interrupted.ckpt" in there  # the state is saved before


def test_a_validation_is_left_too(digits, trainer, tmp_path):
    class Between(Callback):
        def on_validation_batch_start(self, trainer, *_):
            if not trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        trainer(Between(), Preemption()).fit(Classification("test_resnet"), datamodule=digits())
    assert ended.value.code == 75
    assert (tmp_path / "checkpoints/interrupted.ckpt").exists()
