import itertools
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visattn.data.captions import Captions, read
from visattn.data.images import Images
from visattn.data.pairs import Pairs
from visattn.data.shards import Shards, about_source, open_shards, write
from visattn.data.sources import DataError, Pixels, Source, Split, open_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Sixty images to train with and nine to evaluate with, each of its own grey value."""
    for k in range(69):
        file = tmp_path / f"photos/{'train' if k < 60 else 'val'}/{'ab'[k % 2]}/{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (12, 12), np.uint8)).save(file)
    return tmp_path / "photos"


def sharded(source: Source, dest: Path, megabytes: float = 0.024) -> list[int]:
    told = lambda split, k: {"label": int(source.splits[split].targets[k])}  # noqa: E731
    return list(write(dest, source.splits, about=about_source(source), told=told, megabytes=megabytes))


@pytest.fixture
def shards(photos, tmp_path) -> Path:
    sharded(open_source(str(photos)), tmp_path / "shards")
    return tmp_path / "shards"


def made(root, **options) -> Images:
    return Images(str(root), **{"size": 8, "in_chans": 1, "batch_size": 4, "workers": 0, **options})


def batches(loader, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def indices(data: Images, epoch: int = 0, **processes) -> list[int]:
    data.processes = lambda: processes or {"num_replicas": 1, "rank": 0}
    sampler = data.train_dataloader().sampler
    sampler.set_epoch(epoch)
    return [index for _, index in sampler]


# ------------------------------------------------------------------------------------------------------------- writing


def test_every_image_is_what_and_where_it_was(photos, shards):
    loose, packed = (made(root) for root in (photos, shards))
    for data in (loose, packed):
        data.setup()
    assert (packed.labels, packed.augment) == (loose.labels, loose.augment)
    for name in ("train", "val"):
        mine, theirs = (data.samples(name, train=name == "train") for data in (packed, loose))
        assert len(mine) == len(theirs)
        for k in range(len(mine)):
            assert torch.equal(mine[3, k].image, theirs[3, k].image)
            assert mine[3, k].target == theirs[3, k].target
            assert str(photos / mine.split.name(k).removeprefix(f"{shards}/")) == theirs.split.name(k)


def test_shards_are_tars_of_samples_that_speak_for_themselves(photos, shards):
    names = sorted(file.name for file in shards.glob("*.tar"))
    assert names == [f"train-{k:05}.tar" for k in range(5)] + ["val-00000.tar"]
    with tarfile.open(shards / "val-00000.tar") as tar:
        members = tar.getnames()
        assert members[:2] == ["val-00000-000000.png", "val-00000-000000.json"]
        assert len(members) == 18
        said = json.load(tar.extractfile(members[1]))
        assert said == {"name": "val/a/60.png", "split": "val", "label": 0}
        assert tar.extractfile(members[0]).read() == (photos / said["name"]).read_bytes()
    assert {file.name for file in shards.iterdir()} - set(names) == {"shards.json", "samples.npz"}


def test_webdataset_reads_them(shards):
    webdataset = pytest.importorskip("webdataset")
    stream = webdataset.WebDataset([str(file) for file in sorted(shards.glob("train-*"))], shardshuffle=False)
    found = {json.loads(sample["json"])["name"] for sample in stream}
    assert found == {f"train/{'ab'[k % 2]}/{k:02}.png" for k in range(60)}


def test_pixels_become_png_and_sets_of_several_places_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [Pixels(rng.integers(0, 255, (n, 5, 6, 3), np.uint8), f"set {n}") for n in (7, 4)]
    splits = {
        name: each.split([0, 1] * 3 + [0] if len(each.pixels) == 7 else [0, 1, 1, 0])
        for name, each in zip(("train", "test"), pixels, strict=True)
    }
    sharded(Source(["x", "y"], splits, input_size=(3, 5, 6)), tmp_path / "out")
    found = open_shards(str(tmp_path / "out"))
    assert found.input_size == (3, 5, 6)
    for name, split in splits.items():
        assert found.splits[name].targets.tolist() == split.targets.tolist()
        for k in range(len(split)):
            assert np.array_equal(np.array(found.splits[name].read(k)), np.array(split.read(k)))
    assert found.splits["test"].name(1) == f"{tmp_path}/out/set 4, image 1"


def test_many_labels_stay_many(tmp_path):
    targets = np.array([[1, 0, 1], [0, 1, 0]], np.float32)
    split = Split(Pixels(np.zeros((2, 4, 4), np.uint8), "p"), np.arange(2), targets)
    source = Source([*"abc"], {"train": split}, multi_label=True)
    list(write(tmp_path / "out", source.splits, about=about_source(source), told=lambda split, k: {}))
    found = open_shards(str(tmp_path / "out"))
    assert found.multi_label
    assert np.array_equal(found.splits["train"].targets, targets)


def test_a_broken_run_goes_on_where_it_stopped(photos, shards, tmp_path):
    source, parts = open_source(str(photos)), tmp_path / "parts"
    run = write(
        parts,
        source.splits,
        about=about_source(source),
        told=lambda s, k: {"label": int(source.splits[s].targets[k])},
        megabytes=0.024,
    )
    seen = [next(run) for _ in range(3)]
    assert seen[0] == 0 < seen[1] < seen[2] < 60
    run.close()
    (parts / ".train-00002.tar.part").write_bytes(b"half")
    with (parts / "written.jsonl").open("a") as journal:
        journal.write('{"name": "train-000')  # a line that was not written whole
    with pytest.raises(DataError, match="shards that are not all written"):
        made(parts).setup()
    first = (parts / "train-00000.tar").stat().st_mtime_ns
    assert sharded(source, parts)[0] == seen[2]
    assert (parts / "train-00000.tar").stat().st_mtime_ns == first
    for file in shards.iterdir():
        assert (parts / file.name).read_bytes() == file.read_bytes(), file.name
    assert sharded(source, parts) == [69]  # nothing is left to do


def test_nothing_else_is_written_over(photos, shards, tmp_path):
    source = open_source(str(photos))
    with pytest.raises(DataError, match="holds other shards already"):
        sharded(source, shards, megabytes=1.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(DataError, match=r"must be empty, or hold shards of the same images, got letter\.txt"):
        sharded(source, tmp_path / "mine")
    next(write(tmp_path / "part", source.splits, about={}, told=lambda split, k: {}, megabytes=1.0))
    with pytest.raises(DataError, match="holds a part of other shards"):
        sharded(source, tmp_path / "part")
    with pytest.raises(ValueError, match=r"megabytes must be positive, got 0\.0"):
        sharded(source, tmp_path / "none", megabytes=0.0)


# ------------------------------------------------------------------------------------------------------------- reading


def test_an_epoch_goes_through_the_shards_and_draws_its_order_anew(shards):
    data = made(shards, buffer=1)
    first, second = indices(data, 0), indices(data, 1)
    assert sorted(first) == sorted(second) == [*range(60)]
    assert first != second
    assert indices(data, 0) == first
    place = data.splits["train"].place
    turns = [shard for shard, _ in itertools.groupby(place.shard[data.splits["train"].positions[first]])]
    assert sorted(turns) == [*range(5)], "a shard is left and come back to"
    assert indices(made(shards, buffer=1, seed=1), 0) != first


def test_a_buffer_mixes_but_not_farther_than_it_reaches(shards):
    near, plain = indices(made(shards, buffer=10)), indices(made(shards, buffer=1))
    moved = np.argsort(plain)[near] - np.arange(60)
    assert 3 < np.abs(moved).max() < 10
    far = indices(made(shards, buffer=1000))
    assert np.abs(np.argsort(plain)[far] - np.arange(60)).max() > 30


@pytest.mark.parametrize("world", [2, 7, 8])
def test_processes_have_stretches_of_their_own_and_as_many(shards, world):
    data = made(shards, buffer=8)
    each = [indices(data, num_replicas=world, rank=rank) for rank in range(world)]
    assert {len(part) for part in each} == {-(-60 // world)}
    assert set().union(*each) == {*range(60)}
    assert sum(map(len, each)) - 60 < world
    place = data.splits["train"].place
    if world == 2:
        wanted = [set(place.shard[data.splits["train"].positions[part]]) for part in each]
        assert len(wanted[0] & wanted[1]) <= 2  # one at the border, one that is read twice to fill up


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_has_every_image_once(shards, world):
    data, seen = made(shards), 0
    for rank in range(world):
        data.processes = lambda rank=rank: {"num_replicas": world, "rank": rank}
        seen += sum(len(y) for _, y in data.val_dataloader())
    assert seen == 9


def test_more_workers_than_shards_give_what_one_gives(shards):
    one, many = (batches(made(shards, workers=workers).train_dataloader(), 1) for workers in (0, 7))
    assert len(one) == 15
    assert all(torch.equal(a, b) for x, y in zip(one, many, strict=True) for a, b in zip(x, y, strict=True))


def test_what_is_held_out_is_what_is_held_out_of_loose_files(photos, tmp_path):
    sharded(open_source(str(photos / "train")), tmp_path / "out")
    loose, packed = (made(root, val_per_class=5, augment=False) for root in (photos / "train", tmp_path / "out"))
    for (x, y), (u, v) in zip(loose.val_dataloader(), packed.val_dataloader(), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert len(loose.splits["val"]) == 10
    assert indices(packed) != indices(loose)
    assert sorted(indices(packed)) == sorted(indices(loose))


def test_pairs_are_the_same_and_come_from_all_shards(photos, shards):
    plain = {"size": 8, "in_chans": 1, "workers": 0, "batch_size": 8}
    first, second = (next(iter(Pairs(str(root), **plain).train_dataloader())) for root in (photos, shards))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_shards_of_a_url_are_fetched_once_and_checked(photos, shards, tmp_path):
    near, far = made(shards), made(f"file://{shards}")
    for (x, _), (u, _) in zip(batches(near.train_dataloader()), batches(far.train_dataloader()), strict=True):
        assert torch.equal(x, u)
    kept = sorted((tmp_path / "cache").rglob("*.tar"))
    assert len(kept) == 5
    times = [file.stat().st_mtime_ns for file in kept]
    batches(made(f"file://{shards}").train_dataloader())
    assert [file.stat().st_mtime_ns for file in kept] == times
    (shards / "val-00000.tar").write_bytes(bytes((shards / "val-00000.tar").stat().st_size))
    with (
        pytest.warns(UserWarning, match="is damaged: its checksum is another"),
        pytest.raises(DataError, match="none of the 9 images of val can be read"),
    ):
        list(made(f"file://{shards}").val_dataloader())


def test_shards_of_a_url_make_room_for_one_another(shards, tmp_path, monkeypatch):
    place = Shards(f"file://{shards}")
    sizes = [known["bytes"] for known in place.about["shards"]]
    monkeypatch.setenv("VISATTN_CACHE_GIB", str((sum(sizes[:3]) + 1) / 2**30))
    first = [int(np.flatnonzero(place.shard == number)[0]) for number in range(len(sizes))]

    def kept() -> set[int]:
        there = {file.stem for file in (tmp_path / "cache").rglob("*.tar")}
        return {n for n, known in enumerate(place.about["shards"]) if known["sha256"][:16] in there}

    near = Shards(str(shards))
    for number in (0, 1, 2):
        assert place.load(first[number]) == near.load(first[number])
    assert kept() == {0, 1, 2}
    del place.opened[0]
    place.load(first[0])  # wanted again, so 1 is now the one that was wanted longest ago
    place.load(first[3])
    assert kept() >= {0, 3}
    assert 1 not in kept()
    assert place.load(first[1] + 1) == near.load(first[1] + 1)  # still open
    assert 1 not in kept()
    place.opened.clear()
    assert place.load(first[1]) == near.load(first[1])  # fetched again
    assert 1 in kept()
    with place.here(0), place.here(1):
        monkeypatch.setenv("VISATTN_CACHE_GIB", "0")
        place.load(first[4])
        assert kept() == {0, 1, 4}
    monkeypatch.setenv("VISATTN_CACHE_GIB", "much")
    place.opened.clear()
    with pytest.raises(DataError, match="VISATTN_CACHE_GIB must be a number of GiB, got 'much'"):
        place.load(first[2])


def test_a_place_travels_to_workers_that_are_spawned(shards):
    place = Shards(str(shards))
    before = place.load(3)
    assert pickle.loads(pickle.dumps(place)).load(3) == before


def test_prediction_takes_all_images_of_shards(shards):
    data = made(shards, predict_root=str(shards))
    names = [name for _, names in data.predict_dataloader() for name in names]
    assert len(names) == 69


# ----------------------------------------------------------------------------------------------------------- bad input


def cut(shards: Path) -> Path:
    file = shards / "train-00002.tar"
    file.write_bytes(file.read_bytes()[:-1000])
    return file


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1000])])
def test_a_shard_that_is_lost_is_named_once_and_its_images_are_replaced(shards, spoil):
    spoil(shards / "train-00002.tar")
    data = made(shards)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = sum(len(y) for _, y in batches(data.train_dataloader()))
    said = [str(each.message) for each in caught]
    count = Shards(str(shards)).about["shards"][2]["images"]
    assert seen == 60
    assert sum("train-00002.tar" in each for each in said) == 1
    assert "skipped the images of a shard, such as" in said[0]
    assert any(f"{count} of 60 images could not be read and were replaced by others" in each for each in said)


def test_strictly_a_lost_shard_ends_the_training(shards):
    cut(shards)
    with pytest.raises(DataError, match=r"cannot read .*shard .*train-00002\.tar is truncated: \d+ of \d+ bytes"):
        batches(made(shards, strict=True).train_dataloader())


def test_says_what_is_no_folder_of_shards(shards, tmp_path):
    with pytest.raises(DataError, match=r"nowhere/shards\.json cannot be read \(FileNotFoundError"):
        made(f"file://{tmp_path}/nowhere").setup()
    about = json.loads((shards / "shards.json").read_text())
    (shards / "shards.json").write_text(json.dumps({**about, "version": 9}))
    with pytest.raises(DataError, match="has shards of version 9, known here is 1"):
        made(shards).setup()
    with pytest.raises(ValueError, match="buffer must be at least 1, got 0"):
        made(shards, buffer=0)


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.fixture
def described(photos, tmp_path) -> str:
    """Captions of all images but the last, in Karpathy's form, one split by others."""
    images = [
        {
            "filename": f"{k:02}.png",
            "split": "restval" if k % 7 == 0 else "test" if k % 7 == 1 else "val" if k % 7 == 2 else "train",
            "sentences": [{"raw": f"It's {k}, number {n}.", "tokens": ["it", "'s", str(k)]} for n in range(3)],
        }
        for k in range(68)
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images}))
    return str(tmp_path / "captions.json")


def captioned(captions, images, **options) -> Captions:
    plain = {"size": 8, "in_chans": 1, "batch_size": 4, "workers": 0, "min_count": 1, "captions_per_image": 2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*left out")
        data = Captions(str(captions), str(images), **plain | options)
        data.setup()
    return data


@pytest.mark.parametrize("tokens", ["plain", "given"])
@pytest.mark.parametrize("inside", [True, False])
def test_captions_in_shards_are_those_of_loose_files(photos, described, tmp_path, tokens, inside):
    from visattn.__main__ import main

    out = tmp_path / "out"
    assert main(["shards", str(photos), str(out), "--captions", described, "--megabytes", "0.02"]) == 0
    loose = captioned(described, photos, tokens=tokens)
    packed = captioned(out if inside else described, out, tokens=tokens)
    assert packed.vocabulary.encode("it", 9) == loose.vocabulary.encode("it", 9)
    for name in ("train", "val", "test"):
        mine, theirs = (data.samples(name, train=name == "train") for data in (packed, loose))
        assert len(mine) == len(theirs)
        for k in range(len(mine)):
            one, other = mine[2, k], theirs[2, k]
            assert torch.equal(one.image, other.image)
            if name != "train":
                assert one.target[0] == other.target[0]
            else:
                assert all(np.array_equal(a, b) for a, b in zip(one.target[0], other.target[0], strict=True))
    assert len(read(str(out), tokens)) == 68


def test_buckets_are_made_of_images_that_lie_together(photos, described, tmp_path):
    from visattn.__main__ import main

    main(["shards", str(photos), str(tmp_path / "out"), "--captions", described, "--megabytes", "0.02"])
    data = captioned(tmp_path / "out", tmp_path / "out", pool=2, buffer=1)
    near = [batch.indices for batch in batches(data.train_dataloader())]
    assert len(set(torch.cat(near).tolist())) == 4 * len(near) == len(data.splits["train"]) // 4 * 4
    place, positions = data.splits["train"].place, data.splits["train"].positions
    assert max(len(set(place.shard[positions[each]])) for each in near) <= 2


def test_shards_of_captions_have_no_classes(photos, described, tmp_path):
    from visattn.__main__ import main

    main(["shards", str(photos), str(tmp_path / "out"), "--captions", described])
    with pytest.raises(DataError, match="holds images with captions and no classes"):
        made(tmp_path / "out").setup()


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("root", ["loose", "shards"])
@pytest.mark.parametrize("workers", [(0, 0), pytest.param((2, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loader_goes_on_within_an_epoch(photos, shards, root, workers, epoch):
    def loader(workers):
        return made({"loose": photos, "shards": shards}[root], workers=workers).train_dataloader()

    first, second = (loader(count) for count in workers)
    whole, following = batches(first, epoch), batches(first, epoch + 1)
    first.sampler.set_epoch(epoch)
    part = iter(first)
    for _ in range(4):
        next(part)
    state = first.state_dict()
    assert state == {"epoch": epoch, "batches": 4}
    second.load_state_dict(state)
    iter(second)  # twice, as a resumed training does
    rest = list(second)
    assert len(rest) == len(whole) - 4
    for x, y in zip(rest, whole[4:], strict=True):
        assert torch.equal(x[0], y[0])
        assert torch.equal(x[1], y[1])
    assert second.state_dict() == {"epoch": epoch, "batches": len(whole)}
    for x, y in zip(batches(second, epoch + 1), following, strict=True):
        assert torch.equal(x[0], y[0])
