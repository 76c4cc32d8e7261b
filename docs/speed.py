"""Fill in the tables of docs/speed.md, and its picture, from benchmarks/modules.jsonl: ``python docs/speed.py``.

``python -m benchmarks.modules --save benchmarks/modules.jsonl`` measures what is missing there.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.modules import LARGE, SIZES, draw, table, zoo  # noqa: E402

Rows = list[dict[str, Any]]


def measured() -> Rows:
    """Return the newest row of each module, counterpart and size, in the order of the zoo."""
    lines = (ROOT / "benchmarks" / "modules.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    newest = {(row["module"], row["counterpart"], tuple(row["size"]), row["compiled"]): row for row in rows}
    order = {name: number for number, name in enumerate(zoo())}
    return sorted(
        newest.values(), key=lambda row: (order[row["module"]], row["counterpart"], row["size"][1], -row["size"][0])
    )


def called(row: dict[str, Any]) -> str:
    size = "×".join(map(str, row["size"]))
    forward, both = (" / ".join(f"{ratio[0]:.2f}" for ratio in row[part]) for part in ("forward", "both"))
    return f"{row['module']} beside {row['counterpart']} at {size}, {forward} and {both}"


def under(rows: Rows) -> str:
    """Name what is slower than its counterpart, which is compiled where ours is."""
    low = [row for row in rows if row["counterpart"] and min(row["forward"][-1][0], row["both"][-1][0]) < 0.95]
    return "\n".join(f"- {called(row)}" for row in low) or "- none"


def missing(rows: Rows) -> str:
    """Say what has not been measured; by name where that is little. Batches that would not fit are smaller."""
    lines = []
    for batch, *rest in (*SIZES, LARGE):
        found = {row["module"] for row in rows if row["size"][1:] == rest and row["size"][0] in {batch, *range(8)}}
        absent = [name for name in zoo() if name not in found]
        names = f": {', '.join(absent)}" if len(absent) <= 20 else ""
        lines += [f"- at {'×'.join(map(str, (batch, *rest)))}, {len(absent)} of {len(zoo())}{names}"] if absent else []
    return "\n".join(lines) or "- nothing"


def tabled(keep: Callable[[dict[str, Any]], bool], compiled: bool = False) -> Callable[[Rows], str]:
    return lambda rows: "\n".join(table([row for row in rows if row["compiled"] == compiled and keep(row)], compiled))


PARTS: dict[str, Callable[[Rows], str]] = {
    "libraries": tabled(lambda row: row["counterpart"] not in ("", "its equation")),
    "equations": tabled(lambda row: row["counterpart"] == "its equation"),
    "alone": tabled(lambda row: not row["counterpart"]),
    "compiled": tabled(lambda row: bool(row["counterpart"]), compiled=True),
    "under": lambda rows: under([row for row in rows if not row["compiled"]]),
    "under compiled": lambda rows: under([row for row in rows if row["compiled"]]),
    "missing": lambda rows: missing([row for row in rows if not row["compiled"]]),
}


def filled(text: str, rows: Rows) -> str:
    """Return the page with its tables as they were measured."""
    mark = rf"(<!-- speed ({'|'.join(PARTS)}) -->\n).*?(?=<!-- end -->)"
    return re.sub(mark, lambda found: f"{found[1]}{PARTS[found[2]](rows)}\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    rows = measured()
    page = ROOT / "docs" / "speed.md"
    page.write_text(filled(page.read_text("utf-8"), rows), "utf-8")
    draw([row for row in rows if not row["compiled"]], page.with_suffix(".png"))
