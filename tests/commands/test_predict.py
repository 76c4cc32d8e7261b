import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import visattn
from visattn.__main__ import main
from visattn.commands import predict
from visattn.data.sources import open_source
from visattn.data.transforms import Preprocess
from visattn.models import (
    DeepRecurrentAttention,
    DifferentiableGlimpseClassifier,
    DigitClassifier,
    LearnToPayAttention,
    RecurrentAttention,
)

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
SIZE = (3, 64, 96)


class Colours(nn.Module):
    """Its logits are the means of red, green and blue, in 255ths of 10, and it attends to what is bright."""

    def __init__(self):
        super().__init__()
        self.transform = Preprocess(SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        self.labels, self.task, self.batches = [*COLOURS], "classification", []
        self.gate = Brightness()

    def forward(self, x):
        self.batches.append(len(x))
        x = x * torch.tensor([0.2, 0.3, 0.4])[:, None, None] + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
        self.gate(nn.functional.avg_pool2d(x, 16))
        return 10 * x.mean((2, 3))


class Brightness(visattn.attention.base.Attention):
    def attend(self, x):
        return x.mean(1, keepdim=True)

    def read(self, x, *, weights):
        return x * weights


@pytest.fixture
def model(monkeypatch):
    model = Colours().eval()
    monkeypatch.setattr(predict, "load", lambda path, backbone, device: model.to(device))
    return model


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name, colour in zip(("b.png", "deep/c.jpg", "a.bmp"), COLOURS.values(), strict=True):
        Image.new("RGB", (96, 64), colour).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def lines(capsys, *arguments, status=0, checkpoint="checkpoint"):
    assert main(["predict", str(checkpoint), *map(str, arguments), "--json"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_folder_is_read_at_any_depth_and_in_order(capsys, model, folder):
    found = lines(capsys, folder, "--batch", 2)
    assert [line["file"] for line in found] == [str(folder / name) for name in ("a.bmp", "b.png", "deep/c.jpg")]
    assert [line["predictions"][0]["label"] for line in found] == ["blue", "red", "green"]
    assert model.batches == [2, 1]


def test_several_images_and_folders_are_read_one_after_the_other_and_each_once(capsys, model, folder):
    found = lines(capsys, folder / "b.png", folder / "deep", folder / "b.png", folder / "a.bmp")
    assert [line["file"] for line in found] == [str(folder / name) for name in ("b.png", "deep/c.jpg", "a.bmp")]


def test_probabilities_are_a_softmax_and_sorted(capsys, model, folder):
    (line,) = lines(capsys, folder / "b.png", "--top", 2)
    wanted = np.exp([2000 / 255, 0, 0])
    assert [p["probability"] for p in line["predictions"]] == pytest.approx((wanted / wanted.sum())[:2], rel=1e-3)
    assert len(lines(capsys, folder / "b.png")[0]["predictions"]) == 3  # no more than there are classes


def test_several_labels_have_each_its_own_probability(capsys, model, folder):
    model.task = "multi-label"
    (line,) = lines(capsys, folder / "b.png")
    wanted = 1 / (1 + np.exp([-2000 / 255, 0, 0]))
    assert [p["probability"] for p in line["predictions"]] == pytest.approx(wanted, rel=1e-3)


def test_without_labels_classes_are_numbers(capsys, model, folder):
    model.labels = None
    assert lines(capsys, folder / "deep")[0]["predictions"][0]["label"] == "1"


def test_table_and_csv_say_the_same(capsys, model, folder, tmp_path):
    assert main(["predict", "checkpoint", str(folder), "--csv", str(tmp_path / "out.csv")]) == 0
    out = capsys.readouterr().out
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["rank"], row["label"]) for row in rows[:2]] == [
        (str(folder / "a.bmp"), "1", "blue"),
        (str(folder / "a.bmp"), "2", "red"),
    ]
    assert len(rows) == 9
    for row in rows:
        assert row["label"] in out
        assert f"{float(row['probability']):.4f}" in out
    named = [line for line in out.splitlines() if line.startswith(str(folder))]
    assert named == [str(folder / name) for name in ("a.bmp", "b.png", "deep/c.jpg")]


def test_maps_are_drawn_over_what_the_model_saw(capsys, model, folder, tmp_path):
    found = lines(capsys, folder, "--maps", tmp_path / "maps")
    assert found[2]["maps"] == [
        str(tmp_path / "maps" / "deep" / "c.jpg" / name) for name in ("overview.png", "gate-Brightness.png")
    ]
    assert model.batches == [1, 1, 1]
    for line in found:
        for name in line["maps"]:
            pixels = np.asarray(Image.open(name).convert("RGB")).astype(int)
            colour = COLOURS[line["predictions"][0]["label"]]
            assert (abs(pixels - colour).max(2) <= 3).mean() > 0.02  # the photo itself
    (alone,) = lines(capsys, folder / "b.png", "--maps", tmp_path / "one")
    assert alone["maps"][0] == str(tmp_path / "one" / "b.png" / "overview.png")


def test_a_map_that_cannot_be_drawn_is_said_once_and_a_model_without_attention_too(capsys, model, folder, tmp_path):
    model.gate.attend = lambda x: x.new_full((1, 1, 4, 6), torch.nan)
    arguments = ["predict", "checkpoint", str(folder), "--maps", str(tmp_path / "maps")]
    assert main(arguments) == 0
    assert capsys.readouterr().err == "not drawn: gate/Brightness: weights must be finite, got NaN or infinity\n"
    assert sorted(path.name for path in tmp_path.glob("maps/*/*.png")) == ["overview.png"] * 2
    model.gate = nn.Identity()
    assert main(arguments) == 0
    assert capsys.readouterr().err == "not drawn: the model has no attention\n"


@pytest.mark.parametrize("name", ["a.bmp", "zz.png"])
def test_a_corrupt_image_is_named_and_skipped_and_counted(capsys, model, folder, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / name).write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "empty.jpg").touch()
    assert main(["predict", "checkpoint", str(folder), "--json"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len([path for path in folder.rglob("*.*") if path.suffix != ".txt"]) - 2
    assert f"skipped {folder / name}: image file is truncated" in err
    assert f"skipped {folder / 'empty.jpg'}: cannot identify image file" in err
    assert err.splitlines()[-1] == f"2 of {len(out.splitlines()) + 2} images could not be read and were skipped"


def test_bad_input_is_one_line(capsys, model, folder, tmp_path):
    (tmp_path / "none").mkdir()
    for arguments, message in (
        ([tmp_path / "nowhere"], f"error: images must be files or folders, {tmp_path / 'nowhere'} does not exist\n"),
        ([tmp_path / "none"], f"error: {tmp_path / 'none'} holds no image, which is a file ending in .bmp"),
        ([folder, "--maps", tmp_path / "m", "--query", "64", "0"], "error: query must lie inside the image of 64×96"),
        ([folder, folder / "b.png", folder / "deep" / ".." / "b.png", "--maps", tmp_path / "m"], "error: images must "),
        ([folder, "--film"], "error: film must be left out without maps, which says where to\n"),
    ):
        assert main(["predict", "checkpoint", *map(str, arguments)]) == 2
        assert capsys.readouterr().err.startswith(message)
    with pytest.raises(SystemExit):
        main(["predict", "checkpoint", str(folder), "--top", "0"])
    assert "argument --top: must be a whole number of at least 1, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": None}, "checkpoint does not say how images are prepared for the model"),
        ({"forward": lambda x: x}, "checkpoint must be of a classifier, which gives one logit for each class"),
        ({"forward": lambda x: x.mean((2, 3)) * torch.nan}, "checkpoint gives logits that are NaN or infinite"),
    ],
)
def test_a_checkpoint_that_cannot_predict_says_why(capsys, model, folder, change, message):
    vars(model).update(change)
    assert main(["predict", "checkpoint", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_saved_model_predicts_as_it_does_in_python(capsys, folder, tmp_path):
    net = timm.create_model("test_resnet", num_classes=4)
    visattn.insert(net, visattn.NonLocal, at="stages[-2:]")
    visattn.insert(net, visattn.SqueezeExcitation, at="stages[-1:]")
    visattn.save(net, tmp_path / "mine", labels=["cat", "dog", "horse", "[b]bird"])
    assert (
        main(["predict", str(tmp_path / "mine"), str(folder / "b.png"), "--json", "--maps", str(tmp_path / "maps")])
        == 0
    )
    line = json.loads(capsys.readouterr().out)
    loaded = visattn.load(tmp_path / "mine")
    with torch.no_grad():
        wanted = loaded(loaded.transform(Image.open(folder / "b.png"))[None]).softmax(-1)[0]
    got = {p["label"]: p["probability"] for p in line["predictions"]}
    assert [got[label] for label in loaded.labels] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert len(line["maps"]) == 4
    assert main(["predict", str(tmp_path / "mine"), str(folder / "b.png")]) == 0
    assert "[b]bird" in capsys.readouterr().out


def test_a_spatial_transformer_is_drawn(capsys, shared, tmp_path):
    digits = open_source("MNIST", directory=str(shared / "data")).splits["test"]
    digits.read(0).save(tmp_path / "digit.png")
    net = visattn.insert(DigitClassifier(), visattn.AffineTransformer, gate=None, input_size=(1, 28, 28))
    nn.init.normal_(visattn.insertions(net)[0].attention.head.weight, std=0.5)
    visattn.save(net, tmp_path / "mine", transform=Preprocess((1, 28, 28), mean=(0.0,), std=(1.0,)))
    (line,) = lines(capsys, tmp_path / "digit.png", "--maps", tmp_path / "maps", checkpoint=tmp_path / "mine")
    folder = tmp_path / "maps" / "digit.png"
    assert line["maps"] == [str(folder / name) for name in ("overview.png", "layers-AffineTransformer.png")]
    orange, blue = (242, 130, 13), (31, 158, 209)  # the lattice, the arrows
    for name, colours in zip(line["maps"], ([orange], [orange, blue]), strict=True):
        pixels = np.asarray(Image.open(name).convert("RGB")).astype(int)
        for colour in colours:
            assert (abs(pixels - colour).max(2) <= 3).sum() > 500


LITTLE = {"in_chans": 3, "size": (64, 96), "glimpses": 3, "patch": 12, "width": 16}


@pytest.mark.parametrize(
    "network",
    [
        RecurrentAttention(3, scales=2, glimpse_width=8, location_width=8, **LITTLE),
        DifferentiableGlimpseClassifier(3, **LITTLE),
    ],
    ids=lambda network: type(network).__name__,
)
def test_of_a_network_that_looks_here_and_there_the_path_is_drawn(capsys, folder, tmp_path, network):
    preprocess = Preprocess(SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    visattn.save(network, tmp_path / "mine", labels=[*COLOURS], transform=preprocess)
    out = tmp_path / "maps"
    (line,) = lines(capsys, folder / "b.png", "--maps", out, "--film", checkpoint=tmp_path / "mine")
    assert line["maps"] == [str(out / "b.png" / name) for name in ("path.png", "path.gif")]
    loaded = visattn.load(tmp_path / "mine")
    with torch.no_grad():
        wanted = loaded(loaded.transform(Image.open(folder / "b.png"))[None]).softmax(-1)[0]
    got = {p["label"]: p["probability"] for p in line["predictions"]}
    assert [got[label] for label in loaded.labels] == pytest.approx(wanted.tolist(), rel=1e-5)
    with Image.open(line["maps"][1]) as film:
        assert film.n_frames == 3
    pixels = np.asarray(Image.open(line["maps"][0]).convert("RGB")).astype(int)
    for colour, share in (((200, 0, 0), 0.1), ((154, 154, 154), 0.02)):  # the photo, and what was not seen of it
        if network.sensor.number == 2 or share == 0.1:
            assert (abs(pixels - colour).max(2) <= 3).mean() > share
    found = lines(capsys, folder, "--maps", out, checkpoint=tmp_path / "mine")
    assert [line["maps"] for line in found] == [
        [str(out / name / "path.png")] for name in ("a.bmp", "b.png", "deep/c.jpg")
    ]


def test_of_a_network_that_names_several_targets_each_has_its_likeliest_class(capsys, folder, tmp_path):
    sizes = {"width": 8, "glimpse_width": 8, "filters": (2, 2, 2), "context_filters": (2, 2, 2)}
    network = DeepRecurrentAttention(4, in_chans=3, size=(64, 96), targets=2, glimpses=1, **sizes)
    preprocess = Preprocess(SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    visattn.save(network, tmp_path / "mine", labels=[*COLOURS, "end"], transform=preprocess)
    (line,) = lines(capsys, folder / "b.png", "--maps", tmp_path / "maps", checkpoint=tmp_path / "mine")
    loaded = visattn.load(tmp_path / "mine")
    with torch.no_grad():
        wanted = loaded(loaded.transform(Image.open(folder / "b.png"))[None]).softmax(-1)[0].max(1)
    assert [p["label"] for p in line["predictions"]] == [loaded.labels[k] for k in wanted.indices.tolist()]
    assert [p["probability"] for p in line["predictions"]] == pytest.approx(wanted.values.tolist(), rel=1e-5)
    assert line["maps"] == [str(tmp_path / "maps" / "b.png" / "path.png")]


def test_the_overview_says_how_far_the_gates_have_opened():
    model = visattn.insert(timm.create_model("resnet18"), visattn.CBAM, at="stages[:2]")
    assert predict.gates(visattn.insert(timm.create_model("resnet18"), visattn.CBAM, gate=None)) == ""
    for value, inserted in zip((0.25, -0.5), visattn.insertions(model), strict=True):
        torch.nn.init.constant_(inserted.gate, value)
    assert predict.gates(model) == "   gates -0.50 to 0.25"


def test_a_network_is_told_where_the_backbone_is_that_it_names(capsys, folder, tmp_path):
    visattn.save(timm.create_model("test_resnet"), tmp_path / "encoder")
    encoder = f"local-dir:{tmp_path / 'encoder'}"
    network = LearnToPayAttention(encoder, num_classes=3, pretrained=True)
    network.transform = Preprocess((3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    small = visattn.save(network, tmp_path / "small", labels=[*COLOURS], backbone=False)
    whole = visattn.save(network, tmp_path / "whole", labels=[*COLOURS])
    told = ["--backbone", encoder]
    assert lines(capsys, folder, *told, checkpoint=small) == lines(capsys, folder, checkpoint=whole)
    assert main(["predict", str(small), str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {small}: it does not hold the weights of its backbone")
