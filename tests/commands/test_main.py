import subprocess
import sys
from pathlib import Path

import pytest

import visattn
from visattn.__main__ import commands, main


@pytest.fixture
def command(monkeypatch):
    """Makes a command ``sites`` that does what it is told."""
    import visattn.commands.sites as module

    def make(run):
        monkeypatch.setattr(module, "add_arguments", lambda parser: parser.add_argument("--number", type=int))
        monkeypatch.setattr(module, "run", run)

    monkeypatch.delenv("VISATTN_TRACEBACK", raising=False)
    return make


def fails(error: BaseException):
    def run(args):
        raise error

    return run


def test_help_lists_every_command_with_its_line(capsys):
    assert main(["--help"]) == main(["-h"]) == main([]) == 0
    printed = capsys.readouterr().out
    files = {file.stem for file in (Path(visattn.__file__).parent / "commands").glob("*.py")} - {"__init__"}
    assert files | {"fit", "validate", "test"} == set(commands())
    for name, line in commands().items():
        assert line.endswith(".")
        assert any(shown.split() == [name, *line.split()] for shown in printed.splitlines())


def test_help_imports_no_command():
    code = (
        "import sys; from visattn.__main__ import main; main(['--help']); sys.exit('visattn.commands' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"visattn {visattn.__version__}\n"


def test_an_unknown_command_names_the_closest(capsys):
    assert main(["sits"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'sits'; did you mean 'sites'?\n"
    assert main(["qqq"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'qqq'; `visattn --help` lists the commands\n"


def test_a_command_gets_its_arguments_and_gives_the_exit_code(command):
    command(lambda args: args.number)
    assert main(["sites", "--number", "5"]) == 5


def test_a_command_that_is_not_told_is_told_by_the_command_line(command, monkeypatch):
    command(lambda args: args.number)
    monkeypatch.setattr(sys, "argv", ["visattn", "sites", "--number", "7"])
    assert main() == 7


@pytest.mark.parametrize("name", ["fit", "validate", "test"])
def test_training_gets_its_arguments_as_they_are(name, monkeypatch):
    given = []
    module = type(sys)("visattn.commands.fit")
    module.run_cli = given.append
    monkeypatch.setitem(sys.modules, "visattn.commands.fit", module)
    assert main([name, "--config", "a.yaml", "--help"]) == 0
    assert given == [[name, "--config", "a.yaml", "--help"]]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("size must be even,\n  got 3"), "error: size must be even, got 3\n"),
        (FileNotFoundError(2, "No such file", "a.jpg"), "error: [Errno 2] No such file: 'a.jpg'\n"),
        (RuntimeError(), "error: RuntimeError()\n"),
    ],
)
def test_an_error_is_one_line(command, capsys, error, line):
    command(fails(error))
    assert main(["sites"]) == 2
    assert capsys.readouterr().err == line


def test_an_error_has_its_traceback_where_asked(command, monkeypatch):
    monkeypatch.setenv("VISATTN_TRACEBACK", "1")
    command(fails(ValueError("size must be even")))
    with pytest.raises(ValueError, match="size must be even"):
        main(["sites"])


def test_a_mistake_of_ours_keeps_its_traceback(command):
    command(fails(AttributeError("no attribute")))
    with pytest.raises(AttributeError, match="no attribute"):
        main(["sites"])


def test_an_interrupt_is_no_error(command, capsys):
    command(fails(KeyboardInterrupt()))
    assert main(["sites"]) == 130
    assert capsys.readouterr().err == ""


def test_runs_as_a_module_and_leaves_quietly_when_the_reader_goes():
    command = [sys.executable, "-m", "visattn", "zoo", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
