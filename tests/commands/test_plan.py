import json
from pathlib import Path

import pytest

from visattn.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["--set", "model.backbone=test_resnet", "--set", "model.backbone_args=null", "--set", "data.size=32"]


def test_prints_what_a_training_takes(capsys):
    arguments = ["plan", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / "scale/fsdp2.yaml"), "--gpus", "8"]
    noise = ["--set", "data.root=nowhere/", "--images", "5000", "--classes", "7"]
    assert main([*arguments, "--measure", "4", "--memory", "0.5", "--json", *TINY, *noise]) == 0
    found = json.loads(capsys.readouterr().out)
    ddp, fsdp = found["ddp"], found["fsdp"]
    assert (found["batch"], found["images"]) == (64, 5000)
    assert found["measured"]["batch"] == 4
    for each in (ddp, fsdp):
        parts = ("weights", "gradients", "optimizer", "averaged weights", "activations")
        assert each["sum"] == sum(each[name] for name in parts)
    assert fsdp["optimizer"] == ddp["optimizer"] // 8
    assert ddp["largest"] > 0
    assert ddp["epoch"] == pytest.approx(found["measured"]["seconds"] / 4 * found["images"] / 8)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["quickstart", "recurrent_digits", "caption_quickstart"])
def test_plans_every_kind_of_task(config, capsys):
    assert main(["plan", f"{config}.yaml", "--gpus", "64", "--memory", "40"]) == 0
    said = capsys.readouterr().out
    assert "multiply-adds an image" in said
    assert "on each of 64 GPUs" in said
    assert "largest batch in 40 GiB" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "0"], "gpus must be positive, got 0"),
        (["--memory", "-1"], "memory must be positive, got -1.0"),
        (["--measure", "5"], "batch must be even and at least 2, got 5"),
    ],
)
def test_says_what_is_wrong(more, message, capsys):
    assert main(["plan", "quickstart.yaml", *more]) == 2
    assert f"error: {message}" in capsys.readouterr().err
