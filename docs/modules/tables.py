"""Fill in the tables that the code gives, in README.md and docs/modules: ``python docs/modules/tables.py``.

Between ``<!-- zoo -->`` or ``<!-- zoo channel -->`` and ``<!-- end -->`` stands what ``visattn zoo --markdown`` prints
of all families or of one; between ``<!-- growth NonLocal; NonLocal subsample="pre" -->`` and the same end, what modules
with these options cost on maps of several sizes.
"""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import visattn
from visattn.__main__ import main
from visattn.commands.zoo import cost, markdown

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(Path(__file__).parent.glob("*.md"))]
SIDES = (14, 28, 56)


def filled(text: str) -> str:
    """Return a page with its tables as the code has them now."""
    return re.sub(r"(<!-- (zoo|growth) ?(.*?) ?-->\n).*?(?=<!-- end -->)", table, text, flags=re.DOTALL)


def table(mark: re.Match[str]) -> str:
    head, kind, rest = mark.groups()
    return head + (zoo(rest) if kind == "zoo" else growth(rest))


def zoo(family: str) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        main(["zoo", "--markdown", *(["--family", family] if family else [])])
    return printed.getvalue()


def growth(modules: str) -> str:
    rows = []
    for each in modules.split("; "):
        name, _, options = each.partition(" ")
        made = getattr(visattn, name)(256, **eval(f"dict({options})"))
        rows.append({"module": f"{name}, `{options}`" if options else name})
        rows[-1] |= {f"256×{side}×{side}": cost(made, (256, side, side)) for side in SIDES}
    return markdown(rows) + "\n"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
