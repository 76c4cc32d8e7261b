"""The floors of the house: imports only run down, and what should stay light does."""

import ast
import importlib
import json
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from visattn.attention import Attention
from visattn.attention import __all__ as zoo

ROOT = Path(__file__).parents[1] / "visattn"
FLOORS = {
    "version": 0,
    "attention": 1,
    "metrics": 1,
    "data": 1,
    "drawing": 2,
    "surgery": 3,
    "record": 3,
    "convert": 3,
    "models": 4,
    "checkpoint": 4,
    "tasks": 5,
    "explain": 5,
    "commands": 6,
    "__init__": 7,
    "__main__": 7,
}
FILES = sorted(ROOT.rglob("*.py"))
PACKAGES = sorted(file.parent for file in FILES if file.name == "__init__.py")


def name(file: Path) -> str:
    return ".".join(("visattn", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name(file): file for file in FILES}


def part(module: str) -> str:
    """The part of the house a module belongs to: the first name below ``visattn``."""
    return MODULES[module].relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def imports(file: Path) -> set[str]:
    """Every module a file imports, wherever in it: lazily, or for types only, counts too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES or not node.module.startswith("visattn") else node.module)
    return found


def own(module: str) -> set[str]:
    return {target for target in imports(MODULES[module]) if target in MODULES}


def importers_of(package: str) -> set[str]:
    return {m for m, file in MODULES.items() for i in imports(file) if f"{i}.".startswith(f"{package}.")}


def test_every_file_stands_on_a_floor():
    assert {part(module) for module in MODULES} <= set(FLOORS)


def test_no_import_runs_up():
    up = [(m, t) for m in MODULES for t in own(m) if FLOORS[part(t)] > FLOORS[part(m)]]
    assert not up


def test_no_package_of_the_first_floor_knows_another():
    first = {part for part, floor in FLOORS.items() if floor == 1}
    across = [(m, t) for m in MODULES for t in own(m) if part(m) in first and part(t) != part(m)]
    assert not across


def test_no_circle():
    order = list(TopologicalSorter({m: own(m) - {m} for m in MODULES}).static_order())
    assert set(order) == set(MODULES)


def test_attention_imports_torch_and_jaxtyping_only():
    allowed = ("visattn.attention", "torch", "jaxtyping", *sys.stdlib_module_names)
    for module in MODULES:
        if part(module) == "attention":
            strangers = {i for i in imports(MODULES[module]) if not i.startswith("torchvision.ops")}
            strangers = {i for i in strangers if not any(f"{i}.".startswith(f"{a}.") for a in allowed)}
            assert not strangers, module


@pytest.mark.parametrize(
    ("package", "parts"),
    [
        ("timm", {"surgery", "record", "checkpoint", "convert", "models", "tasks", "data", "commands"}),
        ("pytorch_lightning", {"tasks", "data"}),
        ("albumentations", {"data"}),
        ("matplotlib", {"drawing"}),
    ],
)
def test_heavy_packages_stay_in_their_rooms(package, parts):
    assert {part(module) for module in importers_of(package)} <= parts


def test_every_public_attention_is_in_the_index():
    found = set()
    for module, file in MODULES.items():
        if part(module) == "attention":
            classes = [n.name for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.ClassDef)]
            objects = [getattr(importlib.import_module(module), c) for c in classes if not c.startswith("_")]
            kinds = [o for o in objects if issubclass(o, Attention)]
            found |= {o.__name__ for o in kinds if o is Attention or hasattr(o, "paper")}  # a family's base has none
    assert found == set(zoo)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda folder: folder.name)
def test_every_name_in_all_exists_and_once(package):
    module = importlib.import_module(name(package / "__init__.py"))
    names = getattr(module, "__all__", [])
    assert [n for n in names if not hasattr(module, n)] == []
    assert len(set(names)) == len(names)


def test_no_file_is_a_drawer_for_anything():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [file for file in FILES if file.stem in drawers or file.parent.name in drawers]


@cache
def loaded(package: str) -> set[str]:
    """What a fresh interpreter holds after importing a package."""
    code = f"import json, sys, {package}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("package", ["pytorch_lightning", "albumentations", "matplotlib", "timm", "rich", "sklearn"])
def test_importing_visattn_leaves_heavy_packages_alone(package):
    assert package not in loaded("visattn")


def test_importing_visattn_loads_fewer_modules_than_importing_timm():
    assert len(loaded("visattn")) < len(loaded("timm"))
