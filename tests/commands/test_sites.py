import json

import pytest

from visattn.__main__ import main


def sites(capsys, *arguments: str) -> list[dict]:
    assert main(["sites", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_stages_of_a_resnet(capsys):
    found = sites(capsys, "resnet50")
    assert [(s["name"], s["channels"], s["height"], s["width"], s["stride"]) for s in found] == [
        ("layer1", 256, 56, 56, 4),
        ("layer2", 512, 28, 28, 8),
        ("layer3", 1024, 14, 14, 16),
        ("layer4", 2048, 7, 7, 32),
    ]


def test_another_input_size_and_several_places(capsys):
    found = sites(capsys, "resnet18", "--at", "blocks[:1]", "--at", "layer4.*", "--input-size", "64x96")
    assert [(s["name"], s["height"], s["width"]) for s in found] == [
        ("layer1.0", 16, 24),
        ("layer4.0", 2, 3),
        ("layer4.1", 2, 3),
    ]


def test_table(capsys):
    assert main(["sites", "resnet50", "--at", "blocks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("layer" in line for line in lines) == 16
    (row,) = [line for line in lines if "layer4.2" in line]
    assert row.strip("│ ").replace("│", " ").split() == ["layer4.2", "2,048", "7×7", "32", "nchw"]


def test_tokens_say_so(capsys):
    (site,) = sites(capsys, "vit_tiny_patch16_224", "--at", "blocks[-1:]")
    assert (site["layout"], site["channels"], site["height"], site["prefix"]) == ("tokens", 192, 14, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5O"], "error: timm has no model 'resnet5O'; the closest names are resnet50"),
        (["resnet50", "--at", "layer9"], "layer4"),
        (["resnet50", "--input-size", "1x2x3x4"], "error: input_size must be n, (h, w) or (c, h, w)"),
    ],
)
def test_a_mistake_is_one_line_that_helps(capsys, arguments, message):
    assert main(["sites", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_size_may_be_one_number(capsys):
    assert sites(capsys, "resnet18", "--at", "stages[-1]", "--input-size", "64")[0]["height"] == 2


def test_a_size_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["sites", "resnet50", "--input-size", "large"])
    assert "argument --input-size: invalid size value: 'large'" in capsys.readouterr().err
