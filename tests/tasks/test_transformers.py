"""Spatial transformers, trained from the command line and resumed, on canvases and on images."""

import csv
import re
import shlex
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import visattn
from visattn import AffineTransformer
from visattn.data.canvas import Canvas
from visattn.data.images import Images
from visattn.models import DigitClassifier, LearnToPayAttention, SpatialTransformerNetwork
from visattn.tasks import Classification
from visattn.tasks.command_line import data_of, run_cli

QUIET = (
    " --trainer.accelerator cpu --trainer.limit_val_batches 1 --trainer.limit_test_batches 2 --trainer.max_steps 3"
    " --trainer.limit_predict_batches 2 --trainer.limit_train_batches 3 --trainer.enable_progress_bar false"
    " --trainer.enable_model_summary false"
)
DIGITS = (
    "--config transform_mnist.yaml --data.root digits --data.download false --data.batch_size 16"
    " --model.network.filters [4,6]" + QUIET
)
NETWORK = (
    "--config quickstart.yaml --model.attention null --model.backbone_args null --model.backbone {backbone}"
    " --data.size {size} --data.train_per_class 4 --data.val_per_class 2 --data.batch_size 8"
    " --model.network SpatialTransformerNetwork" + QUIET
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISATTN_TRACEBACK", raising=False)


def refused(command: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_cli(shlex.split(command))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# --- digits on canvases -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_are_put_upright_from_the_command_line():
    run_cli(shlex.split(f"fit {DIGITS}"))
    run = Path("runs/transform_mnist/version_0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["datamodule"], config["data"]["preset"]) == ("Canvas", "rotated")
    model = visattn.load(run / "model")
    assert type(model) is DigitClassifier
    assert {"size": (28, 28), "in_chans": 1, "num_classes": 10, "filters": (4, 6)}.items() <= model.arguments.items()
    (inserted,) = visattn.insertions(model)
    assert (type(inserted.attention), inserted.site.name, inserted.gate) == (AffineTransformer, "layers", None)
    assert model.transform.input_size == (1, 28, 28)
    assert "- Data: Canvas digits (1458 train, 179 test, 160 val)" in (run / "model/card.md").read_text()

    x = torch.randn(2, 1, 28, 28)
    again = Classification.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True).eval()
    torch.testing.assert_close(again(x), model(x))  # its channels are last
    assert torch.equal(visattn.load(run / "checkpoints/last.ckpt")(x), model(x))
    run_cli(shlex.split(f"test {DIGITS} --ckpt_path best"))
    assert sum(int(row["images"]) for row in csv.DictReader((run / "per_class.csv").open())) == 32
    run_cli(shlex.split(f"predict {DIGITS} --ckpt_path last"))
    assert len((run / "predictions.csv").read_text().splitlines()) == 33

    run_cli(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "7"])
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (2, 7)
    assert not Path("runs/transform_mnist/version_1").exists()


def test_the_size_and_channels_of_the_canvas_are_those_of_the_classifier():
    more = "--data.preset addition --model.network.pool 2 --model.attention.localiser connected"
    run_cli(shlex.split(f"fit {DIGITS} {more}"))
    model = visattn.load("runs/transform_mnist/version_0/model")
    assert {"size": (42, 42), "in_chans": 2, "num_classes": 19, "pool": 2}.items() <= model.arguments.items()
    assert model(torch.randn(1, 2, 42, 42)).shape == (1, 19)


def test_options_of_a_network_come_before_what_the_data_says(trainer):
    task = Classification(network=partial(DigitClassifier, num_classes=12))
    with pytest.raises(ValueError, match="labels must have one entry for each of 12 classes, got 10"):
        trainer(fast_dev_run=True).fit(task, datamodule=Canvas("rotated"))


@pytest.mark.parametrize("options", [{}, {"size": (30, 42), "in_chans": 2, "pool": 1}])
def test_without_data_a_network_is_as_its_options_say(options):
    task = Classification(network=partial(DigitClassifier, **options), attention=partial(AffineTransformer, view=8))
    task.configure_model()
    size = options.get("in_chans", 1), *options.get("size", (28, 28))
    assert task.model(torch.randn(2, *size)).shape == (2, 10)
    assert [(i.site.channels, i.site.height, i.site.width) for i in visattn.insertions(task.model)] == [size]


class Silent(pl.LightningDataModule):
    """Data that says nothing of itself."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])), batch_size=4)


def test_data_is_named_shortly_or_by_its_path(tmp_path):
    (tmp_path / "a.yaml").write_text("datamodule: Canvas\n")
    path = f"{Canvas.__module__}.Canvas"
    assert data_of(Classification, ["fit"]) is Images
    assert data_of(Classification, ["fit", "--config", "a.yaml"]) is Canvas
    assert data_of(Classification, ["fit", "--config=a.yaml", "--datamodule=Images"]) is Images
    assert data_of(Classification, ["fit", "--datamodule", path]) is Canvas
    run_cli(shlex.split(f"fit {DIGITS} --datamodule {path} --trainer.fast_dev_run true"))


def test_data_of_ones_own_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(
        "from visattn.data.canvas import Canvas\n\n\nclass Thirds(Canvas):\n    def __init__(self, third: int = 3):\n"
        "        super().__init__('plain', size=10 * third, batch_size=8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = "--datamodule mine_of_a_test.Thirds --data.third 4 --model.network DigitClassifier"
    run_cli(shlex.split(f"fit {config} --trainer.default_root_dir runs {QUIET}"))
    assert visattn.load("runs/version_0/model").arguments["size"] == (40, 40)


def test_data_that_says_nothing_leaves_a_network_as_its_options_say(trainer):
    task = Classification(network=DigitClassifier, attention=AffineTransformer)
    trainer(fast_dev_run=True).fit(task, datamodule=Silent())
    assert task.num_classes == 10


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--model.network null", "backbone must be given, unless there is a network that has none"),
        ("--model.network LearnToPayAttention", "backbone must be given: LearnToPayAttention is made of one"),
        ("--model.backbone test_resnet", "backbone must be left out: DigitClassifier has no backbone"),
        ("--model.pretrained true", "pretrained must be left out: DigitClassifier has no backbone"),
        ("--model.backbone_args.in_chans 1", "backbone_args must be left out: DigitClassifier has no backbone"),
        ("--datamodule Canvass", "datamodule must be Images, Canvas, or the path of a class .*, got 'Canvass'"),
        ("--datamodule Pairs", "datamodule must be Images, Canvas, or the path of a class .*, got 'Pairs'"),
        ("--datamodule os.path", "datamodule must be Images, Canvas, or the path of a class .*, got 'os.path'"),
        ("--datamodule Images", ".* does not accept option 'data.preset'"),
        ("--data.preset rotatd", r"data.preset: must be one of \['plain', .*\], got rotatd"),
        ("--model.network DigitClasifier", "model.network: there is no 'DigitClasifier', but DigitClassifier"),
        ("--model.network.pool 2", r"size must be at least 42 for its convolutions, got \(28, 28\)"),
    ],
)
def test_an_error_is_one_line(more, message, capsys):
    line = refused(f"fit {DIGITS.replace(' --model.network.filters [4,6]', '')} {more}", capsys)
    assert re.fullmatch(f"error: {message}", line), line


def test_options_that_a_checkpoint_would_forget_are_refused():
    with pytest.raises(ValueError, match="network must have its options by name, for a checkpoint to hold them, got"):
        Classification(network=partial(DigitClassifier, 12))


# --- resuming ---------------------------------------------------------------------------------------------------------


class Seen(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append((trainer.current_epoch, batch_idx, outputs["loss"].item()))


class StopAt(Callback):
    """Ctrl-C at the start of an epoch, after the checkpoint of the one before."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


STEPS, EPOCHS = {"max_steps": 7, "max_epochs": -1}, {"max_epochs": 2}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("limit", "name", "workers"),
    [
        (STEPS, "last", 0),
        (EPOCHS, "interrupted", 0),
        pytest.param(STEPS, "interrupted", 0, marks=slow),
        pytest.param(STEPS, "last", 1, marks=slow),
        pytest.param(STEPS, "interrupted", 1, marks=slow),
        pytest.param(EPOCHS, "last", 1, marks=slow),
        pytest.param(EPOCHS, "interrupted", 1, marks=slow),
    ],
)
def test_resuming_between_epochs_is_as_if_nothing_had_happened(limit, name, workers, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def run(folder, *more, ckpt_path=None):
        torch.manual_seed(3)
        task = Classification(
            network=partial(DigitClassifier, filters=(4, 6)), attention=partial(AffineTransformer, view=14), gate=None
        )
        seen = Seen()
        runner = trainer(seen, *more, limit_train_batches=3, default_root_dir=tmp_path / folder, **limit)
        with suppress(SystemExit):  # how Lightning ends after Ctrl-C
            runner.fit(task, datamodule=Canvas("rotated", batch_size=16, workers=workers), ckpt_path=ckpt_path)
        return seen.losses

    whole, first = run("whole"), run("parts", StopAt(1))
    second = run("parts", ckpt_path=tmp_path / f"parts/checkpoints/{name}.ckpt")
    assert len(first) == 3
    assert first + second == whole


# --- any backbone -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "size", "more"),
    [
        ("test_resnet", 48, "--model.network.heads 2 --model.network.transform isotropic --model.network.scale 0.5"),
        ("test_vit", 160, "--model.network.steps 2 --model.network.stage 1 --data.batch_size 2"),
        pytest.param(
            *("test_efficientnet", 48, "--model.network.heads 4 --model.network.localiser test_resnet"), marks=slow
        ),
        pytest.param(
            *("test_convnext", 64, "--model.network.transform thin_plate --model.network.points [3,4]"), marks=slow
        ),
    ],
)
def test_trains_on_warped_views_from_the_command_line(backbone, size, more):
    run_cli(shlex.split(f"fit {NETWORK.format(backbone=backbone, size=size)} {more}"))
    run = Path("runs/quickstart/version_0")
    model = visattn.load(run / "model")
    assert type(model) is SpatialTransformerNetwork
    assert model.arguments["backbone"] == backbone
    x = torch.randn(2, model.backbone.in_chans, size, size)
    again = Classification.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True).eval()
    assert torch.equal(again(x), model(x))
    assert again.labels == model.labels == [str(k) for k in range(10)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--model.network.transform afine", "model.network: .*transform.*Literal.*afine"),
        ("--model.network.scale 0.5", "scale must be None where transform is 'affine', got 0.5"),
        ("--model.network.localiser sharde", "localiser must be .* or the name of a timm model.*; close: shared"),
        ("--model.attention AffineTransformer --model.at backbone.layer2", ".*backbone.layer2 is called 2 times .*"),
    ],
)
def test_an_error_of_the_network_is_one_line(more, message, capsys):
    line = refused(f"fit {NETWORK.format(backbone='test_resnet', size=32)} {more}", capsys)
    assert re.fullmatch(f"error: {message}", line), line


@pytest.mark.parametrize(
    ("network", "attends"),
    [
        (SpatialTransformerNetwork, "transformer."),
        (partial(SpatialTransformerNetwork, localiser="test_efficientnet", heads=2), "transformer."),
        (LearnToPayAttention, "attention."),
    ],
    ids=["shared", "of its own", "pay attention"],
)
def test_the_attention_of_a_network_has_its_own_rate_and_a_shared_trunk_has_not(network, attends, digits, trainer):
    task = Classification(
        "test_resnet",
        network=network,
        attention_lr_factor=0.1,
        optimizer=partial(SGD, lr=0.5, weight_decay=0.01),
        warmup=0.0,
    )
    run = trainer(limit_train_batches=1, limit_val_batches=1)
    run.fit(task, datamodule=digits())
    groups = {id(p): group for group in run.optimizers[0].param_groups for p in group["params"]}
    rates = {name: groups[id(p)]["initial_lr"] for name, p in task.model.named_parameters()}
    assert sum(len(group["params"]) for group in run.optimizers[0].param_groups) == len(rates)
    assert rates == {name: pytest.approx(0.05 if name.startswith(attends) else 0.5) for name in rates}
    assert {name.startswith(attends) for name in rates} == {True, False}
    assert any(name.startswith(f"{attends}localiser.trunk") for name in rates) == (isinstance(network, partial))
