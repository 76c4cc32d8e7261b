import gzip
import io
import json
import zipfile
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import visattn
from visattn.__main__ import main
from visattn.attention import HardAttention, MultiHeadAttention
from visattn.data.transforms import Preprocess
from visattn.data.vocabulary import Words
from visattn.metrics import evaluate
from visattn.models import Captioner
from visattn.models.decoders import ShowAttendAndTell

WORDS = Words(["a", "dog", "cat", "runs"])
SIZE = (3, 64, 96)
CAPTIONER = Path(__file__).parents[2] / "checkpoints" / "captioner"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, name in enumerate(("b.png", "a.jpg")):
        Image.new("RGB", (96, 64), (200 * k, 90, 40)).save(folder / name)
    return folder


def saved(path, attention, **options):
    torch.manual_seed(0)
    decoder = partial(ShowAttendAndTell, hidden=8, embedding=8, attention=attention)
    model = Captioner(len(WORDS), backbone="resnet10t", decoder=decoder, width=8)
    known = {"vocabulary": WORDS, "transform": Preprocess(SIZE, mean=(0.5,) * 3, std=(0.2,) * 3), "task": "captioning"}
    return visattn.save(model, path, **known | options)


@pytest.mark.parametrize(
    "attention",
    [partial(MultiHeadAttention, heads=2), partial(HardAttention, temperature=0.5)],
    ids=["multi-head", "hard"],
)
def test_says_what_the_model_says_and_draws_where_it_was_read(capsys, folder, tmp_path, attention):
    saved(tmp_path / "mine", attention)
    arguments = [str(tmp_path / "mine"), str(folder), "--json", "--all", "--beam", "2", "--longest", "4"]
    assert main(["caption", *arguments, "--maps", str(tmp_path / "maps")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [str(folder / name) for name in ("a.jpg", "b.png")]
    model = visattn.load(tmp_path / "mine")
    images = torch.stack([model.transform(Image.open(folder / name)) for name in ("a.jpg", "b.png")])
    with torch.no_grad():
        found = model.caption(images, width=2, longest=4, alpha=0.7)
    for k, line in enumerate(lines):
        wanted = [WORDS.decode(words.tolist()) for words in found.words[k]]
        assert [each["caption"] for each in line["captions"]] == wanted
        assert [each["log_probability"] for each in line["captions"]] == pytest.approx(found.log_probs[k].tolist())
        with Image.open(line["maps"]) as picture:
            assert picture.width > 300
    assert main(["caption", str(tmp_path / "mine"), str(folder / "b.png")]) == 0
    assert WORDS.decode(found.words[1, 0].tolist()) in capsys.readouterr().out


def test_bad_input_is_one_line(capsys, folder, tmp_path):
    saved(tmp_path / "wordless", MultiHeadAttention, vocabulary=None)
    visattn.save(timm.create_model("test_resnet"), tmp_path / "classifier")
    (folder / "broken.png").write_bytes(b"no image")
    for name, message in (
        ("wordless", f"error: {tmp_path / 'wordless'} does not say which words there are\n"),
        ("classifier", f"error: checkpoint must be of a captioner, {tmp_path / 'classifier'} is of ResNet\n"),
    ):
        assert main(["caption", str(tmp_path / name), str(folder)]) == 2
        assert capsys.readouterr().err == message
    saved(tmp_path / "mine", MultiHeadAttention)
    (folder / "more").mkdir()
    Image.new("RGB", (96, 64)).save(folder / "more" / "b.png")
    several = [str(folder / name) for name in ("b.png", "more/b.png")]
    for options, message in (
        (
            [*several, "--maps", str(tmp_path)],
            "images must have names of their own for maps, b.png is there several times",
        ),
        ([several[0], "--alpha", "nan"], "alpha must be finite, got nan"),
    ):
        assert main(["caption", str(tmp_path / "mine"), *options]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    model = visattn.load(tmp_path / "mine")
    torch.nn.init.constant_(next(model.decoder.parameters()), torch.nan)
    visattn.save(model, tmp_path / "lost")
    assert main(["caption", str(tmp_path / "lost"), several[0], "--json"]) == 2
    assert capsys.readouterr().err == "error: checkpoint says sentences whose log-probability is NaN or infinite\n"
    (folder / "more" / "b.png").unlink()
    assert main(["caption", str(tmp_path / "mine"), str(folder), "--json"]) == 1
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 2
    assert "1 of 3 images could not be read and were skipped" in found.err


def test_the_captioner_in_checkpoints_names_the_encoder_it_needs(capsys, folder):
    assert main(["caption", str(CAPTIONER), str(folder / "b.png")]) == 2
    assert "mobilenetv2_100.quant_in1k, and these cannot be had" in capsys.readouterr().err
    assert "[captioner](captioner/card.md)" in (CAPTIONER.parent / "README.md").read_text("utf-8")
    assert sum(file.stat().st_size for file in CAPTIONER.iterdir()) < 20e6
    called = 'visattn.load("checkpoints/captioner", backbone="local-dir:FOLDER")'
    assert called in (CAPTIONER / "card.md").read_text("utf-8")


@pytest.mark.slow
def test_the_captioner_in_checkpoints_tells_photos_that_it_never_saw(capsys, shared, tmp_path):
    encoder = f"local-dir:{shared / 'weights' / 'mobilenetv2_100'}"
    model = visattn.load(CAPTIONER, backbone=encoder)
    with gzip.open(shared / "data/flickr8k/dataset_flickr8k.json.gz") as file:
        photos = [photo for photo in json.load(file)["images"] if photo["split"] == "test"][:48]
    people = [[" ".join(each["tokens"]) for each in photo["sentences"]] for photo in photos]
    with zipfile.ZipFile(shared / "data/flickr8k/flickr8k_224.zip") as files:
        read = [files.read(photo["filename"]) for photo in photos]
    images = torch.stack([model.transform(Image.open(io.BytesIO(each))) for each in read])
    with torch.no_grad():
        found = model.caption(images, width=5, alpha=0.7, longest=20)
    said = [model.vocabulary.decode(words) for words in found.words[:, 0].tolist()]
    assert not any("<unknown>" in sentence for sentence in said)
    own, others = evaluate(said, people), evaluate(said, people[1:] + people[:1])
    assert own["bleu_1"] > 0.55
    assert own["cider_d"] > 4 * others["cider_d"]
    (tmp_path / "photo.jpg").write_bytes(read[0])
    arguments = [str(CAPTIONER), str(tmp_path / "photo.jpg"), "--backbone", encoder, "--beam", "5", "--alpha", "0.7"]
    assert main(["caption", *arguments]) == 0
    assert said[0] in capsys.readouterr().out
