import csv
import io
import os
import resource
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from timm.layers import SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import visattn
from visattn.surgery import insertions
from visattn.tasks import Classification, RunError
from visattn.tasks.run import Best, Log, Predictions, Recent, TimmSyncBatchNorm, WholeFiles, newest_checkpoint


class Room:
    """No file may grow beyond so many bytes: what a full disk looks like to who writes."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    files, path = WholeFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint({"step": 1}, path)
    state = {"step": 2, "weights": torch.zeros(100_000)}
    with (
        Room(50_000),
        pytest.raises(RunError, match=r"last.ckpt cannot be written \(.*File too large\); the one before it is whole"),
    ):
        files.save_checkpoint(state, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    with Room(50_000), pytest.raises(RunError, match=r"other.ckpt cannot be written .*; earlier ones are whole"):
        files.save_checkpoint(state, tmp_path / "other.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("write", [1, 2, 20])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interruption_waits_for_the_file_unless_it_comes_twice(write, times, tmp_path, monkeypatch):
    interruptions = [write] * times

    class Interrupted(io.FileIO):
        left = 0

        def write(self, data):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().write(data)

    def opened(path, mode):
        file = Interrupted(path, mode)
        file.left = interruptions.pop() if interruptions else 0
        return file

    files, path = WholeFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint({"step": 1}, path)
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True)["step"] == (2 if times == 1 else 1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fills_up_in_training_ends_it_and_leaves_what_was_saved(digits, trainer, tmp_path, capsys):
    room = Room(50_000)

    class FillUp(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                room.__enter__()

    try:
        with pytest.raises(RunError, match="cannot be written"):
            trainer(FillUp(), max_epochs=2).fit(Classification("test_resnet"), datamodule=digits())
    finally:
        room.__exit__()
    assert f"the last good checkpoint is {tmp_path / 'checkpoints/last.ckpt'}" in capsys.readouterr().err
    visattn.load(tmp_path / "checkpoints/last.ckpt")


def test_a_disk_budget_removes_the_oldest_but_neither_the_best_nor_the_last(tmp_path):
    files = WholeFiles(disk=3.5 * 400_000 / 2**30)
    state = {"weights": torch.zeros(100_000)}  # 400 kB
    for age, name in enumerate(("best-1.ckpt", "best-2.ckpt", "last.ckpt")):
        files.save_checkpoint(state, tmp_path / name)
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "best.ckpt").symlink_to("best-1.ckpt")
    files.save_checkpoint(state, tmp_path / "best-3.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == {"best-1.ckpt", "best.ckpt", "last.ckpt", "best-3.ckpt"}
    files.save_checkpoint(state, tmp_path / "last.ckpt")  # replaces the one before
    assert (tmp_path / "best-3.ckpt").exists()

    os.replace(tmp_path / "best-3.ckpt", tmp_path / "interrupted.ckpt")
    with pytest.raises(RunError, match=r"recent.ckpt would take 0.000\d+.* than disk=.* from which the run goes"):
        files.save_checkpoint(state, tmp_path / "recent.ckpt")
    left = {"best-1.ckpt", "best.ckpt", "last.ckpt", "interrupted.ckpt"}
    assert {file.name for file in tmp_path.iterdir()} == left
    with pytest.raises(ValueError, match="disk must be positive, got 0"):
        WholeFiles(disk=0.0)


def test_the_best_of_several_is_linked(digits, trainer, tmp_path):
    class Scored(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("score", (0.1, 0.3, 0.2, 0.05)[trainer.current_epoch])

    options = {"monitor": "score", "mode": "max", "save_top_k": 2, "enable_version_counter": False}
    several = Best(dirpath=tmp_path / "kept", filename="best", **options)
    trainer(Scored(), several, max_epochs=4).fit(Classification("test_resnet"), datamodule=digits())
    kept = {file.name for file in (tmp_path / "kept").iterdir()}
    assert kept == {"best-001-10.ckpt", "best-002-15.ckpt", "best.ckpt"}
    best = newest_checkpoint(tmp_path / "kept", "best")
    assert best.resolve().name == "best-001-10.ckpt"
    assert torch.load(best, weights_only=True)["epoch"] == 1


def test_the_state_is_saved_by_a_clock_that_nobody_sets(digits, trainer, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr("pytorch_lightning.callbacks.model_checkpoint.time.monotonic", lambda: next(clock))
    saved = []

    class Noted(WholeFiles):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            saved.append((Path(path).name, checkpoint["global_step"]))
            super().save_checkpoint(checkpoint, path, storage_options)

    class Last(Callback):
        def on_train_end(self, trainer, pl_module):
            self.found = newest_checkpoint(tmp_path / "checkpoints", "last").name

    last = Last()
    kept = trainer(Recent(minutes=2.0), last, plugins=[Noted()])
    kept.fit(Classification("test_resnet"), datamodule=digits(train_per_class=16))
    assert [step for name, step in saved if name == "recent.ckpt"]
    assert last.found == "last.ckpt"
    assert not (tmp_path / "checkpoints/recent.ckpt").exists()  # it is finished
    with pytest.raises(ValueError, match="save_minutes must be positive, got -1"):
        Recent(minutes=-1.0)


def test_converting_to_synchronised_norms_keeps_what_is_inserted():
    task = Classification("test_byobnet", attention=visattn.CBAM, backbone_args={"num_classes": 10, "in_chans": 1})
    task.configure_model()
    called = []
    for inserted in insertions(task.model):
        inserted.register_forward_hook(lambda module, args, output: called.append(module))
    TimmSyncBatchNorm().apply(task)
    assert any(isinstance(module, SyncBatchNormAct) for module in task.model.modules())
    assert not any(
        isinstance(module, nn.BatchNorm2d) and "visattn" not in n for n, module in task.model.named_modules()
    )
    task.eval()(torch.randn(2, 1, 32, 32))
    assert called == insertions(task.model)
    assert TimmSyncBatchNorm().revert(task) is task


@pytest.mark.parametrize("inserted", [visattn.BAM, visattn.StyleRecalibration])
def test_norms_of_what_is_inserted_are_synchronised_and_train(inserted):
    task = Classification("test_byobnet", attention=inserted, backbone_args={"num_classes": 10, "in_chans": 1})
    task.configure_model()
    before = {name: value.shape for name, value in task.state_dict().items()}
    names = {n for n, module in task.model.named_modules() if "visattn" in n and isinstance(module, _BatchNorm)}
    assert names
    TimmSyncBatchNorm().apply(task)
    norms = {n: module for n, module in task.model.named_modules() if isinstance(module, _BatchNorm)}
    assert names <= norms.keys()
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms.values())
    assert {name: value.shape for name, value in task.state_dict().items()} == before
    task.train()(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for each in insertions(task.model) for p in each.parameters())


def test_the_log_goes_on_where_it_left_off(tmp_path):
    for step, metrics in ((0, {"loss": 2.0}), (1, {"loss": 1.0, "top1": 0.5})):
        log = Log(tmp_path, name="", version=0)
        log.log_metrics(metrics, step)
        log.save()
    rows = list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))
    assert rows == [{"step": "0", "loss": "2.0", "top1": ""}, {"step": "1", "loss": "1.0", "top1": "0.5"}]


def test_the_log_leaves_out_what_is_done_again(tmp_path):
    log = Log(tmp_path, name="", version=0)
    for step in range(5):
        log.log_metrics({"loss": float(step)}, step)
    log.save()
    with Path(log.log_dir, "metrics.csv").open("a") as file:
        file.write("5.0")  # a row that was cut off
    again = Log(tmp_path, name="", version=0, since=3)
    again.log_metrics({"loss": 7.0}, 3)
    again.save()
    rows = list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))
    assert [(row["step"], row["loss"]) for row in rows] == [("0", "0.0"), ("1", "1.0"), ("2", "2.0"), ("3", "7.0")]


def test_the_last_checkpoint_is_the_newest(tmp_path):
    assert newest_checkpoint(tmp_path, "last") is None
    for name in ("interrupted.ckpt", "recent.ckpt", "last.ckpt", "best.ckpt"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "interrupted.ckpt", (2, 2))
    os.utime(tmp_path / "recent.ckpt", (1, 1))
    assert newest_checkpoint(tmp_path, "last") == tmp_path / "last.ckpt"
    os.utime(tmp_path / "last.ckpt", (0, 0))
    assert newest_checkpoint(tmp_path, "last") == tmp_path / "interrupted.ckpt"
    os.utime(tmp_path / "recent.ckpt", (3, 3))
    assert newest_checkpoint(tmp_path, "last") == tmp_path / "recent.ckpt"
    assert newest_checkpoint(tmp_path, "best") == tmp_path / "best.ckpt"


def test_predictions_name_the_images_and_their_best_labels(digits, trainer, tmp_path):
    task, data = Classification("test_resnet"), digits()
    probabilities = trainer(Predictions(most=3)).predict(task, datamodule=data)
    rows = list(csv.reader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert rows[0] == ["image", "label1", "probability1", "label2", "probability2", "label3", "probability3"]
    assert len(rows) == 41
    best = torch.cat(probabilities).topk(3)
    assert rows[1][1::2] == [task.labels[i] for i in best.indices[0]]
    assert rows[1][2::2] == [f"{p:.4f}" for p in best.values[0]]
    assert len({row[0] for row in rows}) == 41
