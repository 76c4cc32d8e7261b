"""One file per command of ``visattn``: ``add_arguments`` and ``run``; the docstring's first line is its help."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(rows: Sequence[Mapping[str, Any]], *, title: str, caption: str | None = None) -> None:
    """Print rows of one set of columns as a table; numbers stand to the right."""
    table = Table(title=Text(title), caption=None if caption is None else Text(caption))  # brackets are no markup
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)


def cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
