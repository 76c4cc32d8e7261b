import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.optim import Adam

import visattn
from visattn.data.canvas import Canvas
from visattn.models import DRAW, DifferentiableGlimpseClassifier, RecurrentAttention
from visattn.tasks import Classification, Generation, Looking, Sketches
from visattn.tasks.command_line import run_cli
from visattn.tasks.generation import scattered

SMALL = partial(DRAW, steps=2, width=8, latent=3)


def built(**options) -> Generation:
    task = Generation(**{"network": partial(SMALL, size=(6, 7), write=3)} | options)
    task.configure_model()
    return task


@pytest.fixture
def fit(digits, trainer):
    """Trains for a few batches of small digits, and returns the trainer."""

    def run(task, *callbacks, data=None, monitor="val/bound", **options):
        found = trainer(*callbacks, **{"limit_val_batches": 2} | options)
        found.checkpoint_callbacks[0].monitor = monitor
        found.fit(task, datamodule=data or digits(size=(12, 10), augment=False))
        return found

    return run


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_what_it_takes_to_tell_an_image():
    task, x = built(binarisation="threshold"), torch.rand(3, 1, 6, 7)
    logged = {}
    task.log_dict = logged.update
    torch.manual_seed(0)
    loss = task.training_loss([x])
    torch.manual_seed(0)
    drawing = task.model((x > 0.5).float())
    p = drawing.canvas.sigmoid()
    likelihood = sum(
        (p[b, 0, i, j] if x[b, 0, i, j] > 0.5 else 1 - p[b, 0, i, j]).log().item()
        for b in range(3)
        for i in range(6)
        for j in range(7)
    )
    assert logged["train/reconstruction"].item() == pytest.approx(-likelihood / 3, rel=1e-4)
    assert logged["train/kl"].item() == pytest.approx(drawing.divergences.sum().item() / 3, rel=1e-4)
    torch.testing.assert_close(loss, logged["train/reconstruction"] + logged["train/kl"])


def test_pixels_are_on_by_chance_that_evaluation_does_not_draw_anew():
    x = torch.rand(400, 1, 6, 7)
    static, dynamic = built(binarisation="static"), built()
    for task in (static, dynamic):
        on = task.binarised(x)
        assert set(on.unique().tolist()) == {0, 1}
        near = torch.stack([on[(x > low) & (x < low + 0.1)].mean() for low in torch.arange(0, 1, 0.1)])
        torch.testing.assert_close(near, torch.arange(0.05, 1, 0.1), rtol=0, atol=0.06)
    assert torch.equal(static.binarised(x), static.binarised(x))
    assert not torch.equal(dynamic.binarised(x), dynamic.binarised(x))
    fixed = static.binarised(x)
    assert torch.equal(static.eval().binarised(x), fixed)
    assert torch.equal(dynamic.eval().binarised(x), fixed)
    assert torch.equal(dynamic.binarised(x[7:9]), fixed[7:9])  # whatever is in the batch beside them
    threshold = built(binarisation="threshold")
    assert torch.equal(threshold.binarised(x), (x > 0.5).float())
    assert torch.equal(threshold.eval().binarised(x), (x > 0.5).float())


def test_black_stays_off_and_white_on():
    ends = torch.cat((torch.zeros(50, 1, 28, 28), torch.ones(50, 1, 28, 28)))
    for kind in ("dynamic", "static"):
        assert torch.equal(built(binarisation=kind).binarised(ends), ends)


def test_scattered_numbers_are_those_of_their_image_and_place():
    images = torch.rand(300, 1, 9, 8)
    numbers = scattered(images)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert len(numbers.unique()) > 0.99 * numbers.numel()
    assert torch.corrcoef(numbers[:40].flatten(1)).triu(1).abs().max() < 0.5
    changed = images.clone()
    changed[3, 0, 4, 4] = 1 - changed[3, 0, 4, 4].round()
    same = (scattered(changed) == numbers).flatten(1).all(1)
    assert same.tolist() == [number != 3 for number in range(300)]


def test_takes_back_how_images_were_normalised(fit, digits):
    task, data = (
        Generation(SMALL, binarisation="threshold"),
        digits(size=(12, 10), augment=False, mean=[0.3], std=[0.2]),
    )
    fit(task, data=data)
    plain = digits(size=(12, 10), augment=False, mean=[0.0], std=[1.0])
    plain.setup()
    images, expected = (next(iter(each.val_dataloader()))[0] for each in (data, plain))
    assert images.min() < -1
    torch.testing.assert_close(task.pixels(images), expected, rtol=0, atol=1e-6)
    assert (task.preprocess.mean, task.preprocess.std) == ((0.0,), (1.0,))


# --- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_few_steps_lower_the_bound(fit):
    task, seen = Generation(partial(DRAW, steps=3, width=32, latent=8), optimizer=partial(Adam, lr=0.01)), []
    task.on_validation_epoch_end = lambda: seen.append(task.trainer.callback_metrics["val/nats"].item())
    run = fit(task, max_epochs=6)
    untrained, *_, last = seen
    assert last < 0.8 * untrained
    logged = run.callback_metrics
    assert logged["val/bound"] == -logged["val/nats"]
    torch.testing.assert_close(logged["val/nats"], logged["val/kl"] + logged["val/reconstruction"])
    assert {"train/loss", "train/kl", "train/reconstruction"} <= logged.keys()
    best = run.checkpoint_callbacks[0]
    assert best.best_model_score == pytest.approx(-min(seen[1:]))


def test_evaluation_is_the_same_every_time(fit, digits):
    task = Generation(SMALL)
    run = fit(task)
    found = [run.test(task, datamodule=digits(size=(12, 10)), verbose=False)[0] for _ in range(2)]
    assert found[0] == found[1]
    assert set(found[0]) == {"test/nats", "test/bound", "test/kl", "test/reconstruction"}


def test_every_form_of_a_checkpoint_gives_the_same_network(fit, tmp_path):
    task = Generation(SMALL, binarisation="static")
    fit(task)
    assert task.model.arguments["size"] == (12, 10)
    again = Generation.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert again.hparams["binarisation"] == "static"
    networks = [task.model, again.model]
    for path in ("checkpoints/last.ckpt", "model"):
        networks.append(visattn.load(tmp_path / path))
        assert type(networks[-1]) is DRAW
        assert networks[-1].task == "generation"
        assert networks[-1].transform.input_size == (1, 12, 10)
    drawn = []
    for network in networks:
        torch.manual_seed(0)
        drawn.append(network.generate(2).canvas)
    assert all(torch.equal(drawn[0], each) for each in drawn[1:])
    assert "- Data: Images digits (80 train, 40 val)" in (tmp_path / "model/card.md").read_text()


def test_digits_in_channels_of_their_own(fit):
    task = Generation(SMALL)
    fit(task, data=Canvas("addition", batch_size=8), limit_train_batches=2, limit_val_batches=1)
    assert task.model.shape == (2, 42, 42)
    assert task.preprocess is None


def test_options_of_the_network_go_before_the_data(fit):
    task = Generation(partial(SMALL, size=(9, 9)))
    with pytest.raises(ValueError, match=r"images must be of \(1, 9, 9\), got \(1, 12, 10\)"):
        fit(task)


def test_its_window_is_trained_to_classify(fit, digits):
    few = partial(DifferentiableGlimpseClassifier, glimpses=2, patch=4, width=8)
    for task in (Classification(network=few), Looking(few)):
        run = fit(task, monitor="val/top1", limit_train_batches=3)
        assert task.model.arguments["size"] == (12, 10)
        assert run.callback_metrics["train/loss"].isfinite()
        assert "test/top1" in run.test(task, datamodule=digits(size=(12, 10), augment=False), verbose=False)[0]


# --- the command line -------------------------------------------------------------------------------------------------

FEW = (
    "--config draw_mnist.yaml --data.root digits --data.download false --data.batch_size 8 --model.network.width 8"
    " --model.network.steps 2 --trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1"
    " --trainer.limit_test_batches 1 --trainer.accelerator cpu --trainer.enable_progress_bar false"
    " --trainer.enable_model_summary false"
)


def test_draws_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISATTN_TRACEBACK", raising=False)
    run_cli(shlex.split(f"fit {FEW}"))
    run = Path("runs/draw_mnist/version_0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["task"], config["datamodule"]) == ("Generation", "Canvas")
    assert config["checkpoint"]["monitor"] == "val/bound"
    network = visattn.load(run / "model")
    assert {"size": (28, 28), "steps": 2, "width": 8}.items() <= network.arguments.items()
    assert (run / "checkpoints/best.ckpt").is_file()
    assert (run / "drawings/film.gif").is_file()
    run_cli(shlex.split(f"test {FEW} --ckpt_path best"))
    with pytest.raises(SystemExit):
        run_cli(shlex.split(f"predict {FEW} --ckpt_path best"))
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: predict needs a network that says what images show, and this one draws: see its generate"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": RecurrentAttention}, "network must be one that draws, such as DRAW, got <class"),
        ({"binarisation": "random"}, "binarisation must be one of dynamic, static, threshold, got 'random'"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_options_that_cannot_be(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Generation(**options)


# --- sketches ---------------------------------------------------------------------------------------------------------


def test_sketches_show_what_is_drawn_and_change_nothing(fit, tmp_path):
    weights = []
    for callbacks in ([Sketches(2, images=2, columns=2, samples=5)], []):
        torch.manual_seed(0)
        task = Generation(SMALL)
        fit(task, *callbacks, max_epochs=4, limit_train_batches=2)
        weights.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
    assert torch.equal(*weights)
    folder = tmp_path / "drawings"
    assert sorted(file.name for file in folder.iterdir()) == [
        "film.gif",
        "samples.png",
        "step_0000004.png",
        "step_0000008.png",
    ]
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == 3  # two steps, and what they led to


@pytest.mark.parametrize("name", ["every_n_epochs", "images", "columns", "samples"])
def test_sketches_are_of_something(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Sketches(**{name: 0})


def test_sketches_are_of_a_network_that_draws(fit):
    task = Looking(partial(RecurrentAttention, width=4, glimpses=2))
    with pytest.raises(ValueError, match="Sketches shows what DRAW draws, and the model is RecurrentAttention"):
        fit(task, Sketches(), monitor="val/top1")
