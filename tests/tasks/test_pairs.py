import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.optim import SGD, AdamW

import visattn
from visattn.__main__ import main
from visattn.data.pairs import Pairs
from visattn.models import SiameseNetwork
from visattn.tasks import Verification
from visattn.tasks.command_line import known_tasks, run_cli

BUILT = {"input_size": (1, 12, 16), "width": 6}


def built(**options) -> Verification:
    task = Verification(**BUILT | options)
    task.configure_model()
    return task


@pytest.fixture
def pairs():
    """Makes the data: 50 images a split to train with, 30 to evaluate with, unless told otherwise."""

    def make(**options) -> Pairs:
        few = {"size": (12, 16), "batch_size": 8, "workers": 0, "train_per_class": 5, "val_per_class": 3}
        return Pairs("digits", **few | options)

    return make


@pytest.fixture
def finished(pairs, trainer, tmp_path):
    task, run = Verification(attention="ABCNN-3", width=6), trainer()
    run.checkpoint_callbacks[0].monitor = "val/accuracy"
    run.fit(task, datamodule=pairs())
    return task.eval(), run, tmp_path


def test_builds_the_network_for_the_images_of_the_data(finished):
    task, run, _ = finished
    assert isinstance(task.model, SiameseNetwork)
    assert task.model.arguments["size"] == (12, 16)
    assert task.model.arguments["attention"] == "ABCNN-3"
    assert {"train/loss", "val/loss", "val/accuracy"} <= run.callback_metrics.keys()


def test_the_loss_is_the_cross_entropy_of_yes_or_no():
    task, images, same = built(), torch.randn(4, 2, 1, 12, 16), torch.tensor([0.0, 1, 1, 0])
    p = task.model(images[:, 0], images[:, 1]).sigmoid()
    expected = -(same * p.log() + (1 - same) * (1 - p).log()).mean()
    torch.testing.assert_close(task.training_loss((images, same)), expected)


@pytest.mark.parametrize(("bias", "accuracy"), [(0.3, 0.75), (-0.3, 0.25)])
def test_a_logit_above_zero_is_a_yes(bias, accuracy):
    task, images, same = built(), torch.randn(4, 2, 1, 12, 16), torch.tensor([1.0, 1, 1, 0])
    with torch.no_grad():
        torch.nn.init.zeros_(task.model.head.weight)
        torch.nn.init.constant_(task.model.head.bias, bias)  # as a probability 0.3 would be a no
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value})
    task.test_step((images, same), 0)
    assert logged["test/accuracy"].compute() == accuracy
    expected = [torch.nn.functional.softplus(torch.tensor(x)) for x in (-bias, -bias, -bias, bias)]
    torch.testing.assert_close(logged["test/loss"], sum(expected) / 4)


def test_learns_to_tell_light_from_dark(trainer, tmp_path):
    for split, count in (("train", 40), ("val", 16)):
        for name, value in (("dark", 40), ("light", 200)):
            (tmp_path / f"x/{split}/{name}").mkdir(parents=True)
            for k in range(count):
                pattern = torch.randint(-30, 30, (8, 8), generator=torch.Generator().manual_seed(k)) + value
                Image.fromarray(pattern.byte().numpy()).save(tmp_path / f"x/{split}/{name}/{k}.png")
    data = Pairs(str(tmp_path / "x"), size=8, in_chans=1, augment=False, batch_size=8, workers=0)
    task = Verification(width=6, attention="ABCNN-2", optimizer=partial(AdamW, lr=0.03))
    run = trainer(max_epochs=6)
    run.checkpoint_callbacks[0].monitor = "val/accuracy"
    run.fit(task, datamodule=data)
    assert run.callback_metrics["val/accuracy"] > 0.9


def test_every_form_of_a_checkpoint_gives_the_same_network(finished):
    task, _, folder = finished
    x, y = torch.randn(2, 1, 12, 16), torch.randn(2, 1, 12, 16)
    again = Verification.load_from_checkpoint(folder / "checkpoints/last.ckpt", weights_only=True).eval()
    assert torch.equal(again(torch.stack((x, y), 1)), task.model(x, y))
    for path in ("checkpoints/last.ckpt", "model"):
        loaded = visattn.load(folder / path)
        assert not loaded.training
        assert torch.equal(loaded(x, y), task.model(x, y))
        assert loaded.labels == ["different", "same"]
        assert loaded.transform == task.preprocess
        assert loaded.task == "verification"
    card = (folder / "model/card.md").read_text()
    assert "# SiameseNetwork" in card
    assert "- Data: Pairs digits (50 train, 30 test, 30 val)" in card


def test_refuses_the_checkpoint_of_another_network(finished, pairs, trainer):
    with pytest.raises(ValueError, match=r"another network than this SiameseNetwork: model\.levels"):
        trainer().test(Verification(width=6), datamodule=pairs(), ckpt_path=finished[2] / "checkpoints/last.ckpt")


def test_what_compares_is_not_asked_to_classify(finished, capsys):
    folder = finished[2]
    Image.new("L", (16, 12)).save(folder / "one.png")
    assert main(["predict", str(folder / "model"), str(folder / "one.png")]) == 2
    assert re.search("checkpoint must be of a classifier, .*/model compares two images", capsys.readouterr().err)


def test_the_optimizer_has_no_decay_where_there_should_be_none(pairs, trainer):
    task = Verification(width=6, attention="ABCNN-1", optimizer=partial(SGD, lr=0.1, weight_decay=0.01))
    run = trainer()
    run.checkpoint_callbacks[0].monitor = "val/accuracy"
    run.fit(task, datamodule=pairs())
    decay = {id(p): g["weight_decay"] for g in run.optimizers[0].param_groups for p in g["params"]}
    assert {name: decay[id(p)] for name, p in task.model.named_parameters()} == {
        name: 0.0 if name.endswith("bias") else 0.01 for name, _ in task.model.named_parameters()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnt18"}, "backbone 'resnt18' is not known to timm; close: resnet18"),
        ({"pretrained": True}, "pretrained must be false without a backbone, got true"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Verification(**options)


def test_needs_to_know_how_large_images_are():
    with pytest.raises(ValueError, match="input_size must be given, since there is no data module that says it"):
        Verification().configure_model()


KNOWN = f"{', '.join(known_tasks())}, or the path of a class of that kind"
FEW = (
    "--config pairs_fashionmnist.yaml --data.root digits --data.download false --data.size 12 --data.train_per_class 5"
    " --data.val_per_class 4 --data.batch_size 8 --model.width 6 --trainer.max_epochs 1 --trainer.accelerator cpu"
    " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
)


def test_the_configuration_says_which_task_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(shlex.split(f"fit {FEW}"))
    run = Path("runs/pairs_fashionmnist/version_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == "Verification"
    assert visattn.load(run / "model").arguments["attention"] == "ABCNN-2"
    assert (run / "checkpoints/best.ckpt").is_file()
    run_cli(shlex.split(f"test {FEW} --ckpt_path best"))
    run_cli(shlex.split(f"predict {FEW} --ckpt_path best"))
    first = (run / "predictions.csv").read_text().splitlines()[1].split(",")
    assert {first[-4], first[-2]} == {"same", "different"}
    assert float(first[-3]) + float(first[-1]) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--task Verfication", f"task must be {KNOWN}, got 'Verfication'"),
        ("--task os.path", f"task must be {KNOWN}, got 'os.path'"),
        ("--model.attention ABCNN-4", "model.attention: must be .*ABCNN-3.*, got ABCNN-4"),
    ],
)
def test_an_error_is_one_line(more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_cli(shlex.split(f"fit {FEW} {more}"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(f"error: {message}", last), last
