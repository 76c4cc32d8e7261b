import json

import pytest

from visattn import attention
from visattn.__main__ import main

N = 14 * 14
MACS = {  # at 256 channels, as the papers' formulas have them
    "BAM": 2 * 256 * 16 + N * (256 * 16 + 18 * 16**2 + 16),
    "CBAM": 2 * 2 * 256 * 16 + 2 * 49 * N,
    "ChannelGate": 2 * 2 * 256 * 16,
    "EfficientChannelAttention": 5 * 256,
    "NonLocal": 2 * N * 256**2 + 2 * N * N * 128,
    "SelfAttention2d": N * 256**2 // 2 + 2 * N * N * 32,
    "SpatialGate": 2 * 49 * N,
    "SqueezeExcitation": 2 * 256 * 16,
}


@pytest.fixture
def rows(capsys):
    assert main(["zoo", "--json"]) == 0
    return {row["module"]: row for row in json.loads(capsys.readouterr().out)}


def test_has_every_module(rows):
    assert set(rows) == set(attention.__all__) - {"Attention"}


def test_counts_what_the_formulas_say(rows):
    assert {name: row["MACs"] for name, row in rows.items()} == MACS


def test_row_of_squeeze_excitation(rows):
    assert rows["SqueezeExcitation"] == {
        "module": "SqueezeExcitation",
        "paper": "arXiv:1709.01507",
        "weights": "b c 1 1",
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
    assert lines[1] == "| --- | --- | --- | ---: | ---: | --- |"
    assert len(lines) == 2 + len(rows)
    for name, row in rows.items():
        for text in (table, markdown):
            line = next(line for line in text.splitlines() if name in line.split())
            assert f" {row['parameters']:,} " in line
            assert f" {row['MACs']:,} " in line
            assert f" {row['weights']} " in line
