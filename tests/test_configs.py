"""Every configuration that ships fits the signatures, and says at its top what it does, on what, and how well."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from visattn.tasks.command_line import CommandLine, known_tasks

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ENGINES = sorted((ROOT / "configs/scale").glob("*.yaml"))


class Parsed(CommandLine):
    """Reads a configuration and makes nothing of it."""

    def instantiate_classes(self) -> None:
        self.trainer = self.model = self.datamodule = None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_parses(file):
    config = Parsed(["fit", "--config", str(file)]).config["fit"]
    assert config["task"] in known_tasks()
    assert config["data"].get("root") or config["data"].get("images")
    assert config["trainer"]["default_root_dir"].startswith("runs/")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_says_command_hardware_time_and_metric(file):
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert re.search(rf"python train.py fit --config configs/{file.name}", header)
    for what in ("Hardware", "Time", "Metric"):
        assert re.search(rf"^# {what}: \S", header, re.MULTILINE), what


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_training_in_the_header_parses(file):
    header = "".join(line[1:] for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    commands = re.findall(r"python train\.py (fit (?:[^\n]*\\\n)*[^\n]*)", header)
    assert commands
    for command in commands:
        assert Parsed(shlex.split(command.replace("\\\n", " "))).config["fit"]["trainer"]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda file: file.stem)
@pytest.mark.parametrize("stem", ["quickstart", "classify_imagenet", "recurrent_digits", "caption_quickstart"])
def test_an_engine_goes_on_top_of_any_task(engine, stem):
    below, above = yaml.safe_load((ROOT / f"configs/{stem}.yaml").read_text()), yaml.safe_load(engine.read_text())
    config = Parsed(["fit", "--config", str(ROOT / f"configs/{stem}.yaml"), "--config", str(engine)]).config["fit"]
    assert config["trainer"]["max_epochs"] == below["trainer"]["max_epochs"]
    for name, value in above["trainer"].items():
        if isinstance(value, dict):
            assert config["trainer"][name]["class_path"].endswith(value["class_path"])
            assert value["init_args"].items() <= config["trainer"][name]["init_args"].as_dict().items()
        elif not isinstance(value, list):
            assert config["trainer"][name] == value


@pytest.mark.parametrize("engine", ENGINES, ids=lambda file: file.stem)
def test_an_engine_says_its_command_and_where_it_was_tried(engine):
    header = "".join(line for line in engine.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert re.search(rf"train\.py fit --config configs/\S+ --config configs/scale/{engine.name}", header)
    assert re.search(r"^# Tried: \S", header, re.MULTILINE)


def test_there_are_some():
    assert {file.stem for file in ENGINES} == {"bf16", "ddp", "fsdp2", "slurm"}
    assert {file.stem for file in CONFIGS} >= {
        "quickstart",
        "classify_cifar10",
        "classify_folder",
        "classify_imagenet",
        "glance_folder",
        "pairs_fashionmnist",
    }
