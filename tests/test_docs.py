"""What the pages of docs/ say, compared with the code and done."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.attention import Attention
from visattn.attention.memory.core import MemoryAttention
from visattn.commands.zoo import NAMES, describe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "modules").glob("*.md"))
FAMILIES = {page.stem: page.read_text("utf-8") for page in PAGES if page.stem != "README"}
INDEX = (ROOT / "docs" / "modules" / "README.md").read_text("utf-8")
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in (*PAGES, *(ROOT / "docs" / f"{name}.md" for name in ("captioning", "explaining", "looking")))
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    )
]

every_family = pytest.mark.parametrize("family", FAMILIES)


def script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables():
    """The script that fills the tables in."""
    return script(ROOT / "docs" / "modules" / "tables.py")


@pytest.fixture(scope="module")
def zoo():
    return [describe(getattr(visattn, name)) for name in NAMES]


def section(page: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def cells(text: str) -> list[list[str]]:
    """The rows of all tables in a text, without their heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rules = [number for number, row in enumerate(rows) if set("".join(row)) <= set("-:|")]
    return [row for number, row in enumerate(rows) if number not in rules and number + 1 not in rules]


def classes(cell: str) -> list[str]:
    return [word for word in re.findall(r"\w+", cell) if word in visattn.attention.__all__]


def options(text: str) -> list[tuple[bool, str, object]]:
    """The options a text names, and whether as the default, which stands in bold."""
    found = re.findall(r"(\**)`(\w+)=([^`]+)`", text)
    return [(bold == "**", name, eval(value)) for bold, name, value in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_are_those_of_the_code(page, tables):
    text = page.read_text("utf-8")
    assert text == tables.filled(text), "python docs/modules/tables.py fills them in"


def test_the_page_on_speed_holds_what_was_measured():
    speed, text = script(ROOT / "docs" / "speed.py"), (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert text == speed.filled(text, speed.measured()), "python docs/speed.py fills it in"


def test_every_family_has_its_page_and_every_module_a_place_there(zoo):
    assert {row["family"] for row in zoo} == set(FAMILIES)
    for row in zoo:
        page = FAMILIES[row["family"]]
        assert f"<!-- zoo {row['family']} -->" in page
        named = [name for cell, *_ in cells(section(page, "When to use which")) for name in classes(cell)]
        assert row["module"] in named, f"{row['module']} has no line on when to use it"


def test_the_index_names_what_stands_alone(zoo):
    for word, name, value in (("Locations", "weighs", "locations"), ("Hard", "choice", "hard")):
        (named,) = re.findall(rf"{word}: (.*?)\.$", INDEX, re.MULTILINE)
        assert classes(named) == [row["module"] for row in zoo if row[name] == value]


def test_the_kernel_page_names_the_one_that_is_asked(zoo):
    only = [row["module"] for row in zoo if row["family"] == "kernel" and row["asked"] == "by a query"]
    lines = [row[0] for row in cells(FAMILIES["kernel"]) if "the only one here that is asked by a query" in row[-1]]
    assert lines == only


@every_family
def test_a_published_gain_names_its_setting_and_its_source(family):
    for row in cells(section(FAMILIES[family], "Gain as published")):
        module, _, gained, setting, source = row
        assert classes(module), row
        assert re.search(r"\d", gained), row
        assert setting, row
        assert source == "the same" or "](https://" in source or source.startswith("model zoo of"), row


@every_family
def test_every_option_named_where_paper_and_code_differ_exists_and_the_default_is_bold(family):
    rows = cells(section(FAMILIES[family], "Paper and released code"))
    assert rows
    for row in rows:
        names = classes(row[0])
        assert len(row) == 5, row
        assert names, row
        assert any(row[2:]), row
        for name in names:
            cls = getattr(visattn, name)
            for default, option, value in options(" ".join(row[2:])):
                assert (inspect.signature(cls).parameters[option].default == value) == default, (name, option, value)
                assert make(cls, **{option: value}).arguments[option] == value


@every_family
def test_every_option_advised_exists(family):
    for row in cells(section(FAMILIES[family], "When to use which")):
        for name in classes(row[0]):
            for _, option, value in options(" ".join(row)):
                assert make(getattr(visattn, name), **{option: value}).arguments[option] == value


def make(cls: type[Attention], **options: object) -> Attention:
    size = {"size": (14, 14)} if "size" in inspect.signature(cls).parameters else {}
    channels = 288 if options.get("heads") == 9 else 256
    if issubclass(cls, MemoryAttention):
        return cls(channels, channels, **options)
    return cls(channels, **{"stages": (64,)} if options.get("query") == "recurrent" else size, **options)


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_examples_run(code, tmp_path, monkeypatch, capsys):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **kwargs: create(*args, **kwargs))
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_kernel_page_knows_the_convolution_that_is_replaced():
    convolution = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        convolution(torch.randn(1, 256, 14, 14))
    said = f"has {convolution.weight.numel():,} parameters and {counter.get_total_flops() // 2:,} multiply-adds"
    assert said in FAMILIES["kernel"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    here = [link.partition("#") for link in links if not link.startswith("http")]
    assert not [link for link, _, _ in here if not (page.parent / link).exists()]
    anchors = [(page.parent / link if link else page, anchor) for link, _, anchor in here if anchor]
    for target, anchor in anchors:
        titles = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_page_is_linked_from_the_index():
    assert not [name for name in FAMILIES if f"({name}.md)" not in INDEX]
