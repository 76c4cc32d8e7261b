import json
from contextlib import redirect_stdout
from io import StringIO

import pytest

from tests.attention.case import gather
from visattn import attention
from visattn.__main__ import main


@pytest.fixture(scope="module")
def rows():
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["zoo", "--json"]) == 0
    return {row["module"]: row for row in json.loads(printed.getvalue())}


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
        "fresh": "changes",
        "sizes": "any",
        "parameters": 8464,
        "MACs": 8192,
        "place": "residual",
    }


def test_weights_of_several_kinds_are_named(rows):
    assert rows["CBAM"]["weights"] == "channel: b c 1 1, spatial: b 1 h w"


def test_says_which_modules_return_their_input_when_fresh_and_which_take_one_size_only(rows):
    assert {name for name in ("GlobalContext", "NonLocal", "CBAM") if rows[name]["fresh"] == "identity"} == {
        "GlobalContext",
        "NonLocal",
    }
    one = {name for name, row in rows.items() if row["sizes"] == "one"}
    assert {"GatherExcite", "BottleneckSelfAttention"} <= one
    assert not {"MultiHeadSelfAttention2d", "LambdaAttention"} & one  # have a size, and do without


def test_table_and_markdown_hold_the_same(rows, capsys):
    assert main(["zoo"]) == main(["zoo", "--markdown"]) == 0
    table, _, markdown = capsys.readouterr().out.partition("| module |")
    lines = markdown.splitlines()
    assert lines[1] == "| --- | --- | --- | ---: | ---: | --- |"
    assert len(lines) == 2 + len(rows)
    for name, row in rows.items():
        for text in (table, markdown):
            line = next(line for line in text.splitlines() if name in line.split())
            assert f" {row['parameters']:,} " in line
            assert f" {row['MACs']:,} " in line
    assert all(f"| {row['weights']} |" in markdown for row in rows.values())


@pytest.mark.parametrize("family", ["channel", "spatial", "pairwise", "kernel", "pooling", "pairs"])
def test_a_family_alone_says_more_of_each(rows, family, capsys):
    command = ["zoo", "--family", family]
    assert main([*command, "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own == [row for row in rows.values() if row["family"] == family]
    assert main([*command, "--markdown"]) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head == "| module | paper | weights | asked | fresh | sizes | parameters | MACs | place |"
    assert rule == "| --- | --- | --- | --- | --- | --- | ---: | ---: | --- |"
    for row, line in zip(own, lines, strict=True):
        cells = line.strip("| ").split(" | ")
        assert cells[0] == row["module"]
        assert cells[2:6] == [row[name] for name in ("weights", "asked", "fresh", "sizes")]
        assert row["paper"].rpartition(":")[2] in cells[1]


def test_a_paper_is_a_link(capsys):
    assert main(["zoo", "--family", "spatial", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert "| [arXiv:1807.06514](https://arxiv.org/abs/1807.06514) |" in table
    assert "| [proceedings.mlr.press](https://proceedings.mlr.press/v139/yang21o.html) |" in table
    assert main(["zoo", "--family", "channel", "--markdown"]) == 0
    assert "(https://doi.org/10.1109/CVPR.2019.01132)" in capsys.readouterr().out


def test_an_unknown_family_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["zoo", "--family", "temporal"])
    assert "invalid choice: 'temporal'" in capsys.readouterr().err
