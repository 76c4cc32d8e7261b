import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from visattn.data import images
from visattn.data.images import Images
from visattn.data.sources import DataError, open_source
from visattn.data.transforms import Augment, Preprocess


def folder(root: Path, sizes: dict[str, int]) -> Path:
    """Images of one grey value each, a different one for every image."""
    value = 0
    for name, count in sizes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("L", (8, 6), value := value + 1).save(root / name / f"{k:03}.png")
    return root


@pytest.fixture
def photos(tmp_path) -> Path:
    return folder(tmp_path / "photos", {"train/a": 6, "train/b": 6, "val/a": 4, "val/b": 3})


def made(root, **options) -> Images:
    data = Images(str(root), **{"size": 8, "in_chans": 1, "batch_size": 4, "workers": 0, **options})
    data.setup()
    return data


def values(batches) -> list[int]:
    """Grey value of each image, undoing the normalisation."""
    return [round(float(x.mean()) * 127.5 + 127.5) for batch, _ in batches for x in batch]


def epoch(loader, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.sampler.set_epoch(number)
    return list(loader)


def test_splits_labels_and_targets_are_what_lies_there(photos):
    data = made(photos, augment=False)
    assert (data.labels, data.num_classes, data.in_chans, data.multi_label) == (["a", "b"], 2, 1, False)
    targets = torch.cat([y for _, y in data.val_dataloader()])
    assert targets.dtype == torch.int64
    assert targets.tolist() == [0] * 4 + [1] * 3
    assert values(data.val_dataloader()) == [*range(13, 20)]
    assert values(data.test_dataloader()) == [*range(13, 20)]
    assert sorted(values(data.train_dataloader())) == [*range(1, 13)]


def test_test_and_val_are_kept_apart_where_both_are_there(tmp_path):
    data = made(folder(tmp_path / "x", {f"{split}/{c}": 1 for split in ("train", "valid", "Test") for c in "ab"}))
    assert (values(data.val_dataloader()), values(data.test_dataloader())) == ([3, 4], [5, 6])


def test_pixels_depend_neither_on_workers_nor_on_order_but_on_the_epoch():
    alone, helped = (Images("digits", train_per_class=5, batch_size=7, workers=w) for w in (0, 2))
    loaders = [data.train_dataloader() for data in (alone, helped)]
    seen = []
    for number in (0, 1):  # the workers of the second persist
        one, two = (epoch(loader, number) for loader in loaders)
        assert len(one) == len(two) == 7  # of 50 images, one is dropped
        for (x, y), (u, v) in zip(one, two, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
        seen.append(one)
    assert not torch.equal(seen[0][0][1], seen[1][0][1]), "the order is the same in both epochs"
    samples = loaders[0].dataset
    again = [samples[0, index].image for index in (4, 3)]
    assert torch.equal(samples[0, 3].image, again[1])
    assert not torch.equal(samples[1, 3].image, again[1]), "the pixels are the same in both epochs"


def test_another_seed_holds_out_draws_and_augments_otherwise():
    one, same, other = (Images("digits", seed=seed, train_per_class=3, workers=0) for seed in (0, 0, 1))
    batches = [next(iter(data.train_dataloader()))[0] for data in (one, same, other)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    assert set(one.splits["val"].positions) != set(other.splits["val"].positions)


def test_held_out_is_a_share_of_each_class_and_disjoint():
    data = Images("digits", val_fraction=0.25, workers=0)
    data.setup()
    train, val = data.splits["train"], data.splits["val"]
    assert sorted([*train.positions, *val.positions]) == [*range(1797)]
    share = np.bincount(val.targets) / np.bincount([*train.targets, *val.targets])
    assert np.abs(share - 0.25).max() < 0.005


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_a_device_finishes_training_images_where_that_is_asked_for(photos):
    """Of one grey each, without chance: their values are what they are. Evaluation is that of workers."""
    still = Augment(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip=0.0, jitter=0.0)
    data = made(photos, augment=still, augment_on="device", batch_size=3)
    first, targets = next(iter(data.train_dataloader()))
    assert (first.pixels.dtype, first.pixels.shape, targets.shape) == (torch.uint8, (3, 1, 8, 8), (3,))
    device, workers = Watcher(), Watcher()
    trainer(max_epochs=2).fit(device, datamodule=data)
    trainer(max_epochs=2).fit(workers, datamodule=made(photos, augment=still, batch_size=3))
    assert device.seen == workers.seen
    assert len(device.seen["train"][0]) == 12


def test_so_many_of_each_class_are_drawn(photos):
    data = made(photos, train_per_class=5, val_per_class=2)
    assert np.bincount(data.splits["train"].targets).tolist() == [5, 5]
    assert np.bincount(data.splits["val"].targets).tolist() == [2, 2]


def test_digits_are_never_mirrored_and_evaluation_is_never_augmented():
    data = Images("digits", augment=Augment(rotate=5.0), workers=0)
    data.setup()
    assert data.augment == Augment(rotate=5.0, flip=0.0)
    default = Images("digits", workers=0)
    assert default.train_dataloader().dataset.augmentation is not None
    assert default.augment.flip == 0
    x, _ = next(iter(default.val_dataloader()))
    split = default.splits["val"]
    assert torch.equal(x[3], default.preprocess(split.read(3)))
    plain = Images("digits", augment=False, workers=0)
    assert torch.equal(plain.train_dataloader().dataset[0, 3].image, plain.preprocess(plain.splits["train"].read(3)))


def test_options_come_before_what_a_model_expects_and_that_before_what_suits_the_images(photos):
    expected = Preprocess((3, 20, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    data = Images(str(photos), workers=0)
    data.preprocess = expected
    data.setup()
    assert data.preprocess == expected
    data = Images(str(photos), size=(8, 10), in_chans=1, interpolation="nearest", workers=0)
    data.preprocess = expected
    data.setup()
    assert data.preprocess.mean == pytest.approx((0.2,))
    assert data.preprocess.std == pytest.approx((0.5,))
    assert data.preprocess == Preprocess((1, 8, 10), data.preprocess.mean, data.preprocess.std, "nearest", 0.9)
    data = Images(str(photos), mean=[0.0, 0.0, 0.0], workers=0)
    data.setup()
    assert data.preprocess == Preprocess((3, 224, 224), (0.0, 0.0, 0.0), (0.229, 0.224, 0.225))
    assert Images("digits", workers=0).samples("train")[0].image.shape == (1, 32, 32)
    assert Images("digits", workers=0, in_chans=3, size=16).samples("train")[0].image.shape == (3, 16, 16)


def test_many_labels_are_rows_of_zeros_and_ones(tmp_path):
    folder(tmp_path / "x", {"train": 8, "val": 2})
    lines = [f"train/{k:03}.png,{'sky' if k % 2 else 'sky|sea'}" for k in range(8)] + [
        "val/000.png,",
        "val/001.png,sea",
    ]
    (tmp_path / "x/labels.csv").write_text("\n".join(lines))
    data = made(tmp_path / "x")
    assert data.multi_label
    _, targets = next(iter(data.val_dataloader()))
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[0, 0], [1, 0]]
    with pytest.raises(ValueError, match=r"train_per_class=2 needs images with one label each"):
        made(tmp_path / "x", train_per_class=2)


def test_many_labels_without_a_held_out_split_hold_out_a_share(tmp_path):
    folder(tmp_path / "x", {".": 10})
    (tmp_path / "x/labels.csv").write_text("\n".join(f"{k:03}.png,{'ab'[k % 2]}" for k in range(10)))
    data = made(tmp_path / "x", val_fraction=0.3)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 7, "val": 3}


def test_prediction_gives_names_of_images_with_and_without_labels(photos, tmp_path):
    folder(tmp_path / "new", {"here": 2, "there/deep": 1})
    data = made(photos, predict_root=str(tmp_path / "new"))
    (x, names), *rest = data.predict_dataloader()
    assert not rest
    assert x.shape == (3, 1, 8, 8)
    assert [Path(name).relative_to(tmp_path / "new").as_posix() for name in names] == [
        "here/000.png", "here/001.png", "there/deep/000.png",
    ]  # fmt: skip
    assert len(next(iter(made(photos).predict_dataloader()))[1]) == 4
    data = made(photos, predict_root="digits")
    assert next(iter(data.predict_dataloader()))[1][3] == "digits, image 3"
    assert len(data.splits["train"]) == 12


def break_one(photos: Path, name: str) -> Path:
    """Cut an image short, in the middle of its pixels."""
    path = photos / name
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_left_out_of_evaluation_and_counted(photos, workers):
    path = break_one(photos, "val/a/001.png")
    with pytest.warns(UserWarning, match="read") as caught:
        seen = values(made(photos, workers=workers).val_dataloader())
    assert seen == [13, 15, 16, 17, 18, 19]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert messages[0].startswith(f"skipped {path}, which cannot be read (OSError: ")
    assert messages[1] == "val: 1 of 7 images could not be read and were left out"


def test_a_truncated_image_is_replaced_in_training_by_the_same_one_whatever_the_workers(photos):
    path = break_one(photos, "train/b/003.png")
    seen = []
    for workers in (0, 2):
        data = made(photos, workers=workers)
        loader = data.train_dataloader()
        with pytest.warns(UserWarning, match=f"skipped {path}"):
            first = epoch(loader, 0)
        with pytest.warns(UserWarning, match="read") as caught:
            second = epoch(loader, 1)
        assert [str(w.message) for w in caught] == [
            "train, epoch 1: 1 of 12 images could not be read and were replaced by others"
        ]
        assert set(loader.dataset.unreadable) == {str(path)}
        seen.append(values(first + second))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 24
    assert 10 not in seen[0]


def test_an_unreadable_image_is_an_error_if_strict(photos):
    path = break_one(photos, "train/b/003.png")
    with pytest.raises(DataError, match=f"cannot read {path} .OSError: "):
        list(made(photos, strict=True).train_dataloader())


@pytest.mark.parametrize("broken", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_any_kind_of_damage_is_skipped(photos, broken):
    (photos / "val/b/002.png").write_bytes(broken)
    with pytest.warns(UserWarning, match=r"002.png, which cannot be read"):
        assert values(made(photos).val_dataloader()) == [*range(13, 19)]


def test_a_batch_of_nothing_but_damage_is_left_out_and_a_split_of_it_is_an_error(photos):
    for k in range(4):
        (photos / f"val/a/{k:03}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"val: 4 of 7 images could not be read"):
        assert values(made(photos).val_dataloader()) == [17, 18, 19]
    for k in range(3):
        (photos / f"val/b/{k:03}.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(DataError, match=r"none of the 7 images of val can be read"),
    ):
        list(made(photos).val_dataloader())


def test_training_gives_up_where_nothing_can_be_read(photos):
    for path in photos.glob("train/*/*.png"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(DataError, match=r"20 images of train in a row cannot be read: "),
    ):
        list(made(photos).train_dataloader())


def test_a_split_that_is_not_there_is_named(tmp_path):
    data = made(folder(tmp_path / "x", {"test/a": 1, "test/b": 1}))
    with pytest.raises(DataError, match=r"has no train split, only test"):
        data.train_dataloader()
    lonely = folder(tmp_path / "y", {"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"val_fraction=0.2 holds out none of the 2 images"):
        made(lonely)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"train_per_class": 0}, "train_per_class must be at least 1, got 0"),
        ({"val_per_class": -1}, "val_per_class must be at least 1, got -1"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_images_refuse(option, message):
    with pytest.raises(ValueError, match=message):
        Images(**option)


def test_refuses_to_augment_elsewhere(unchecked):
    with pytest.raises(ValueError, match="augment_on must be workers or device, got 'gpu'"):
        Images(augment_on="gpu")


def test_download_happens_only_when_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(images, "download", lambda *what: asked.append(what))
    Images("CIFAR10", directory="here").prepare_data()
    assert asked == []
    Images("CIFAR10", directory="here", download=True).prepare_data()
    assert asked == [("CIFAR10", "here")]


def test_the_command_line_knows_every_option():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Images, "data")
    given = parser.parse_args(["--data.root=x", "--data.augment.scale=[0.5, 1]", "--data.size=[8, 9]"])
    data = parser.instantiate(given).data
    assert (data.root, data.augment, data.size) == ("x", Augment(scale=(0.5, 1.0)), (8, 9))
    with pytest.raises(Exception, match=r"bach_size"):
        parser.parse_args(["--data.bach_size=3"])
    assert "left out, one for each core" in " ".join(parser.format_help().split())


class Watcher(pl.LightningModule):
    """Trains one layer with batch norm and writes down which images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 2))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": []}

    def on_train_epoch_start(self) -> None:
        self.seen["train"].append([])

    def on_validation_epoch_start(self) -> None:
        self.seen["val"].append([])

    def training_step(self, batch):
        self.seen["train"][-1] += values([batch])
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch) -> None:
        self.seen["val"][-1] += values([batch])
        self.log("loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(accelerator="cpu", **{"enable_checkpointing": False, **quiet, **options})


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:Checkpoint directory")
def test_a_resumed_training_sees_what_an_unbroken_one_does(photos, tmp_path):
    whole, first, second = Watcher(), Watcher(), Watcher()
    trainer(max_epochs=3).fit(whole, datamodule=made(photos, augment=False))
    begun = trainer(max_epochs=2)
    begun.fit(first, datamodule=made(photos, augment=False))
    begun.save_checkpoint(tmp_path / "two.ckpt")
    trainer(max_epochs=3).fit(second, datamodule=made(photos, augment=False), ckpt_path=tmp_path / "two.ckpt")
    assert whole.seen["train"] == first.seen["train"] + second.seen["train"]
    assert len({tuple(order) for order in whole.seen["train"]}) == 3
    names = trainer().predict(second, datamodule=made(photos))
    assert [Path(name).stem for batch in names for name in batch] == ["000", "001", "002", "003", "000", "001", "002"]


@pytest.mark.slow
def test_two_processes_share_an_epoch_and_evaluate_each_image_once(tmp_path):
    """Nine images of validation in batches of two: one process has three batches, the other two."""
    root = folder(tmp_path / "x", {"train/a": 6, "train/b": 7, "val/a": 4, "val/b": 5})
    (tmp_path / "run.py").write_text(
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('watched', {__file__!r})\n"
        "watched = importlib.util.module_from_spec(spec)\n"
        "sys.modules['watched'] = watched\n"
        "spec.loader.exec_module(watched)\n"
        "model = watched.Watcher()\n"
        f"data = watched.Images({str(root)!r}, size=8, in_chans=1, batch_size=2, workers=1, augment=False)\n"
        "trainer = watched.trainer(max_epochs=2, devices=2, strategy='ddp')\n"
        "trainer.fit(model, datamodule=data)\n"
        f"json.dump(model.seen, open({str(tmp_path)!r} + f'/{{trainer.global_rank}}.json', 'w'))\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for a, b in zip(zero["val"], one["val"], strict=True):
        assert sorted(a + b) == [*range(14, 23)]
        assert (len(a), len(b)) == (5, 4)  # three batches against two
    orders = []
    for a, b in zip(zero["train"], one["train"], strict=True):
        assert len(a) == len(b) == 6  # of 13 images one is repeated, and of each process's seven one dropped
        assert set(a + b) <= {*range(1, 14)}
        assert max(Counter(a + b).values()) <= 2
        orders.append(a)
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_tiny_images_out_of_a_compressed_archive_are_batched(shared):
    data = Images(str(shared / "data/tiny_imagenet_40/tiny_imagenet_40.tar.xz"), size=64, train_per_class=2, workers=2)
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (64, 3, 64, 64)
    assert data.labels[:2] == ["goldfish, Carassius auratus", "American alligator, Alligator mississipiensis"]
    assert np.bincount(data.splits["val"].targets).tolist() == [50] * 40
    assert x.std() > 0.5


def test_importing_the_package_of_data_loads_nothing_heavy():
    code = (
        "import sys, visattn.data.transforms\n"
        "print([name for name in ('albumentations', 'cv2', 'pytorch_lightning', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_nothing_is_reported_where_all_can_be_read(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(made(photos).train_dataloader())
    assert open_source(str(photos)).splits["val"].name(0) == f"{photos}/val/a/000.png"
