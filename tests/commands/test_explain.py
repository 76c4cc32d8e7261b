import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import visattn
from visattn import LargeKernelAttention, MultiHeadAttention, SpatialGate
from visattn.__main__ import main
from visattn.commands.explain import mean
from visattn.data.transforms import Preprocess
from visattn.data.vocabulary import Words
from visattn.explain import Finding, Prediction, Word
from visattn.models import Captioner, QuestionAnswerer
from visattn.models.decoders import PooledDecoder, ShowAttendAndTell

WORDS = Words(["a", "dog", "cat", "runs"])
LABELS = ["cat", "dog", "horse"]
FAST = ["--steps", "3", "--measures", "deletion", "permutation"]


@pytest.fixture
def photo(tmp_path):
    image = Image.new("RGB", (96, 64), (200, 90, 40))
    image.paste((20, 200, 220), (60, 10, 90, 40))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def classifier(tmp_path):
    def save(seed=0):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3)
        visattn.insert(model, SpatialGate, at="stages[:2]", gate=None, input_size=(3, 64, 96))
        transform = Preprocess((3, 64, 96), mean=(0.5,) * 3, std=(0.2,) * 3)
        return str(visattn.save(model, tmp_path / f"classifier{seed}", labels=LABELS, transform=transform))

    return save


@pytest.fixture
def captioner(tmp_path):
    def save(decoder=ShowAttendAndTell, encoder="resnet10t", whole=True, **options):
        torch.manual_seed(0)
        decoder = partial(decoder, hidden=8, embedding=8, **options)
        trained = encoder.startswith("local-dir:")
        model = Captioner(len(WORDS), backbone=encoder, pretrained=trained, decoder=decoder, width=8)
        if isinstance(model.decoder, ShowAttendAndTell):  # it says: a dog runs
            with torch.no_grad():
                model.decoder.words.weight.copy_(4 * torch.eye(len(WORDS), 8))
                model.decoder.out.bias.copy_(torch.tensor([0.0, 0, 2, 0, 0, 0]))
                for word, following in ((2, 3), (3, 5), (5, 0)):
                    model.decoder.out.weight[following, word] = 6
        known = {"vocabulary": WORDS, "transform": Preprocess((3, 64, 96), mean=(0.5,) * 3, std=(0.2,) * 3)}
        folder = tmp_path / f"{decoder.func.__name__}-{'whole' if whole else 'small'}"
        return str(visattn.save(model, folder, **known, task="captioning", backbone=whole))

    return save


def lines(capsys, *arguments):
    assert main(["explain", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_says_of_the_likeliest_class_what_python_says_and_draws_it(capsys, classifier, photo, tmp_path):
    path = classifier()
    (line,) = lines(capsys, path, photo, *FAST, "gradient", "adversary", "--save", tmp_path / "out")
    model = visattn.load(path)
    subject = Prediction(model, model.transform(Image.open(photo)))
    assert line["label"] == LABELS[subject.label]
    assert line["map"] == subject.name == "layer2/SpatialGate"
    assert line["probability"] == pytest.approx(subject.probability, abs=1e-6)
    assert list(line["findings"]) == ["deletion", "gradient", "permutation", "adversary"]
    assert set(line["findings"]["deletion"]) == {"map", "shuffled", "uniform"}
    assert line["findings"]["permutation"].keys() == {"shuffled"}
    assert line["picture"] == str(tmp_path / "out" / "photo.png" / f"{line['label']}-layer2-SpatialGate.png")
    with Image.open(line["picture"]) as picture:
        assert picture.width > 3 * picture.height


def test_a_target_and_several_maps_are_chosen(capsys, classifier, photo):
    found = lines(capsys, classifier(), photo, *FAST, "--target", "horse", "--module", "layer*")
    assert [(line["label"], line["map"]) for line in found] == [
        ("horse", "layer1/SpatialGate"),
        ("horse", "layer2/SpatialGate"),
    ]


@pytest.mark.slow
def test_tables_name_every_control_and_end_with_the_mean(capsys, classifier, photo):
    Image.open(photo).save(photo.with_name("again.png"))
    assert main(["explain", classifier(), str(photo), str(photo.with_name("again.png")), *FAST]) == 0
    out = capsys.readouterr().out
    assert out.count("greatest taken first") == 3
    assert "mean of 2: layer2/SpatialGate" in out
    for word in ("map", "shuffled", "uniform", "output moves by"):
        assert word in out


def test_boxes_are_those_of_the_photo_and_of_what_is_named(capsys, classifier, photo, tmp_path):
    photo_2 = photo.with_name("large.png")
    Image.open(photo).resize((192, 128)).save(photo_2)  # seen at half its size
    table = tmp_path / "boxes.csv"
    table.write_text("image,x0,y0,x1,y1,label\nlarge.png,0,0,96,128,dog\nphoto.png,0,0,96,64,cat\n")
    found = lines(capsys, classifier(), photo, photo_2, *FAST, "--boxes", table, "--target", "dog")
    assert "pointing" not in found[0]["findings"]  # there is no dog
    assert found[1]["findings"]["pointing"]["shuffled"] == 0.5  # the left half
    assert found[1]["findings"]["pointing"]["centre"] == 1
    assert found[1]["findings"]["pointing"]["map"] in (0, 1)


@pytest.mark.slow
def test_maps_of_two_seeds_are_compared(capsys, classifier, photo):
    (line,) = lines(capsys, classifier(0), photo, *FAST, "--against", classifier(1))
    (same,) = lines(capsys, classifier(0), photo, *FAST, "--against", classifier(0))
    assert line["findings"]["seed divergence"]["map"] > 0
    assert same["findings"]["seed divergence"]["map"] == pytest.approx(0, abs=1e-7)
    assert same["findings"]["seed agreement"]["map"] == pytest.approx(1)
    assert same["findings"]["seed divergence"]["shuffled"] > 0


def test_signed_maps_of_two_seeds_are_compared_by_their_order(capsys, photo, tmp_path):
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3)
        visattn.insert(model, LargeKernelAttention, at="stages[:1]", gate=None, input_size=(3, 64, 96))
        transform = Preprocess((3, 64, 96), mean=(0.5,) * 3, std=(0.2,) * 3)
        paths.append(str(visattn.save(model, tmp_path / str(seed), labels=LABELS, transform=transform)))
    (line,) = lines(capsys, paths[0], photo, "--measures", "permutation", "--against", paths[1])
    (same,) = lines(capsys, paths[0], photo, "--measures", "permutation", "--against", paths[0])
    assert set(line["findings"]) == {"permutation", "seed agreement"}
    assert line["findings"]["seed agreement"]["map"] < same["findings"]["seed agreement"]["map"] == pytest.approx(1)


def test_names_of_photos_are_no_markup_and_no_formula(capsys, classifier, photo, tmp_path):
    named = tmp_path / "photos [old]" / "US$5_$ [red].png"
    named.parent.mkdir()
    photo.replace(named)
    assert main(["explain", classifier(), str(named), *FAST, "--save", str(tmp_path / "out")]) == 0
    assert "[old]/US$5_$ [red].png" in capsys.readouterr().out
    assert list((tmp_path / "out").rglob("*.png"))


def test_every_word_of_a_caption_is_explained_by_regions_of_the_memory(capsys, captioner, photo, tmp_path):
    path = captioner(attention=partial(MultiHeadAttention, heads=2))
    found = lines(capsys, path, photo, *FAST, "--save", tmp_path / "out")
    model = visattn.load(path)
    image = model.transform(Image.open(photo))
    words = torch.tensor([2, 3, 5])
    assert [line["label"] for line in found] == ["a", "dog", "runs"]
    for place, line in enumerate(found):
        assert line["probability"] == pytest.approx(Word(model, image, words, place).probability, abs=1e-6)
        assert set(line["findings"]["deletion"]) == {"map", "shuffled"}
        assert line["picture"].endswith(f"{place:02d}-{line['label']}-attention.png")
    (dog,) = lines(capsys, path, photo, "--steps", 2, "--measures", "deletion", "--by", "pixels", "--target", "dog")
    assert dog["label"] == "dog"
    assert "uniform" in dog["findings"]["deletion"]


def test_a_captioner_is_told_where_the_backbone_is_that_it_names(capsys, captioner, photo, tmp_path):
    visattn.save(timm.create_model("mobilenetv2_050"), tmp_path / "encoder")
    options = {"encoder": f"local-dir:{tmp_path / 'encoder'}", "attention": partial(MultiHeadAttention, heads=2)}
    small, whole = captioner(**options, whole=False), captioner(**options)
    fast = ["--measures", "uniform", "--target", "dog"]
    told = [*fast, "--backbone", options["encoder"]]
    assert lines(capsys, small, photo, *told) == lines(capsys, whole, photo, *fast)
    for one, other in ((small, whole), (whole, small)):  # of two, either may hold it itself
        (line,) = lines(capsys, one, photo, *told, "--against", other)
        assert line["findings"]["seed divergence"]["map"] == pytest.approx(0, abs=1e-6)
    for path, where, message in (
        (small, tmp_path / "none", "it does not hold the weights of its backbone, mobilenetv2_050"),
        (whole, tmp_path / "encoder", "it has the weights of its backbone itself: backbone must be left out"),
    ):
        assert main(["explain", path, str(photo), "--backbone", f"local-dir:{where}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: {message}")


@pytest.mark.slow
def test_the_captioner_in_checkpoints_can_be_asked(capsys, photo, shared):
    encoder = f"local-dir:{shared / 'weights' / 'mobilenetv2_100'}"
    path = Path(__file__).parents[2] / "checkpoints" / "captioner"
    found = lines(capsys, path, photo, "--backbone", encoder, "--measures", "permutation")
    assert len(found) >= 3
    assert all(line["map"] == "attention" for line in found)


@pytest.mark.slow
def test_words_of_content_are_averaged_apart(capsys, captioner, photo):
    path = captioner(attention=partial(MultiHeadAttention, heads=2))
    assert main(["explain", path, str(photo), "--steps", "2", "--measures", "uniform"]) == 0
    out = capsys.readouterr().out
    assert "mean of 2: words of content" in out  # dog, runs
    assert "hold a sentence together" not in out  # one alone has no mean


def test_a_mean_is_over_what_is_there():
    several = [{"a": Finding(1.0, float("nan")), "b": Finding(None)}, {"a": Finding(2.0, 5.0)}]
    assert mean(several) == {"a": Finding(1.5, 5.0), "b": Finding(None)}


def test_bad_input_is_one_line(capsys, classifier, captioner, photo, tmp_path):
    path, table = classifier(), tmp_path / "boxes.csv"
    table.write_text("image,x0,y0,x1,label\n")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("image,x0,y0,x1,y1,label\nphoto.png,5,5,5,9,dog\n")
    visattn.save(timm.create_model("test_resnet"), tmp_path / "plain")
    words = captioner(attention=partial(MultiHeadAttention, heads=2))
    for arguments, message in (
        ([path, photo, "--target", "bird"], "target must be a class (cat, dog, horse), got 'bird'"),
        ([path, photo, "--module", "layer9*"], "name must be that of a map (layer1/SpatialGate, layer2/SpatialGate)"),
        ([path, photo, "--boxes", table], f"{table} must have columns image, x0, y0, x1, y1, label; y1 missing"),
        ([path, photo, "--boxes", wrong], f"{wrong}, line 2: a box must have x0 < x1 and y0 < y1, got [5.0, 5.0, 5.0"),
        ([tmp_path / "plain", photo], "name must be that of a map (the model has none), got None"),
        ([path, photo, "--against", words], f"against must be the same model of another seed, {words} is another"),
        ([words, photo, "--target", "horse"], "target must be a word of the caption, "),
        ([captioner(PooledDecoder), photo], "captioner must look at regions, PooledDecoder looks nowhere"),
        ([path, tmp_path / "none.png"], f"images must be files or folders, {tmp_path / 'none.png'} does not exist"),
    ):
        assert main(["explain", *map(str, arguments), *FAST]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    model = QuestionAnswerer(6, 3, backbone="test_resnet", hidden=8, embedding=8)
    known = {"vocabulary": WORDS, "transform": Preprocess((3, 64, 96), mean=(0.5,) * 3, std=(0.2,) * 3)}
    visattn.save(model, tmp_path / "asked", labels=LABELS, **known, task="question answering")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "other" / "photo.png")
    for arguments, message in (
        ([tmp_path / "asked", photo], "checkpoint must be of a classifier or a captioner, "),
        (
            [path, photo, tmp_path / "other", "--save", tmp_path / "out"],
            "images must have names of their own for maps, ",
        ),
    ):
        assert main(["explain", *map(str, arguments), *FAST]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main(["explain", path, str(tmp_path / "broken.png"), str(photo), *FAST]) == 1
    assert "1 of 2 images could not be read and were skipped" in capsys.readouterr().err
