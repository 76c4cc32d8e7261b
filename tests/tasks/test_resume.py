"""Trainings that are killed in the middle of an epoch and go on as if nothing had happened."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

from tests.tasks.test_classification import TINY, Seen, StopAt
from visattn import CBAM
from visattn.__main__ import main
from visattn.tasks import Classification

ROOT = Path(__file__).parents[2]
BATCHES = 10  # of an epoch


class Slowly(pl.Callback):
    """Waits in each step, so that there is time to be killed."""

    def on_train_batch_start(self, *_):
        time.sleep(0.3)


@pytest.fixture
def photos(tmp_path) -> Path:
    for k in range(100):
        file = tmp_path / f"photos/{'train' if k < 80 else 'val'}/{'ab'[k % 2]}/{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 40, 3), np.uint8)).save(file)
    return tmp_path / "photos"


def command(data: Path, folder: str, more: str = "") -> list[str]:
    options = (
        f"fit --model.backbone test_resnet --model.attention CBAM --model.mixup 0.2 --data.root {data} --data.size 32"
        " --data.batch_size 8 --data.workers 1 --data.buffer 30 --trainer.accelerator cpu --trainer.max_epochs 3"
        f" --trainer.log_every_n_steps 1 --trainer.default_root_dir {folder} --trainer.enable_progress_bar false"
        " --trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay 0.9"
        " --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename recent"
        " --trainer.callbacks.every_n_train_steps 3 --trainer.callbacks.enable_version_counter false"
    )
    return [sys.executable, str(ROOT / "train.py"), *shlex.split(f"{options} {more}")]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VISATTN_TRACEBACK": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def losses(folder: Path) -> dict[int, str]:
    """The loss of every step, each of which is there once."""
    with (folder / "version_0/metrics.csv").open() as file:
        rows = [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert [step for step, _ in rows] == [*range(len(rows))]
    return dict(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loose", "shards"])
def test_a_run_that_is_killed_within_an_epoch_goes_on_with_the_same_losses(kind, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = photos
    if kind == "shards":
        data = tmp_path / "shards"
        assert main(["shards", str(photos), str(data), "--megabytes", "0.1"]) == 0
        assert len(list(data.glob("train-*.tar"))) > 2
    finish(start(command(data, "whole")))
    slowly = "--trainer.callbacks+=tests.tasks.test_resume.Slowly"
    process = start(command(data, "parts", slowly))
    recent = tmp_path / "parts/version_0/checkpoints/recent.ckpt"
    for _ in range(2400):
        assert process.poll() is None, process.communicate()[0]
        if recent.exists() and torch.load(recent, weights_only=True)["global_step"] > BATCHES:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    held = torch.load(recent, weights_only=True)
    done = held["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
    assert 0 < done < BATCHES, "it was not killed within an epoch"
    assert held["epoch"] > 0
    finish(start([*command(data, "parts"), "--ckpt_path", "last"]))
    whole, parts = (losses(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == 3 * BATCHES
    assert parts == whole
    ends = [
        torch.load(tmp_path / f"{n}/version_0/checkpoints/last.ckpt", weights_only=True) for n in ("whole", "parts")
    ]
    for weights in ("state_dict", "current_model_state"):
        assert all(torch.equal(ends[0][weights][name], ends[1][weights][name]) for name in ends[0][weights])


@pytest.mark.parametrize("place", [(1, 3), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_an_interruption_within_an_epoch_goes_on_exactly(place, digits, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def run(folder, *more, ckpt_path=None):
        torch.manual_seed(3)
        task = Classification(**TINY, attention=CBAM, backbone_args={"drop_path_rate": 0.2}, mixup=0.5)
        seen = Seen()
        runner = trainer(seen, *more, max_epochs=2, default_root_dir=tmp_path / folder)
        try:
            runner.fit(task, datamodule=digits(), ckpt_path=ckpt_path)
        except SystemExit:
            assert more, "how Lightning ends after Ctrl-C"
        return seen, task

    epoch, batch = place
    whole, expected = run("whole")
    first, _ = run("parts", StopAt(epoch, batch=batch))
    second, task = run("parts", ckpt_path=tmp_path / "parts/checkpoints/interrupted.ckpt")
    assert len(first.losses) == epoch * 5 + batch
    assert first.losses + second.losses == whole.losses
    assert all(
        torch.equal(a, b) for a, b in zip(task.state_dict().values(), expected.state_dict().values(), strict=True)
    )


@pytest.mark.slow
def test_a_checkpoint_of_a_step_goes_on_exactly(digits, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def run(folder, ckpt_path=None):
        torch.manual_seed(3)
        task, seen = Classification(**TINY, mixup=0.5), Seen()
        steps = ModelCheckpoint(filename="{step}", every_n_train_steps=1, save_top_k=-1)
        averaged = EMAWeightAveraging(decay=0.9)
        trainer(seen, steps, averaged, max_epochs=2, default_root_dir=tmp_path / folder).fit(
            task, datamodule=digits(), ckpt_path=ckpt_path
        )
        return seen.losses

    whole = run("whole")
    for step in (3, 5):  # within an epoch, and at its end
        file = tmp_path / f"whole/checkpoints/step={step}.ckpt"
        assert run(f"part{step}", file) == whole[step:], step
