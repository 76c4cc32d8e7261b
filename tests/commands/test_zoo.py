import json

import pytest

from tests.attention.case import gather
from visattn import attention
from visattn.__main__ import main


@pytest.fixture
def rows(capsys):
    assert main(["zoo", "--json"]) == 0
    return {row["module"]: row for row in json.loads(capsys.readouterr().out)}


def test_has_every_module(rows):
    assert set(rows) == set(attention.__all__) - {"Attention"}


DEFAULTS = [c for c in gather() if set(c.options) <= {"size"} and c.channels[1] == 256 and len(c.grid) == 2]


def test_counts_what_the_formulas_say(rows):
    for case in DEFAULTS:
        row = rows[case.cls.__name__]
        assert row["MACs"] == case.macs(256, 14, 14), case
        if not case.fixed:
            assert row["parameters"] == case.golden[1], case
    assert len(DEFAULTS) > len(rows) / 2


def test_row_of_squeeze_excitation(rows):
    assert rows["SqueezeExcitation"] == {
        "module": "SqueezeExcitation",
        "family": "channel",
        "paper": "arXiv:1709.01507",
        "weights": "b c 1 1",
        "weighs": "items",
        "choice": "soft",
        "asked": "bottom-up",
        "parameters": 8464,
        "MACs": 8192,
        "place": "residual",
    }


def test_weights_of_several_kinds_are_named(rows):
    assert rows["CBAM"]["weights"] == "channel: b c 1 1, spatial: b 1 h w"


def test_table_and_markdown_hold_the_same(rows, capsys):
    assert main(["zoo"]) == main(["zoo", "--markdown"]) == 0
    table, _, markdown = capsys.readouterr().out.partition("| module |")
    lines = markdown.splitlines()
    assert lines[1] == "| --- | --- | --- | --- | --- | --- | --- | ---: | ---: | --- |"
    assert len(lines) == 2 + len(rows)
    for name, row in rows.items():
        for text in (table, markdown):
            line = next(line for line in text.splitlines() if name in line.split())
            assert f" {row['parameters']:,} " in line
            assert f" {row['MACs']:,} " in line
    assert all(f"| {row['weights']} |" in markdown for row in rows.values())
