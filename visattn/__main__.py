"""``visattn COMMAND …``: finds the command, hands it its arguments, and turns what goes wrong into one line."""

import ast
import importlib
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

TRAINING = {  # these go to Lightning's command line as they are
    "fit": "Train a model.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
}


def commands() -> dict[str, str]:
    """Return every command with its line of help, the first of its docstring; imports none of them."""
    files = (Path(__file__).parent / "commands").glob("[!_]*.py")
    docs = {file.stem: ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "" for file in files}
    return dict(sorted(({name: doc.partition("\n")[0] for name, doc in docs.items()} | TRAINING).items()))


def usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in commands().items()]
    return "\n".join(
        [
            "usage: visattn COMMAND …",
            "",
            "Attention modules for computer vision.",
            "",
            "commands:",
            *lines,
            "",
            "`visattn COMMAND --help` lists a command's options, `visattn --version` the version.",
            "VISATTN_TRACEBACK=1 in the environment shows where an error comes from.",
        ]
    )


def run(name: str, arguments: list[str]) -> int:
    """Import one command and run it."""
    if name in TRAINING:
        importlib.import_module("visattn.commands.fit").run_cli([name, *arguments])
        return 0
    command = importlib.import_module(f"visattn.commands.{name}")
    parser = ArgumentParser(prog=f"visattn {name}", description=commands()[name])
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from visattn import __version__

        print("visattn", __version__)
        return 0
    if name not in commands():
        close = get_close_matches(name, commands(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`visattn --help` lists the commands"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        code = run(name, rest)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone: `visattn zoo | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return 0
    except (ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get("VISATTN_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).split()) or repr(error), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
