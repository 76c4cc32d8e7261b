import gzip
import json
import pickle
import threading
import time
import warnings
import zipfile
from collections import Counter
from itertools import chain
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image

from visattn.data.captions import CaptionBatch, Captions, Encoded, read
from visattn.data.features import wait
from visattn.data.sources import DataError
from visattn.data.transforms import Augment, Preprocess
from visattn.data.vocabulary import Vocabulary, Words

COLOURS = ["red", "green", "blue", "black", "white"]


def said(k: int, several: int = 5) -> list[str]:
    """Captions of image k, each with its own words, of different lengths."""
    return [f"A {COLOURS[n]} square, number{k}{' small' * ((k + 2 * n) % 6)}." for n in range(several)]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twenty images, each of its own grey value."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(20):
        Image.new("L", (8, 6), 10 * k).save(folder / f"{k:02}.png")
    return folder


def split_of(k: int) -> str:
    return "val" if k % 10 == 3 else "test" if k % 10 == 7 else "train"


def table(path: Path, captions: dict[int, list[str]], *, split: bool = True) -> str:
    rows = [(f"{k:02}.png", f'"{caption}"', split_of(k)) for k, each in captions.items() for caption in each]
    path.write_text("image,caption" + ",split" * split + "\n" + "\n".join(",".join(r[: 2 + split]) for r in rows))
    return str(path)


@pytest.fixture
def file(tmp_path) -> str:
    return table(tmp_path / "captions.csv", {k: said(k) for k in range(20)})


def made(file, photos, **options) -> Captions:
    plain = {"size": 6, "in_chans": 1, "batch_size": 4, "workers": 0, "min_count": 1, "mean": [0.0], "std": [1.0]}
    data = Captions(file, str(photos), **plain | options)
    data.setup()
    return data


def shown(images) -> list[int]:
    """Which image each is."""
    return [round(float(image.mean()) * 25.5) for image in images]


def texts(data: Captions, batch: CaptionBatch) -> list[list[str]]:
    """The captions of each image of a batch, as they are encoded."""
    return [[data.vocabulary.decode(caption.tolist()) for caption in several] for several in batch.words]


def plain(caption: str) -> str:
    return caption.lower().replace(",", "").replace(".", "")


def epoch(loader, number: int) -> list[CaptionBatch]:
    loader.sampler.set_epoch(number)
    return list(loader)


# ------------------------------------------------------------------------------------------------------------- batches


def test_nothing_is_cut_off_unless_told(file, photos):
    expected = Preprocess((1, 6, 6), (0.0,), (1.0,), "bilinear", 0.5)  # of a classifier
    for options, kept in (({}, 1.0), ({"crop_pct": 0.8}, 0.8), ({"crop_pct": None}, 0.5)):
        data = Captions(file, str(photos), size=6, in_chans=1, **options)
        data.preprocess = expected
        data.setup()
        assert data.preprocess.crop_pct == kept


def test_training_gives_images_with_several_captions_the_longest_first(file, photos):
    data = made(file, photos)
    seen = []
    for batch in epoch(data.train_dataloader(), 0):
        assert batch.images.shape == (4, 1, 6, 6)
        assert batch.words.shape == (4, 5, int(batch.lengths.max()))
        assert (batch.words.dtype, batch.lengths.dtype) == (torch.int64, torch.int64)
        assert (batch.lengths.diff(dim=1) <= 0).all()
        for k, captions, words, lengths in zip(
            shown(batch.images), texts(data, batch), batch.words, batch.lengths, strict=True
        ):
            assert Counter(captions) == Counter(map(plain, said(k)))
            for caption, length in zip(words, lengths.tolist(), strict=True):
                assert (caption[length - 1 :] == data.vocabulary.end).all()
                assert (caption[: length - 1] != data.vocabulary.end).all()
            seen.append(k)
    assert len(set(seen)) == len(seen) == 16
    assert {split_of(k) for k in seen} == {"train"}


def test_the_index_of_an_image_leads_to_all_its_captions(file, photos):
    data = made(file, photos, captions_per_image=2)
    references = data.references("train")
    batch = epoch(data.train_dataloader(), 0)[1]
    for k, index in zip(shown(batch.images), batch.indices.tolist(), strict=True):
        found = {data.vocabulary.decode(numbers) for numbers in references[index]}
        assert found == set(map(plain, said(k)))


def test_evaluation_gives_all_captions_as_they_are_and_names(file, photos):
    data = made(file, photos)
    for loader, expected in ((data.val_dataloader(), [3, 13]), (data.test_dataloader(), [7, 17])):
        (batch,) = loader
        assert shown(batch.images) == expected
        assert batch.references == [said(k) for k in expected]
        assert batch.names == [f"{photos}/{k:02}.png" for k in expected]
    ((images, names),) = data.predict_dataloader()
    assert (shown(images), names[1]) == ([7, 17], f"{photos}/17.png")
    ((images, names),) = made(file, photos, predict_root=str(photos), batch_size=32).predict_dataloader()
    assert shown(images) == [*range(20)]


@pytest.mark.parametrize("pool", [1, 2])
def test_batches_follow_from_the_seed_whatever_the_workers(file, photos, pool):
    options = {"captions_per_image": 3, "pool": pool, "augment": Augment(scale=(0.5, 1.0))}
    alone, helped, other = (made(file, photos, workers=w, seed=s, **options) for w, s in ((0, 0), (2, 0), (0, 1)))
    loaders = [data.train_dataloader() for data in (alone, helped, other)]
    words = []
    for number in (0, 1):  # the workers persist
        one, two, three = (epoch(loader, number) for loader in loaders)
        for a, b in zip(one, two, strict=True):
            assert all(map(torch.equal, a[:4], b[:4]))
        assert not all(map(torch.equal, one[0][:4], three[0][:4]))
        words.append([batch.words for batch in one])
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*words, strict=True))


def test_a_device_changes_colours_where_that_is_asked_for(file, photos):
    still = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.0)
    data = made(file, photos, augment=still, augment_on="device")
    batch = next(iter(data.train_dataloader()))
    assert batch.images.pixels.dtype == torch.uint8
    finished = data.on_after_batch_transfer(batch, 0)
    expected = next(iter(made(file, photos, augment=still).train_dataloader()))
    assert shown(finished.images) == shown(expected.images)
    assert finished.words is batch.words


@pytest.mark.parametrize(("several", "epochs"), [(1, 7), (3, 3), (5, 2), (7, 1), (20, 1)])
def test_every_caption_is_seen_and_none_waits_for_long(tmp_path, photos, several, epochs):
    numbers = ("one", "two", "three", "four", "five", "six", "seven")
    captions = {k: [f"a {number} square {k}" for number in numbers] for k in range(20)}
    captions[5] = ["the only one"]
    data = made(table(tmp_path / "x.csv", captions), photos, captions_per_image=several)
    samples = data.samples("train", train=True)
    for index in range(len(samples)):
        drawn = [[tuple(c) for c in samples[number, index].target[0]] for number in range(epochs)]
        assert {len(each) for each in drawn} == {several}
        counts = Counter(chain(*drawn))
        assert len(counts) == len(data.references("train")[index])
        assert max(counts.values()) - min(counts.values()) <= 1
    orders = [samples.drawn(index, 0)[0].tolist()[1:2] for index in range(len(samples))]
    assert several > 1 or len(set(map(tuple, orders))) > 2, "all images begin with the same caption"


def test_batches_of_one_length_pad_less_and_have_the_same_images(tmp_path, photos):
    captions = {k: [" ".join(["word"] * (1 + 7 * k % 19)), "word"] for k in range(20)}
    file = table(tmp_path / "x.csv", captions)
    plain, sorted_ = (made(file, photos, pool=pool, captions_per_image=2) for pool in (1, 4))

    def padded(batches) -> int:
        return sum(int(b.words.numel() - b.lengths.sum()) for b in batches)

    batches = [epoch(data.train_dataloader(), 0) for data in (plain, sorted_)]
    assert Counter(chain(*(b.indices.tolist() for b in batches[0]))) == Counter(
        chain(*(b.indices.tolist() for b in batches[1]))
    )
    assert padded(batches[1]) < 0.75 * padded(batches[0])
    again = epoch(sorted_.train_dataloader(), 1)
    assert [b.indices.tolist() for b in again] != [b.indices.tolist() for b in batches[1]]
    few = made(file, photos, pool=4, batch_size=32)
    assert sorted(next(iter(few.train_dataloader())).indices.tolist()) == [*range(16)]


def test_processes_share_what_is_sorted_by_length(file, photos):
    seen = []
    for rank in (0, 1):
        data = made(file, photos, pool=2, batch_size=2)
        data.processes = lambda rank=rank: {"num_replicas": 2, "rank": rank}
        seen += chain(*(batch.indices.tolist() for batch in data.train_dataloader()))
    assert sorted(seen) == [*range(16)]


def test_a_long_caption_is_cut_counted_and_does_not_end(tmp_path, photos):
    captions = {k: ["one two three four", "one two three"] for k in range(20)}
    with pytest.warns(UserWarning, match=r"x.csv: left out what follows 3 words of a caption \(16, such as '00.png'\)"):
        data = made(table(tmp_path / "x.csv", captions), photos, longest=3, captions_per_image=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.words.shape == (4, 2, 4)
    assert batch.lengths.tolist() == [[4, 3]] * 4
    assert texts(data, batch)[0] == ["one two three"] * 2
    assert next(iter(data.val_dataloader())).references[0] == captions[0]  # references are whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("test")  # said once


# ---------------------------------------------------------------------------------------------------------- vocabulary


def test_words_are_those_of_the_training_captions(tmp_path, photos):
    captions = {k: [f"a {split_of(k)} {'often' if k < 3 else 'seldom'}"] for k in range(20)}
    data = made(table(tmp_path / "x.csv", captions), photos, min_count=4)
    assert data.vocabulary.known == ["a", "train", "seldom"]
    assert data.vocabulary.encode("a val often") == [2, 1, 1, 0]
    data = made(table(tmp_path / "x.csv", captions, split=False), photos, max_words=2, val_fraction=0.5)
    assert len(data.vocabulary) == 4


def test_a_checkpoints_vocabulary_is_taken_as_it_is(file, photos, tmp_path):
    data = Captions(file, str(photos), workers=0, size=6)
    data.vocabulary = Vocabulary.load(Words(["square", "a"]).state)
    assert next(iter(data.train_dataloader())).words[:, :, :3].unique().tolist() == [1, 2, 3]
    only = tmp_path / "only.csv"
    only.write_text("image,caption,split\n01.png,a square,test")
    with pytest.raises(DataError, match=r"only.csv has no train split to take words from"):
        made(str(only), photos)
    data = Captions(str(only), str(photos), workers=0, size=6)
    data.vocabulary = Words(["a"])
    with pytest.warns(UserWarning, match=r"images without a caption \(19, such as '00.png'\)"):
        assert next(iter(data.test_dataloader())).references == [["a square"]]


def test_a_tokenizers_file_comes_in_place_of_words(file, photos, monkeypatch):
    asked = []

    def opened(path, *, end):
        asked.append((path, end))
        return Words(["square"])

    monkeypatch.setattr("visattn.data.captions.Tokenizer.read", opened)
    data = made(file, photos, tokenizer="tokenizer.json", tokenizer_end="</s>")
    assert asked == [("tokenizer.json", "</s>")]
    assert data.vocabulary.known == ["square"]


def test_tokens_are_plain_or_as_the_file_has_them(tmp_path, photos):
    sentences = [{"raw": "A T-shirt!", "tokens": ["A", "t-shirt", "!"]}]
    images = [{"filename": f"{k:02}.png", "split": split_of(k), "sentences": sentences} for k in range(20)]
    (tmp_path / "x.json").write_text(json.dumps({"images": images}))
    data = made(str(tmp_path / "x.json"), photos)
    assert set(data.vocabulary.known) == {"a", "tshirt"}
    assert next(iter(data.val_dataloader())).references[0] == ["A T-shirt!"]
    data = made(str(tmp_path / "x.json"), photos, tokens="given")
    assert set(data.vocabulary.known) == {"a", "t-shirt", "!"}
    assert next(iter(data.val_dataloader())).references[0] == ["A t-shirt !"]


# -------------------------------------------------------------------------------------------------- what files may hold


def karpathy(k: int) -> dict:
    sentences = [{"raw": raw, "tokens": plain(raw).split()} for raw in said(k)]
    return {"filename": f"{k:02}.png", "filepath": "photos", "split": split_of(k), "sentences": sentences}


def coco(numbers: list[int]) -> dict:
    texts = [(k, caption) for k in numbers for caption in said(k)]
    annotations = [{"id": 100 + n, "image_id": 7 * k, "caption": caption} for n, (k, caption) in enumerate(texts)]
    return {
        "info": {},
        "images": [{"id": 7 * k, "file_name": f"{k:02}.png"} for k in numbers],
        "annotations": annotations,
    }


def written(folder: Path, form: str) -> dict:
    """Captions of the twenty images in a form, as arguments."""
    splits = {name: [k for k in range(20) if split_of(k) == name] for name in ("train", "val", "test")}
    lines = [f"{k:02}.png#{n}\t{caption}" for k in range(20) for n, caption in enumerate(said(k))]
    if form.startswith("karpathy"):
        text = json.dumps({"dataset": "ours", "images": [karpathy(k) for k in range(20)]})
        path = folder / form
        path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
        return {"captions": str(path)}
    if form == "coco":
        for name, numbers in splits.items():
            (folder / f"{name}.json").write_text(json.dumps(coco(numbers)))
        return {"captions": {name: str(folder / f"{name}.json") for name in splits}}
    if form.startswith("lines"):
        (folder / "x.token").write_text(("\r\n" if "windows" in form else "\n").join(lines) + "\n")
        for name, numbers in splits.items():
            ending = "" if "stem" in form else ".png"
            (folder / f"{name}.txt").write_text("".join(f"{k:02}{ending}\n" for k in numbers))
        return {"captions": str(folder / "x.token"), "splits": {name: str(folder / f"{name}.txt") for name in splits}}
    mark = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}[form.split()[0]]
    rows = [[f"{k:02}.png", f'"{caption}"', split_of(k)] for k in range(20) for caption in said(k)]
    if "other order" in form:
        rows = [["split", " Comment", "n", "image_name"], *([s, c, "0", i] for i, c, s in rows)]
    (folder / "x.csv").write_text("﻿" * ("bom" in form) + "\n".join(mark.join(row) for row in rows))
    return {"captions": str(folder / "x.csv")}


@pytest.mark.parametrize(
    "form",
    [
        "karpathy.json", "karpathy.json.gz", "coco", "lines", "lines windows", "lines stem", "comma", "semicolon",
        "tab bom", "bar in another, other order",
    ],
)  # fmt: skip
def test_all_forms_say_the_same(tmp_path, photos, form):
    given = written(tmp_path, form)
    data = made(given.pop("captions"), photos, **given)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert next(iter(data.val_dataloader())).references == [said(3), said(13)]
    batch = next(iter(data.train_dataloader()))
    for k, captions in zip(shown(batch.images), texts(data, batch), strict=True):
        assert set(captions) == set(map(plain, said(k)))


def test_a_table_of_ones_own_is_enough(tmp_path):
    for k in range(10):
        Image.new("RGB", (9, 7), (k, 0, 0)).save(tmp_path / f"{k}.jpg")
    (tmp_path / "captions.csv").write_text("\n".join(f"{k}.jpg,a red square" for k in range(10)))
    data = Captions(f"{tmp_path}/captions.csv", str(tmp_path))
    images, words, lengths, *_ = next(iter(data.train_dataloader()))
    assert (images.shape, words.shape, lengths.tolist()) == ((9, 3, 224, 224), (9, 5, 4), [[4] * 5] * 9)
    assert len(data.splits["val"]) == 1


def test_images_are_held_out_and_not_captions(tmp_path, photos):
    data = made(table(tmp_path / "x.csv", {k: said(k) for k in range(20)}, split=False), photos, val_fraction=0.25)
    train, val = (set(data.splits[name].positions) for name in ("train", "val"))
    assert (len(train), len(val)) == (15, 5)
    assert not train & val
    other = made(str(tmp_path / "x.csv"), photos, val_fraction=0.25, seed=1)
    assert set(other.splits["val"].positions) != val
    held = {f"number{k}" for batch in data.val_dataloader() for k in shown(batch.images)}
    assert len(held) == 5
    assert not held & set(data.vocabulary.known)
    with pytest.raises(DataError, match=r"val_fraction=0.01 holds out 0 of the 20 images"):
        made(str(tmp_path / "x.csv"), photos, val_fraction=0.01)


def test_restval_is_trained_with_or_left_out(tmp_path, photos):
    images = [karpathy(k) | ({"split": "restval"} if k < 3 else {}) for k in range(20)]
    (tmp_path / "x.json").write_text(json.dumps({"images": images}))
    assert len(made(str(tmp_path / "x.json"), photos).splits["train"]) == 16
    with pytest.warns(UserWarning, match=r"left out images of no split \(3, such as '00.png'\)"):
        data = made(str(tmp_path / "x.json"), photos, restval=False)
    assert len(data.splits["train"]) == 13


@pytest.mark.parametrize("workers", [0, 2])
def test_images_may_lie_in_an_archive_and_below_folders(tmp_path, file, photos, workers):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(photos.iterdir()):
            archive.write(path, f"set/{'ab'[int(path.stem) % 2]}/{path.name}")
    data = made(file, tmp_path / "photos.zip", workers=workers)
    loader = data.train_dataloader()
    sent = pickle.loads(pickle.dumps(loader.dataset))  # as workers get it where they are not forked
    assert torch.equal(sent[1, 3].image, loader.dataset[1, 3].image)
    seen = [k for number in (0, 1) for batch in epoch(loader, number) for k in shown(batch.images)]
    assert Counter(seen) == {k: 2 for k in range(20) if split_of(k) == "train"}
    assert next(iter(data.val_dataloader())).names[0] == f"{tmp_path}/photos.zip/set/b/03.png"


# ----------------------------------------------------------------------------------------------------- what is left out


def test_what_cannot_be_used_is_left_out_counted_and_said(tmp_path, photos):
    lines = [f"{k:02}.png#{n}\t{caption}" for k in range(18) for n, caption in enumerate(said(k))]
    lines += ["00.png#5\t . ", "01.png#5\t", "18.png#0\t...", "2258277193_586949ec62.jpg.1#0\tpeople waiting"]
    (tmp_path / "x.token").write_text("\n".join(lines))
    (tmp_path / "train.txt").write_text("\n".join(f"{k:02}.png" for k in range(16)))
    (tmp_path / "val.txt").write_text("16.png\n18.png\n\n")
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("train", "val")}
    with pytest.warns(UserWarning, match=r"left out") as caught:
        data = made(str(tmp_path / "x.token"), photos, splits=lists)
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path}/x.token: left out images that are not in {photos} (1, such as '2258277193_586949ec62.jpg.1'), "
        "images without a caption (2, such as '19.png'), empty captions (3, such as '00.png'), "
        "images of no split (1, such as '17.png')"
    ]
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "val": 1}
    assert [len(each) for each in data.references("train")] == [5] * 16


def test_a_corrupt_photo_is_replaced_in_training_with_its_captions_and_left_out_elsewhere(file, photos):
    for name in ("00.png", "03.png"):
        (photos / name).write_bytes(b"no image")
    data = made(file, photos)
    with pytest.warns(UserWarning, match=r"skipped .*00.png, which cannot be read|1 of 16 images could not be read"):
        batches = epoch(data.train_dataloader(), 0)
    for batch in batches:
        for k, index, captions in zip(shown(batch.images), batch.indices.tolist(), texts(data, batch), strict=True):
            assert data.splits["train"].name(index) == f"{photos}/{k:02}.png"
            assert set(captions) == set(map(plain, said(k)))
    with pytest.warns(UserWarning, match="03.png|1 of 2 images"):
        (batch,) = data.val_dataloader()
    assert batch.references == [said(13)]
    with pytest.raises(DataError, match=r"cannot read .*03.png"):
        list(made(file, photos, strict=True).val_dataloader())


def test_a_missing_photo_is_an_error_if_strict(file, photos):
    (photos / "04.png").unlink()
    with pytest.warns(UserWarning, match=r"images that are not in .*photos \(1, such as '04.png'\)"):
        assert len(made(file, photos).splits["train"]) == 15
    with pytest.raises(DataError, match=r"not all of its images is in .*photos, such as '04.png'"):
        made(file, photos, strict=True)


GOOD = "00.png,a square\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON, lines name#number<TAB>caption, or a table of image and caption, got ''"),
        ("once upon a time", "or a table of image and caption, got 'once upon a time'"),
        ("image,title\n", "or a table of image and caption, got 'image,title'"),
        (GOOD + "01.png,a square, black", "line 2 must have 2 columns, got 3; a caption with ',' must stand in quotes"),
        (GOOD + "01.png", "line 2 must have 2 columns, got 1$"),
        (GOOD + '01.png,"a square', "line 2 is wrong: unexpected end of data"),
        ("00.png,a square,training\n01.png,a square,some", "line 2 has split 'some', none of train, val, test and"),
        ("00.png,a,train\n00.png,b,val", "line 2 has '00.png' in val, it was in train before"),
        ("00.png,a,train\n./00.png,b,val", "x has './00.png' in val, it was in train before"),
        ("00.png#0\ta square\n00.png a square", "line 2 must be name#number<TAB>caption, got '00.png a square'"),
        ("{", "x is no JSON: "),
        ("[1, 2]", "must hold images with sentences, or images and annotations, got a list"),
        ('{"photos": [], "year": 1}', "or images and annotations, got an object of photos, year"),
        ('{"images": [], "annotations": []}', "got an object of images, annotations"),
        ('{"images": [{"filename": "00.png"}]}', "x, image 0 lacks what it should have: 'sentences'"),
        ('{"images": [{"sentences": []}]}', "x, image 0 lacks what it should have: 'filename'"),
        ('{"images": [{"filename": "00.png", "sentences": [{}]}]}', "x, image 0 lacks what it should have: 'tokens'"),
        (
            '{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"caption": "a"}]}',
            "x, annotation 0 lacks what it should have: 'image_id'",
        ),
        (
            '{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 2, "caption": "a"}]}',
            "x has captions of image 2, which is none of its images",
        ),
        ("99.png,a square", "x: none of its images is in .*photos, such as '99.png'"),
        (
            '{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "caption": null}]}',
            "x, image 0 must have texts as captions, got None",
        ),
        (
            "00.png,...",
            r"x: nothing is left without images without a caption \(20, .*, empty captions \(1, such",
        ),
    ],
)
def test_a_wrong_file_of_captions_is_named(tmp_path, photos, text, message):
    (tmp_path / "x").write_text(text)
    with pytest.raises(DataError, match=message):
        made(str(tmp_path / "x"), photos)


def test_damage_is_named(tmp_path, photos):
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-20])
    with pytest.raises(DataError, match=r"x.json.gz is truncated or damaged"):
        read(str(tmp_path / "x.json.gz"), "plain")
    (tmp_path / "x.csv").write_bytes("00.png,Straße".encode("latin-1"))
    with pytest.raises(DataError, match=r"x.csv is not in UTF-8"):
        read(str(tmp_path / "x.csv"), "plain")
    with pytest.raises(DataError, match=r"captions must be a file, 'nowhere.csv' does not exist"):
        read("nowhere.csv", "plain")
    with pytest.raises(DataError, match=r"captions must be a file, .* is a folder"):
        read(str(photos), "plain")


def test_an_image_that_may_be_two_is_an_error(tmp_path, file, photos):
    (photos / "a").mkdir()
    (photos / "b").mkdir()
    (photos / "03.png").replace(photos / "a/03.png")
    Image.new("L", (8, 6)).save(photos / "b/03.png")
    with pytest.raises(DataError, match=r"has '03.png', which a/03.png and b/03.png may be"):
        made(file, photos)


def test_splits_of_one_image_must_agree(tmp_path, photos):
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps(coco([1, 2])))
    files = {name: str(tmp_path / f"{name}.json") for name in ("train", "val")}
    with pytest.raises(DataError, match=r"val.json has '01.png' in val, it was in train before"):
        made(files, photos)
    lists = {"train": str(tmp_path / "a.txt"), "val": str(tmp_path / "b.txt")}
    (tmp_path / "a.txt").write_text("01.png\n02.png")
    with pytest.raises(DataError, match=r"splits: .*b.txt cannot be read"):
        made(files["train"], photos, splits=lists)
    (tmp_path / "b.txt").write_text("02.png")
    with pytest.raises(DataError, match=r"splits: '02.png' is in val and in train"):
        made(files["train"], photos, splits=lists)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions_per_image": 0}, "captions_per_image must be at least 1, got 0"),
        ({"longest": 0}, "longest must be at least 1, got 0"),
        ({"pool": 0}, "pool must be at least 1, got 0"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"max_words": 0}, "max_words must be at least 1, got 0"),
        ({"captions": {"dev": "x"}}, "captions must name files of train, val and test, got dev"),
        ({"captions": {}}, "captions must name files of train, val and test, got none"),
        ({"splits": {"training": "x"}}, "splits must name files of train, val and test, got training"),
        ({"tokenizer_end": "</s>"}, "tokenizer_end must be left out without tokenizer, got '</s>'"),
        ({"cache": "maps", "augment": True}, "cache must be left out with augment"),
        ({"cache": "photos/maps"}, "cache must not lie among the images in photos, got photos/maps"),
        ({"cache": "photos"}, "cache must not lie among the images in photos, got photos"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
    ],
)
def test_captions_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        Captions(**{"captions": "captions.csv", "images": "photos"} | options)


def test_images_that_are_not_there_are_named(tmp_path, file):
    with pytest.raises(DataError, match=r"images must be a folder or an archive \(.zip, .*'nowhere' does not exist"):
        Captions(file, "nowhere").setup()
    with pytest.raises(DataError, match=r"captions.csv' is no archive known here"):
        Captions(file, file).setup()
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"x.zip is truncated or damaged"):
        Captions(file, str(tmp_path / "x.zip")).setup()


def test_the_command_line_knows_every_option():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Captions, "data")
    given = [
        "--data.captions.train=a.json",
        "--data.captions.val=b.json",
        "--data.images=x",
        "--data.splits.test=t.txt",
    ]
    data = parser.instantiate(parser.parse_args([*given, "--data.pool=4"])).data
    assert (data.files, data.lists, data.pool) == ({"train": "a.json", "val": "b.json"}, {"test": "t.txt"}, 4)
    data = parser.instantiate(parser.parse_args(["--data.captions=a.csv", "--data.images=x"])).data
    assert data.files == {None: "a.csv"}


# ---------------------------------------------------------------------------------------------------------------- cache


def look(images):
    """Maps that tell which image they are of."""
    return images.mean((1, 2, 3), keepdim=True).expand(-1, 3, 2, 2) * 25.5


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_maps_come_in_place_of_images(tmp_path, file, photos, workers):
    data = made(file, photos, cache=str(tmp_path / "maps"), workers=workers)
    with pytest.raises(DataError, match=r"cache='.*maps' must be filled before there are batches"):
        data.train_dataloader()
    before = sorted(photos.rglob("*"))
    data.fill(look, encoder="mean", weights="none")
    assert sorted(photos.rglob("*")) == before
    for batch in epoch(data.train_dataloader(), 0):
        assert (batch.images.shape, batch.images.dtype) == ((4, 3, 2, 2), torch.float32)
        for of, captions in zip(batch.images[:, 0, 0, 0], texts(data, batch), strict=True):
            assert set(captions) == set(map(plain, said(round(float(of)))))
    (batch,) = data.val_dataloader()
    assert batch.images[:, 0, 0, 0].round().tolist() == [3, 13]
    ((images, _),) = data.predict_dataloader()
    assert shown(images) == [7, 17]  # images, not maps
    about = json.loads((tmp_path / "maps/features.json").read_text())["about"]
    assert about.keys() == {"encoder", "weights", "preprocess", "images"}
    assert about["preprocess"]["input_size"] == [1, 6, 6]


def test_a_cache_is_filled_once_and_only_of_the_same(tmp_path, file, photos):
    options = {"cache": str(tmp_path / "maps")}
    made(file, photos, **options).fill(look, encoder="mean")

    def never(images):
        raise AssertionError("the maps are there")

    again = made(file, photos, **options)
    again.fill(never, encoder="mean")
    assert next(iter(again.test_dataloader())).images[:, 0, 0, 0].round().tolist() == [7, 17]
    with pytest.raises(DataError, match=r"holds other maps, .*: encoder is mean, not max"):
        made(file, photos, **options).fill(never, encoder="max")
    with pytest.raises(DataError, match=r"holds other maps, .*: preprocess is "):
        made(file, photos, **options, size=5).fill(never, encoder="mean")
    (photos / "01.png").replace(photos / "0x.png")
    with pytest.warns(UserWarning, match="not in"):
        other = made(file, photos, **options)
    with pytest.raises(DataError, match=r"holds other maps, .*: images is "):
        other.fill(never, encoder="mean")
    with pytest.raises(ValueError, match="cache must name a folder for the maps"):
        made(file, photos).fill(never)


def test_a_photo_that_had_no_map_is_treated_as_unreadable(tmp_path, file, photos):
    for name in ("00.png", "03.png"):
        (photos / name).write_bytes(b"no image")
    data = made(file, photos, cache=str(tmp_path / "maps"))
    with pytest.warns(UserWarning, match=r"the images: 2 of 20 images could not be read|skipped"):
        data.fill(look)
    with pytest.warns(UserWarning, match=r"03.png, which cannot be read .* when the maps in|1 of 2 images"):
        (batch,) = data.val_dataloader()
    assert batch.references == [said(13)]
    with pytest.warns(UserWarning, match=r"00.png, which cannot be read|1 of 16 images"):
        batches = epoch(data.train_dataloader(), 0)
    seen = [round(float(x)) for batch in batches for x in batch.images[:, 0, 0, 0]]
    assert len(seen) == 16
    assert 0 not in seen


# ------------------------------------------------------------------------------------------------------------ real data


DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


@pytest.mark.slow
def test_flickr8k_has_the_counts_that_are_known(shared):
    """Figures measured on the public set, of the training captions without the tokens that no metric counts."""
    folder = shared / "data/flickr8k"
    given = str(folder / "dataset_flickr8k.json.gz"), str(folder / "flickr8k_224.zip")
    data = Captions(*given, restval=False, batch_size=20, workers=1, pool=16)
    with pytest.warns(UserWarning, match=r"images of no split \(91, .* what follows 20 words of a caption \(463, "):
        data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6000, "val": 1000, "test": 1000}
    assert len(data.vocabulary) == 2537 + 2
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (20, 3, 224, 224)
    assert batch.images.std() > 0.5

    texts = [text.lower().split() for captions in data.splits["train"].captions for text in captions]
    texts = [" ".join(word for word in words if word not in DROPPED) for words in texts]
    assert len(texts) == 30000
    known = {count: Words.of(texts, min_count=count, tokens="given") for count in (1, 2, 3, 5, 6, 10)}
    assert [len(words) - 2 for words in known.values()] == [7697, 4509, 3488, 2539, 2270, 1658]
    lengths = np.array([len(text.split()) for text in texts])
    assert round(lengths.mean(), 2) == 10.79
    assert (*np.percentile(lengths, (50, 90, 99)), lengths.max()) == (10, 16, 22, 36)
    numbers = [number for text in texts for number in known[5].numbers(text)]
    assert round(100 * numbers.count(known[5].unknown) / len(numbers), 2) == 2.61


def test_arrays_of_words_give_each_caption_again():
    images = [[[2, 3, 0], [4, 0]], [[0]], [[5, 6, 7, 0], [2, 0], [3, 0]]]
    words = Encoded(images, end=0)
    assert [[caption.tolist() for caption in words[k]] for k in range(3)] == images
    assert words.lengths.tolist() == [2.5, 1, 8 / 3]


def test_what_makes_maps_is_asked_for_them_once_and_by_batches_of_them_alone(tmp_path, file, photos):
    data = made(file, photos, cache=str(tmp_path / "maps"))
    asked = []

    def make():
        asked.append(True)
        data.fill(look, encoder="mean")

    data.wanted = make
    next(iter(data.predict_dataloader()))
    assert not asked
    assert next(iter(data.val_dataloader())).images[:, 0, 0, 0].round().tolist() == [3, 13]
    data.train_dataloader()
    assert asked == [True]


def test_a_process_waits_for_maps_as_long_as_some_come(tmp_path, file, photos):
    data = made(file, photos, cache=str(tmp_path / "maps"))

    def slowly(images):
        time.sleep(0.15)
        return look(images)

    maker = threading.Thread(target=data.fill, args=(slowly,), kwargs={"encoder": "mean"})
    maker.start()
    start = time.monotonic()
    wait(tmp_path / "maps", patience=30.0)
    assert json.loads((tmp_path / "maps/features.json").read_text())["done"] == 20
    maker.join()
    wait(tmp_path / "maps", patience=30.0)
    assert time.monotonic() - start < 20
    wait(tmp_path / "none", patience=0.2)  # nobody makes any


def test_an_image_that_is_missing_does_not_lend_its_captions_to_one_of_its_name(tmp_path):
    for name in ("cats/1.png", "cats/2.png", "dogs/3.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "p" / name)
    rows = "cats/1.png,a cat,train\ndogs/1.png,a dog,train\ndogs/3.png,a dog,train\n"
    (tmp_path / "x.csv").write_text(f"image,caption,split\n{rows}2.png,a cat,val\n")
    with pytest.warns(UserWarning, match=r"images that are not in .*/p \(1, such as 'dogs/1.png'\)"):
        data = made(str(tmp_path / "x.csv"), tmp_path / "p")
    assert sorted(caption for several in data.splits["train"].captions for caption in several) == ["a cat", "a dog"]
    assert data.splits["val"].captions[0] == ["a cat"]
    (tmp_path / "y.csv").write_text(f"image,caption,split\n{rows}old/2.png,a cat,val\nnew/2.png,a dog,val\n")
    with pytest.raises(DataError, match=r"y.csv has 'old/2.png' and 'new/2.png', which cats/2.png may be"):
        made(str(tmp_path / "y.csv"), tmp_path / "p")


def test_lists_tell_images_of_one_name_apart_by_their_folders(tmp_path):
    rows = ["image,caption"]
    for name in ("a/1.png", "b/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "p" / name)
        rows.append(f"{name},an image {name[0]}")
    (tmp_path / "x.csv").write_text("\n".join(rows))
    for name, lines in {"train": "a/1.png\n2\n", "val": "b/1\n", "twice": "old/2.png\n"}.items():
        (tmp_path / f"{name}.txt").write_text(lines)
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("train", "val")}
    with pytest.warns(UserWarning, match=r"images of no split \(1, such as 'b/3.png'\)"):
        data = made(str(tmp_path / "x.csv"), tmp_path / "p", splits=lists)
    assert {name: [data.place.path(int(k)) for k in split.positions] for name, split in data.splits.items()} == {
        "train": ["a/1.png", "a/2.png"],
        "val": ["b/1.png"],
    }
    with pytest.raises(DataError, match=r"splits: 'old/2.png' is in val and in train"):
        made(str(tmp_path / "x.csv"), tmp_path / "p", splits=lists | {"val": str(tmp_path / "twice.txt")})


def test_references_are_whole_where_captions_that_are_read_are_cut(tmp_path, photos):
    told = {k: ["a cat lies on a mat in front of the door"] for k in range(20)}
    with pytest.warns(UserWarning, match="what follows 5 words of a caption"):
        data = made(table(tmp_path / "long.csv", told), photos, longest=5, captions_per_image=1)
    assert next(iter(data.train_dataloader())).words.shape[2] == 5
    assert data.references("train")[0] == [data.vocabulary.encode("a cat lies on a mat in front of the door")]


def test_names_and_splits_that_are_no_texts_are_named(tmp_path, photos):
    images = [karpathy(k) | ({"split": 1} if k == 0 else {}) for k in range(20)]
    (tmp_path / "x.json").write_text(json.dumps({"images": images}))
    with pytest.raises(DataError, match=r"image 0 must have texts as name and split, got 'photos/00.png' and 1"):
        made(str(tmp_path / "x.json"), photos)
    told = coco([0, 1])
    told["images"][1]["file_name"] = None
    (tmp_path / "y.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match=r"image 1 must have texts as name and split, got None and None"):
        made(str(tmp_path / "y.json"), photos)


def test_lines_may_end_as_on_old_machines(file, photos):
    text = Path(file).read_text()
    Path(file).write_bytes(text.replace("\n", "\r").encode())
    assert len(made(file, photos).splits["train"]) == 16
