import csv
import os
import subprocess
import sys
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn

import visattn
from visattn import drawing
from visattn.attention.sampling.grids import folded, jacobian
from visattn.data.canvas import Canvas
from visattn.data.pairs import Pairs
from visattn.models import RecurrentAttention
from visattn.models.network import Classifier
from visattn.tasks import Alignment, Classification, Gaze, Looking, Verification
from visattn.tasks.command_line import run_cli
from visattn.tasks.run import Log
from visattn.tasks.watch import CLASSES, _classes

ROOT = Path(__file__).parents[2]
SMALL = {"images": 20, "examples": 0}


class Turned(Classifier):
    """A spatial transformer, and as good as nothing behind it."""

    def __init__(self, num_classes=10, *, in_chans=1, size=(28, 28), **options):
        super().__init__()
        self.num_classes = num_classes
        self.transformer = visattn.AffineTransformer(in_chans, view=14, jitter=0.1, **options)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.LazyLinear(num_classes))
        self.classifier(torch.zeros(1, in_chans * self.transformer.heads, 4, 4))

    def forward(self, images):
        return self.classifier(self.transformer(images))


def task(**options):
    return Classification(network=partial(Turned, **options))


@pytest.fixture
def fit(digits, tmp_path):
    """Trains by a few batches an epoch, with nothing else that watches, and returns the trainer."""

    def run(watched, *callbacks, data=None, **options):
        few = {"limit_train_batches": 2, "limit_val_batches": 0, "default_root_dir": tmp_path, "max_epochs": 1}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        kept = {"callbacks": [*callbacks], "enable_checkpointing": False}
        trainer = pl.Trainer(**few | quiet | kept | options)
        trainer.fit(watched, datamodule=data or digits())
        return trainer

    return run


def warps(folder: Path, called: str = "warps") -> list[str]:
    return sorted(file.name for file in (folder / called).iterdir())


def frames(folder: Path, called: str = "warps") -> int:
    with Image.open(folder / called / "film.gif") as film:
        return film.n_frames


@pytest.fixture
def drawn(monkeypatch):
    """What is given to be drawn; the picture itself is a point, of a colour of its own."""
    calls = []

    def draw(*args, **options):
        calls.append((*args, options))
        point = Image.new("RGB", (8, 8), (20 * len(calls), 0, 0))
        return SimpleNamespace(savefig=point.save)

    monkeypatch.setattr(drawing, "draw_alignment", draw)
    return calls


def looker(**options):
    little = {"width": 16, "glimpse_width": 8, "location_width": 8, "glimpses": 3}
    return Looking(partial(RecurrentAttention, **little | options), draws=1)


@pytest.fixture
def gazed(monkeypatch):
    """What was summed up, when it is given to be drawn; the picture itself is a point, of a colour of its own."""
    calls = []

    def draw(fixations, *args, **options):
        calls.append((fixations, *args, options))
        point = Image.new("RGB", (8, 8), (20 * len(calls), 0, 0))
        return SimpleNamespace(savefig=point.save)

    monkeypatch.setattr(drawing, "draw_fixations", draw)
    return calls


# --- when -------------------------------------------------------------------------------------------------------------


def test_a_picture_after_every_epoch_and_a_film_of_them(fit, tmp_path):
    fit(task(), Alignment(images=20), max_epochs=2)
    assert warps(tmp_path) == ["film.gif", "step_0000002.png", "step_0000004.png"]
    assert frames(tmp_path) == 2
    pixels = np.asarray(Image.open(tmp_path / "warps/step_0000004.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 50


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_epochs": 2}, [4, 6]),
        ({"every_n_steps": 4}, [4, 6]),
        ({"every_n_steps": 1}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_steps": 100}, [6]),
    ],
)
def test_pictures_every_so_often_and_of_the_end(options, steps, fit, tmp_path, drawn):
    fit(task(), Alignment(**options, **SMALL), max_epochs=3)
    assert warps(tmp_path) == ["film.gif", *(f"step_{step:07d}.png" for step in steps)]
    assert frames(tmp_path) == len(steps)
    assert [call[-1]["title"].split("   ")[0] for call in drawn] == [f"step {step}" for step in steps]


def test_steps_that_gather_gradients_are_drawn_once(fit, drawn):
    trainer = fit(task(), Alignment(every_n_steps=1, **SMALL), accumulate_grad_batches=2, limit_train_batches=5)
    assert len(drawn) == trainer.global_step == 3


def test_a_resumed_run_goes_on_with_its_film(digits, trainer, tmp_path, drawn):
    trainer(Alignment(**SMALL), max_epochs=2).fit(task(), datamodule=digits())
    (tmp_path / "warps/step_0000001.png").write_bytes(b"of another run")
    (tmp_path / "warps/step_0000005.png").unlink()
    again = Alignment(**SMALL)
    checkpoint = tmp_path / "checkpoints/last.ckpt"
    trainer(again, max_epochs=4).fit(task(), datamodule=digits(), ckpt_path=checkpoint, weights_only=True)
    assert again.pictures == [f"step_{step:07d}.png" for step in (5, 10, 15, 20)]
    assert frames(tmp_path) == 3


def test_a_second_training_has_a_film_of_its_own(fit, tmp_path, drawn):
    watch = Alignment(**SMALL)
    for epochs in (3, 2):
        fit(task(), watch, max_epochs=epochs)
        assert frames(tmp_path) == epochs


def test_a_trial_run_leaves_nothing(fit, tmp_path, drawn):
    fit(task(), Alignment(), fast_dev_run=True)
    assert not drawn
    assert not (tmp_path / "warps").exists()


# --- what -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"output_size": (16, 20)}])
def test_draws_what_the_transformer_makes_of_images_of_each_class(options, digits, fit, drawn):
    watched, data = task(**options), digits()
    fit(watched, Alignment(images=30), data=data)
    inputs, outputs, grids, classes, _ = drawn[-1]
    samples = data.samples("val")
    split = {drawing.denormalise(samples[i].image, [0.5], [0.5]).tobytes(): i for i in range(len(samples))}
    numbers = [split[photo.tobytes()] for photo in inputs]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 30
    for label, members in classes.items():
        assert {data.labels[samples[numbers[i]].target] for i in members} == {label}
    assert sum(map(len, classes.values())) == 30
    assert list(classes) == sorted(classes)

    transformer = watched.model.transformer.eval()
    images = torch.stack([samples[i].image for i in numbers])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(grids), transformer.attend(images))
        wanted = transformer(images).unflatten(1, (grids.shape[1], -1)).flatten(0, 1)
    wanted = np.stack([drawing.denormalise(image, [0.5], [0.5]) for image in wanted])
    assert outputs.shape == (30, options.get("heads", 1), *options.get("output_size", (32, 32)), 3)
    assert np.abs(outputs.reshape(wanted.shape).astype(int) - wanted).max() <= 1


def test_a_transformer_of_feature_maps_is_shown_on_the_images(fit, drawn):
    make = partial(visattn.AffineTransformer, jitter=0.1)
    fit(Classification("test_resnet", attention=make, at="stages[0]"), Alignment(images=5))
    inputs, outputs, grids, _, _ = drawn[-1]
    assert grids.shape[2] < 32 == inputs.shape[1] == outputs.shape[2]
    for photo, given, grid in zip(inputs, outputs, grids, strict=True):
        assert np.array_equal(given[0], drawing.sampled(photo, grid[0]))


def test_of_several_transformers_the_first_that_images_go_through_is_watched(fit, drawn):
    make = partial(visattn.ThinPlateTransformer, jitter=0.1)
    watched = Classification(network=Turned, attention=make, at="input", gate=None)
    fit(watched, Alignment(**SMALL))
    (inserted,) = visattn.insertions(watched.model)
    modules = list(watched.model.modules())
    assert modules.index(inserted.attention) > modules.index(watched.model.transformer)
    assert np.abs(np.diff(drawn[-1][2], 2, axis=3)).max() > 0.01  # it bends


@pytest.mark.parametrize("options", [{"preset": "rotated"}, {"preset": "addition"}])
def test_watches_canvases(options, fit, drawn):
    fit(task(), Alignment(**SMALL), data=Canvas(**options, batch_size=16))
    inputs, outputs, _, classes, _ = drawn[-1]
    side = 42 if options["preset"] == "addition" else 28
    assert inputs.shape == (20, side, side, 3)
    assert outputs.shape == (20, 1, side, side, 3)
    assert sum(map(len, classes.values())) <= 20
    assert len(classes) <= CLASSES
    assert inputs.max() > 100


def test_what_else_is_known_of_canvases_is_left_out():
    data, watch = Canvas("rotated", described=True, batch_size=16), Alignment(images=20)
    watch.on_train_start(SimpleNamespace(datamodule=data, is_global_zero=True, fast_dev_run=False), None)
    assert [images.shape for images in watch.batches] == [(16, 1, 28, 28), (4, 1, 28, 28)]
    assert watch.targets.shape == (20,)


def test_watches_the_first_images_of_pairs(fit, drawn):
    class Compare(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = visattn.AffineTransformer(1, jitter=0.1)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, first, second):
            return self.scale * (self.transformer(first) - second).square().mean((1, 2, 3))

    class Compared(Verification):
        def configure_model(self):
            super().configure_model()
            if not isinstance(self.model, Compare):
                self.model = Compare()

    data = Pairs("digits", size=16, batch_size=16, workers=0, train_per_class=8, val_per_class=6)
    fit(Compared(width=4), Alignment(**SMALL), data=data)
    inputs, outputs, _, classes, _ = drawn[-1]
    assert inputs.shape == (20, 16, 16, 3)
    assert outputs.shape == (20, 1, 16, 16, 3)
    assert list(classes) == ["different", "same"]


def test_of_many_classes_those_with_most_images_and_of_many_labels_each():
    targets = torch.arange(20).repeat_interleave(torch.arange(20) % 5 + 1)
    found = _classes(targets, None)
    assert list(found) == [str(k) for k in (2, 3, 4, 7, 8, 9, 12, 13, 14, 17, 18, 19)]
    assert all((targets[numbers] == int(name)).all() for name, numbers in found.items())
    several = _classes(torch.tensor([[1.0, 0, 1], [1, 0, 0]]), ["sky", "cat", "sea"])
    assert several == {"sky": [0, 1], "sea": [0]}


# --- how --------------------------------------------------------------------------------------------------------------


class Fate(Callback):
    """Draws from the random numbers of the training and notes whether modules train."""

    def __init__(self):
        self.drawn, self.modes = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.drawn.append(float(torch.rand(()) + np.random.random()))  # noqa: NPY002
        self.modes.append([module.training for module in pl_module.modules()])


@pytest.mark.parametrize(("make", "watch"), [(task, partial(Alignment, every_n_steps=1, **SMALL)), (looker, Gaze)])
def test_the_training_is_what_it_would_be_without(make, watch, fit, drawn, gazed, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    states, fates = [], []
    for watches in ([], [watch()]):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        watched, fate = make(), Fate()
        fit(watched, *watches, fate, max_epochs=2, limit_val_batches=1)
        states.append(watched.model.state_dict())
        fates.append(fate)
    assert len(drawn or gazed) == (4 if watch is not Gaze else 2)
    assert fates[0].drawn == fates[1].drawn
    assert fates[0].modes == fates[1].modes
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_logs_the_share_folded_over_and_the_mean_determinant(fit, tmp_path, drawn):
    make = partial(visattn.ThinPlateTransformer, jitter=0.5)
    watched = Classification(network=Turned, attention=make, at="input", gate=None)
    log = Log(tmp_path, name="", version=0)
    fit(watched, Alignment(**SMALL), max_epochs=2, logger=log, log_every_n_steps=1)
    rows = list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))
    logged = [row for row in rows if row["warp/folded"]]
    assert [row["step"] for row in logged] == ["1", "3"]
    assert {row["step"] for row in rows if row["train/loss"]} >= {"1", "3"}
    for row, (_, _, grids, _, options) in zip(logged, drawn, strict=True):
        share, determinant = (float(of(torch.tensor(grids).flatten(0, 1)).mean()) for of in (folded, jacobian))
        assert 0 < share < 1
        assert (float(row["warp/folded"]), float(row["warp/determinant"])) == pytest.approx((share, determinant))
        assert options["title"].endswith(f"{100 * share:.3g}% folded over   determinant {determinant:.3g}")
    assert warps(tmp_path / "version_0") == ["film.gif", "step_0000002.png", "step_0000004.png"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_watches_in_any_precision(precision, fit, drawn):
    fit(task(), Alignment(**SMALL), precision=precision)
    assert (drawn[-1][1].dtype, drawn[-1][2].dtype) == (np.uint8, np.float32)


@pytest.mark.slow
def test_a_compiled_network_is_watched_and_compiled_no_more_often(fit, drawn, monkeypatch, unchecked):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    counts = []
    for watches in ([], [Alignment(**SMALL)]):
        torch._dynamo.reset()
        graphs.clear()
        fit(Classification(network=Turned, compile=True), *watches, max_epochs=2)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 2, "every_n_steps": 3}, "every_n_epochs must be left out where every_n_steps .*, got 2, 3"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"every_n_steps": -1}, "every_n_steps must be at least 1, got -1"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"examples": -1}, "examples must not be negative, got -1"),
        ({"seconds": 0.0}, r"seconds must be positive, got 0\.0"),
    ],
)
def test_refuses_a_value_out_of_its_range(options, message):
    with pytest.raises(ValueError, match=message):
        Alignment(**options)


def test_refuses_what_it_cannot_watch(fit):
    with pytest.raises(ValueError, match="watches a spatial transformer, and the model, ResNet, has none"):
        fit(Classification("test_resnet"), Alignment())
    sharded = SimpleNamespace(strategy=SimpleNamespace())
    with pytest.raises(ValueError, match="strategy must be ddp or of one device for Alignment, got SimpleNamespace"):
        Alignment().on_fit_start(sharded, visattn.AffineTransformer(1))
    alone = SimpleNamespace(datamodule=None, val_dataloaders=None, is_global_zero=True, fast_dev_run=False)
    with pytest.raises(ValueError, match="images of the validation data, and there are none"):
        Alignment().on_train_start(alone, visattn.AffineTransformer(1))


def test_watches_plain_loaders(digits, trainer, drawn):
    data = digits()
    trainer(Alignment(**SMALL)).fit(task(), data.train_dataloader(), data.val_dataloader())
    assert len(drawn) == 1
    assert drawn[0][0].shape == (20, 32, 32, 3)


# --- where each class is looked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "steps"), [({}, [2, 4, 6]), ({"every_n_epochs": 2}, [4])])
def test_gazes_of_validations_every_so_often_and_a_film_of_them(options, steps, fit, tmp_path, gazed):
    fit(looker(), Gaze(**options), max_epochs=3, limit_val_batches=1)
    assert warps(tmp_path, "gaze") == ["film.gif", *(f"step_{step:07d}.png" for step in steps)]
    assert frames(tmp_path, "gaze") == len(steps)
    assert [call[-1]["title"] for call in gazed] == [f"step {step}" for step in steps]
    assert [float(call[0].shown.sum()) for call in gazed] == [16] * len(steps)


def test_a_gaze_is_drawn_of_real_figures(fit, tmp_path):
    fit(looker(), Gaze(), limit_val_batches=1)
    pixels = np.asarray(Image.open(tmp_path / "gaze/step_0000002.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 50


@pytest.mark.parametrize("halting", [False, True])
def test_a_gaze_counts_all_glimpses_of_all_images_where_the_network_looked(halting, digits, fit, gazed):
    watched, data = looker(halting=halting), digits()
    trainer = fit(watched, Gaze(), data=data, limit_val_batches=None)
    sums, labels, options = gazed[-1]
    assert labels == data.labels
    assert (options["mean"], options["std"]) == ((0.5,), (0.5,))
    model, wanted = watched.model.eval(), drawing.Fixations(10, 3, (1, 32, 32))
    watched.trainer = trainer
    for number, batch in enumerate(data.val_dataloader()):
        with torch.no_grad(), watched.repeatable(number):
            rollout = model.rollout(batch[0], policy="mean")
        corners = model.sensor.corners(rollout.locations.flatten(0, 1), (32, 32))[:, 0].unflatten(0, (-1, 3))
        wanted.add(batch[0], corners, batch[1], rollout.glimpses)
    assert wanted.shown.sum() == 40
    for found, part in zip(sums.sums, wanted.sums, strict=True):
        torch.testing.assert_close(found, part)


def test_gazes_of_a_test_and_of_a_validation_alone(digits, fit, tmp_path, gazed):
    watched, data, watch = looker(), digits(), Gaze(every_n_epochs=100)
    trainer = fit(watched, watch, data=data, limit_val_batches=None)
    assert not gazed
    trainer.validate(watched, datamodule=data, verbose=False)
    trainer.test(watched, data.val_dataloader(), verbose=False)
    assert warps(tmp_path, "gaze") == ["test.png", "val.png"]
    assert [call[-1]["title"] for call in gazed] == ["40 images"] * 2


def test_of_canvases_what_else_is_known_is_left_out(fit, gazed):
    data = Canvas("translated", described=True, batch_size=16)
    fit(looker(patch=12, scales=2), Gaze(), data=data, limit_val_batches=1)
    assert gazed[0][0].maps.shape == (10, 3, 60, 60)
    assert gazed[0][0].images.sum() > 0


def test_what_several_processes_saw_is_added_up(fit, gazed, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", lambda self, tensor, *_, reduce_op: 2 * tensor)
    fit(looker(), Gaze(), limit_val_batches=1)
    assert gazed[0][0].shown.sum() == 2 * 16
    assert gazed[0][0].counts.sum() == 2 * 16 * 3
    assert float(gazed[0][0].maps.sum()) == pytest.approx(2 * 16 * 3, rel=1e-5)


def test_a_trial_run_leaves_no_gaze(fit, tmp_path, gazed):
    fit(looker(), Gaze(), fast_dev_run=True)
    assert not gazed
    assert not (tmp_path / "gaze").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_gazes_in_any_precision(precision, fit, gazed):
    fit(looker(), Gaze(), precision=precision, limit_val_batches=1)
    assert gazed[0][0].maps.dtype == torch.float32
    assert float(gazed[0][0].maps.sum()) == pytest.approx(3 * 16, rel=1e-4)


def test_refuses_what_does_not_look(fit):
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        Gaze(0)
    with pytest.raises(ValueError, match=r"seconds must be positive, got -1\.0"):
        Gaze(seconds=-1.0)
    with pytest.raises(ValueError, match="Gaze watches a network that looks at one place after another, got ResNet"):
        fit(Classification("test_resnet"), Gaze())
    sharded = SimpleNamespace(strategy=SimpleNamespace())
    with pytest.raises(ValueError, match="strategy must be ddp or of one device for Gaze, got SimpleNamespace"):
        Gaze().on_fit_start(sharded, RecurrentAttention(2))


# --- by configuration -------------------------------------------------------------------------------------------------


def config(folder: Path) -> str:
    watch = {"class_path": "visattn.tasks.Alignment", "init_args": {"every_n_steps": 2, "images": 20}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    held = {
        "datamodule": "Canvas",
        "model": {
            "network": {"class_path": "DigitClassifier", "init_args": {"filters": [4, 4]}},
            "attention": {"class_path": "AffineTransformer", "init_args": {"view": 14}},
            "gate": None,
        },
        "data": {"preset": "rotated", "batch_size": 64},
        "trainer": {"max_epochs": -1, "max_steps": 4, "default_root_dir": "runs", "callbacks": [watch], **quiet},
    }
    (folder / "watch.yaml").write_text(yaml.safe_dump(held))
    return str(folder / "watch.yaml")


def test_a_configuration_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(["fit", "--config", config(tmp_path)])
    run = tmp_path / "runs/version_0"
    assert warps(run) == ["film.gif", "step_0000002.png", "step_0000004.png"]
    kept = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"][0]
    assert kept["init_args"]["every_n_steps"] == 2


def by_two(folder: Path, *arguments: str) -> None:
    """Train by two processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, str(ROOT / "train.py"), "fit", *arguments, *two]
    said = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.slow
def test_of_two_processes_one_draws(tmp_path):
    by_two(tmp_path, "--config", config(tmp_path))
    run = tmp_path / "runs/version_0"
    assert warps(run) == ["film.gif", "step_0000002.png", "step_0000004.png"]
    assert frames(run) == 2
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["warp/folded"]] == ["1", "3"]


@pytest.mark.slow
def test_a_configuration_asks_for_a_gaze(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(["fit", *gaze(tmp_path)])
    assert warps(tmp_path / "runs/version_0", "gaze") == ["film.gif", "step_0000002.png"]


def gaze(folder: Path) -> list[str]:
    held = {
        "task": "Looking",
        "model": {"network": "RecurrentAttention"},
        "datamodule": "Canvas",
        "data": {"preset": "plain", "batch_size": 64},
        "trainer": {
            "max_epochs": 1,
            "limit_train_batches": 2,
            "limit_val_batches": 1,
            "default_root_dir": "runs",
            "callbacks": [{"class_path": "visattn.tasks.Gaze", "init_args": {"every_n_epochs": 1}}],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
    }
    (folder / "gaze.yaml").write_text(yaml.safe_dump(held))
    return ["--config", str(folder / "gaze.yaml")]


@pytest.mark.slow
def test_a_gaze_is_of_the_images_of_both_processes(tmp_path):
    by_two(tmp_path, *gaze(tmp_path))
    assert warps(tmp_path / "runs/version_0", "gaze") == ["film.gif", "step_0000002.png"]
