from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visattn.data.pairs import Pairs, PairSamples
from visattn.data.sources import DataError, Pixels
from visattn.data.transforms import Preprocess

PLAIN = Preprocess((1, 4, 4), mean=(0.5,), std=(0.5,))


def samples(*counts: int, seed: int = 0, **options) -> PairSamples:
    """Pairs of so many images of each class."""
    targets = np.repeat(np.arange(len(counts)), counts)
    pixels = np.arange(len(targets), dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return PairSamples("train", Pixels(pixels, "numbers").split(targets), PLAIN, seed=seed, **options)


def folder(root: Path, sizes: dict[str, int]) -> Path:
    """Images of one grey value each, a different one for every image."""
    value = 0
    for name, count in sizes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("L", (8, 8), value := value + 1).save(root / name / f"{k:03}.png")
    return root


def made(root, **options) -> Pairs:
    data = Pairs(str(root), **{"size": 8, "in_chans": 1, "batch_size": 4, "workers": 0, "augment": False, **options})
    data.setup()
    return data


def values(loader) -> list[list[int]]:
    """The grey values of each pair, undoing the normalisation."""
    return [[round(float(x.mean()) * 127.5 + 127.5) for x in pair] for images, _ in loader for pair in images]


@pytest.mark.parametrize(
    ("counts", "pairs"),
    [((8, 8), 8), ((40, 40, 40), 60), ((3, 3), 2), ((100, 4), 4), ((30, 20, 10, 1), 30), ((3, 2, 1, 1), 2)],
)
@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_balanced_and_disjoint(counts, pairs, seed):
    drawn = samples(*counts, seed=seed)
    targets = drawn.split.targets
    lengths = set()
    for epoch in range(3):
        found = drawn.pairs(epoch)
        lengths.add(len(found))
        assert len(set(found.flatten())) == found.size
        same = targets[found[:, 0]] == targets[found[:, 1]]
        assert same.sum() * 2 == len(same)
    assert lengths == {len(drawn)} == {pairs}


def test_nearly_all_images_are_used():
    drawn = samples(*[25] * 10)
    assert len(drawn) == 124  # of 125


def test_every_epoch_has_its_own_pairs_and_the_same_again():
    drawn, again, other = samples(20, 20, 20), samples(20, 20, 20), samples(20, 20, 20, seed=1)
    first, second = drawn.pairs(0), drawn.pairs(1)
    assert not np.array_equal(first, second)
    assert np.array_equal(drawn.pairs(0), first)
    assert np.array_equal(again.pairs(1), second)
    assert not np.array_equal(other.pairs(0), first)


def test_over_epochs_all_classes_meet_all_others_and_themselves():
    drawn = samples(*[12] * 4)
    targets, met = drawn.split.targets, np.zeros((4, 4), int)
    for epoch in range(60):
        for a, b in drawn.pairs(epoch):
            met[sorted((targets[a], targets[b]))[0], sorted((targets[a], targets[b]))[1]] += 1
    own, others = met.diagonal(), met[np.triu_indices(4, 1)]
    assert own.sum() == others.sum()
    assert own.min() > 0.8 * own.mean()
    assert others.min() > 0.8 * others.mean()


def test_the_target_says_whether_the_classes_are_one():
    drawn = samples(8, 8)
    for index, (a, b) in enumerate(drawn.pairs(3)):
        sample = drawn[3, index]
        shown = [round(float(image.mean()) * 127.5 + 127.5) for image in sample.image]
        assert shown == [a, b]
        assert sample.target == float((a < 8) == (b < 8))


@pytest.mark.parametrize(("counts", "said"), [((9,), "9"), ((1, 1, 1), "1, 1, 1"), ((2, 2), "2, 2")])
def test_refuses_images_that_make_no_pairs(counts, said):
    with pytest.raises(
        DataError, match=f"train must have images for pairs of one class and of two, got {said} of each"
    ):
        len(samples(*counts))


def test_splits_have_no_image_in_common_where_only_one_comes_with_the_data(tmp_path):
    data = made(folder(tmp_path / "x", {f"{split}/{c}": 20 for split in ("train", "test") for c in "abc"}))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 48, "val": 12, "test": 60}
    shown = {
        name: {v for pair in values(loader) for v in pair}
        for name, loader in (
            ("train", data.train_dataloader()),
            ("val", data.val_dataloader()),
            ("test", data.test_dataloader()),
        )
    }
    assert not shown["train"] & shown["val"]
    assert max(shown["train"] | shown["val"]) <= 60 < min(shown["test"])


def test_three_splits_are_made_of_one():
    data = made("digits", val_fraction=0.2)
    positions = [set(data.splits[name].positions) for name in ("train", "val", "test")]
    assert sum(map(len, positions)) == len(set.union(*positions)) == 1797
    assert len(positions[2]) == pytest.approx(0.2 * 1797, rel=0.02)


def test_training_draws_new_pairs_each_epoch_and_evaluation_never(tmp_path):
    data = made(folder(tmp_path / "x", {f"train/{c}": 20 for c in "abc"}))
    loader = data.train_dataloader()
    epochs = []
    for number in (0, 1):
        loader.sampler.set_epoch(number)
        epochs.append({tuple(sorted(pair)) for pair in values(loader)})
    assert len(epochs[0] & epochs[1]) < 0.2 * len(epochs[0])
    assert values(data.test_dataloader()) == values(data.test_dataloader())
    assert values(data.test_dataloader()) == values(made(tmp_path / "x").test_dataloader())


def test_a_device_finishes_both_images(tmp_path):
    data = made(
        folder(tmp_path / "x", {"train/a": 6, "train/b": 6, "val/a": 4, "val/b": 4}), augment_on="device", augment=True
    )
    images, same = next(iter(data.train_dataloader()))
    finished, targets = data.on_after_batch_transfer([images, same], 0)
    assert images.pixels.shape == finished.shape
    assert finished.shape[:2] == (len(same), 2)
    assert finished.dtype == torch.float32
    assert targets is same


def test_batches_do_not_depend_on_workers():
    batches = [next(iter(made("digits", workers=w, augment=True).train_dataloader())) for w in (0, 2)]
    assert batches[0][0].shape == (4, 2, 1, 8, 8)
    assert batches[0][1].dtype == torch.float
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_an_unreadable_image_is_replaced_in_training_and_its_pair_left_out_else(tmp_path):
    root = folder(tmp_path / "x", {f"{split}/{c}": 8 for split in ("train", "val", "test") for c in "ab"})
    for split in ("train", "test"):
        (root / split / "a/000.png").write_bytes(b"no image")
    data = made(root)
    drawn = data.train_dataloader().dataset
    index = next(k for k, pair in enumerate(drawn.pairs(0)) if 0 in pair)
    sample, (a, b) = drawn[0, index], drawn.pairs(0)[index]
    other = round(float(sample.image[int(a == 0)].mean()) * 127.5 + 127.5) - 1
    assert other == (b if a == 0 else a)
    replaced = round(float(sample.image[int(b == 0)].mean()) * 127.5 + 127.5) - 1
    assert sample.target == float((other < 8) == (replaced < 8))
    with pytest.warns(UserWarning, match=r"test: 1 of 16 images could not be read and were left out"):
        assert len(values(data.test_dataloader())) == len(data.test_dataloader().dataset) - 1


def test_names_both_images_for_prediction(tmp_path):
    data = made(folder(tmp_path / "x", {f"{split}/{c}": 8 for split in ("train", "test") for c in "ab"}))
    _, names = next(iter(data.predict_dataloader()))
    assert names[0].count("/test/") == 2
    assert " | " in names[0]


def test_refuses_images_with_many_labels(tmp_path):
    folder(tmp_path, {"x": 4})
    (tmp_path / "labels.csv").write_text("".join(f"x/{k:03}.png,a|b\n" for k in range(4)))
    with pytest.raises(DataError, match=r"pairs need images with one label each; .* has many"):
        made(tmp_path)
