"""What the README says, done."""

import re
import shlex
from pathlib import Path

import pytest
import timm

from visattn import attention
from visattn.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]


def parts(command: str) -> list[list[str]]:
    return [shlex.split(part) for part in command.split("&&")]


def test_the_first_two_commands_do_all_the_set_up():
    first, second = map(parts, COMMANDS[:2])
    assert first == [
        ["pip", "install", "-e", "."],
        ["python", "train.py", "fit", "--config", "configs/quickstart.yaml"],
    ]
    assert second == [["pip", "install", "-e", ".[dev]"], ["pytest", "-n", "2"]]


def test_every_command_is_one_we_know():
    assert {part[0] for command in COMMANDS for part in parts(command)} == {"pip", "python", "pytest", "visattn"}


def test_the_python_example_runs(tmp_path, monkeypatch):
    (example,) = [block for language, block in BLOCKS if language == "python"]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **kwargs: create(*args, **kwargs))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    assert {"layer3.2/NonLocal", "layer3.2.bn3/CBAM"} <= set(names["maps"])
    assert (tmp_path / "checkpoints" / "mine" / "card.md").is_file()
    assert not hasattr(names["model"], "visattn")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("visattn")])
def test_the_commands_of_the_shell_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [str(tmp_path) if a == "out/" else a for a in shlex.split(command)[1:]]
    assert main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py")])
def test_the_trainings_parse(command, tmp_path, monkeypatch, capsys):
    from visattn.commands.fit import run_cli

    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[2:]
    if "--ckpt_path" in arguments:  # there is no run yet that could have left one
        del arguments[arguments.index("--ckpt_path") :]
    with pytest.raises(SystemExit) as end:
        run_cli([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    assert "backbone:" in capsys.readouterr().out


def test_the_table_of_modules_is_that_of_the_code(capsys):
    assert main(["zoo", "--markdown"]) == 0
    written = README.partition("<!-- zoo -->\n")[2].partition("<!-- end -->")[0]
    assert written == capsys.readouterr().out


def test_there_are_as_many_modules_as_it_says():
    said = re.findall(r"[Mm]ore than (\d+)\s(?:attention )?modules", README)
    assert set(said) == {str((len(attention.__all__) - 2) // 10 * 10)}


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
