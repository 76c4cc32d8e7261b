import gzip
import io
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from visattn.data.sources import DataError, open_source

ROOMS = {"train/cat": 3, "train/ñandú 鳥": 2, "val/cat": 2, "val/ñandú 鳥": 1}


def jpeg(value: int = 0, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 10, 20)).save(file, form)
    return file.getvalue()


def contents(folders: dict[str, int]) -> dict[str, bytes]:
    """So many images in each folder; upper and lower case endings."""
    return {
        f"{folder}/{k}{'.PNG' if k % 2 else '.png'}": jpeg(10 * n + k)
        for n, (folder, count) in enumerate(folders.items())
        for k in range(count)
    }


def written(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def archived(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "").replace("tgz", "gz")) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read(source, split: str) -> list[tuple[int, int]]:
    """Class and first red value of every image."""
    found = source.splits[split]
    reds = [np.asarray(found.read(k))[0, 0, 0] for k in range(len(found))]
    return [(int(target), int(red)) for target, red in zip(found.targets, reds, strict=True)]


@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.tar.bz2"])
@pytest.mark.parametrize("top", ["", "pets-1.0/"])
def test_a_folder_and_any_archive_of_it_hold_the_same(tmp_path, kind, top):
    files = {top + name: data for name, data in contents(ROOMS).items()}
    root = written(tmp_path / "pets", files) if kind == "folder" else archived(tmp_path / kind, files)
    before = sorted(tmp_path.rglob("*"))
    source = pickle.loads(pickle.dumps(open_source(str(root))))  # as workers get it where they are not forked
    assert source.labels == ["cat", "ñandú 鳥"]
    assert read(source, "train") == [(0, 0), (0, 1), (0, 2), (1, 10), (1, 11)]
    assert read(source, "val") == [(0, 20), (0, 21), (1, 30)]
    split = source.splits["train"]
    assert split.name(3) == f"{root}/{top}train/ñandú 鳥/0.png"
    assert sorted(tmp_path.rglob("*")) == before


def test_class_folders_alone_are_all_training_even_where_one_is_called_test(tmp_path):
    source = open_source(str(written(tmp_path, contents({"test": 2, "trial": 1}))))
    assert source.labels == ["test", "trial"]
    assert [*source.splits] == ["train"]
    assert read(source, "train") == [(0, 0), (0, 1), (1, 10)]


def test_images_below_a_class_folder_count(tmp_path):
    source = open_source(str(written(tmp_path, contents({"train/a/deep/down": 1, "train/b/images": 2}))))
    assert source.labels == ["a", "b"]
    assert read(source, "train") == [(0, 0), (1, 10), (1, 11)]


def test_classes_txt_gives_order_and_words(tmp_path):
    written(tmp_path, contents(ROOMS))
    (tmp_path / "classes.txt").write_text("ñandú 鳥\tgreater rhea, bird\ncat\n", encoding="utf-8")
    source = open_source(str(tmp_path))
    assert source.labels == ["greater rhea, bird", "cat"]
    assert sorted(read(source, "val")) == [(0, 30), (1, 20), (1, 21)]


def test_a_table_gives_many_labels(tmp_path):
    written(tmp_path, contents({"train": 3, "test": 1}))
    (tmp_path / "labels.csv").write_text(
        "filename,labels\ntrain/0.png,sky|sea\ntrain/1.PNG,\ntrain/2.png,sea\ntest/0.png,cat\n"
    )
    source = open_source(str(tmp_path))
    assert source.multi_label
    assert source.labels == ["cat", "sea", "sky"]
    assert source.splits["train"].targets.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert source.splits["test"].targets.tolist() == [[1, 0, 0]]
    assert source.splits["test"].targets.dtype == np.float32


def test_a_table_may_lie_in_each_split(tmp_path):
    written(tmp_path, contents({"train": 2, "val": 1}))
    (tmp_path / "train/labels.csv").write_text("0.png,a\n1.PNG,b|a\n")
    (tmp_path / "val/labels.csv").write_text("0.png,b\n")
    source = open_source(str(tmp_path))
    assert source.splits["train"].targets.tolist() == [[1, 0], [1, 1]]
    assert source.splits["val"].targets.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0.png,a\n9.png,b\n", "labels.csv, line 2 names '9.png', which is not there or no image"),
        ("0.png,a\n0.png,b\n", "labels.csv, line 2 names '0.png' a second time"),
        ("0.png,a,b\n", "labels.csv, line 1 must be filename,label1.label2, got '0.png,a,b'"),
        ("0.png,\n", "labels.csv in .* names no label"),
        ("0.png,a\n1.PNG,c\n", "labels.csv, line 2 has label 'c', none of the 2 classes: a, b"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, table, message):
    written(tmp_path, contents({".": 2}))
    (tmp_path / "labels.csv").write_text(table)
    if "'c'" in message:
        (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


def test_what_is_no_image_is_reported_and_hidden_files_are_not(tmp_path):
    files = contents(ROOMS) | {
        "train/cat/notes.txt": b"", "README": b"", "stray.png": jpeg(), "extra/dog/1.png": jpeg(), ".git/x.txt": b"",
        "train/cat/.DS_Store": b"",
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"ignored .* \(2 × \.png, 1 × .*, 1 × .*\), such as") as caught:
        source = open_source(str(written(tmp_path, files)))
    assert len(caught) == 1
    assert len(source.splits["train"]) == 5
    (tmp_path / "x").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(str(written(tmp_path / "x", contents(ROOMS) | {"train/cat/.DS_Store": b""})))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"train/cat": 2, "train/dog": 0, "val/cat": 1}, "class folder .*train/dog holds no image"),
        ({"train/cat": 2, "train/dog": 1, "val/cat": 1, "val/dog": 0}, "class folder .*val/dog holds no image"),
        ({"train/a": 1, "train/b": 1, "val/c": 1}, "class folder .*val/c is none of the 2 classes: a, b"),
        ({"train/a": 1, "val/a": 1}, "must have at least two class folders, got a"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, "two folders for one split among train, val, valid"),
        ({".": 2}, "has images, but none in a class folder"),
        ({"a": 0, "b": 0}, r"holds no image, which is a file ending in \.bmp, "),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "a.zip"])
def test_wrong_folders_are_named(tmp_path, folders, message, kind):
    root = tmp_path / "root"
    root.mkdir()
    written(root, contents(folders))
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    if kind != "folder":
        with zipfile.ZipFile(tmp_path / kind, "w") as archive:
            for path in sorted(root.rglob("*")):
                archive.write(path, path.relative_to(root))
        root = tmp_path / kind
    with pytest.raises(DataError, match=message):
        open_source(str(root))


def test_classes_txt_and_class_folders_must_agree(tmp_path):
    written(tmp_path, contents(ROOMS))
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"class folder .*train/ñandú 鳥 is none of the 1 classes: cat"):
        open_source(str(tmp_path))
    (tmp_path / "classes.txt").write_text("cat\nñandú 鳥\ndog\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"names 'dog', but train has no class folder of that name"):
        open_source(str(tmp_path))
    (tmp_path / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(DataError, match=r"classes.txt names a class twice"):
        open_source(str(tmp_path))
    (tmp_path / "classes.txt").write_bytes(b"cat\n\xff\n")
    with pytest.raises(DataError, match=r"classes.txt is not in UTF-8"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_a_truncated_archive_is_named(tmp_path, kind, share):
    path = archived(tmp_path / kind, contents(ROOMS))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=f"{kind} is truncated or damaged"):
        open_source(str(path))


def test_a_tar_that_ends_between_two_files_is_truncated(tmp_path):
    path = archived(tmp_path / "a.tar", contents({"a": 3, "b": 3}))
    path.write_bytes(path.read_bytes()[: 4 * 1024])  # four images, each a header of 512 bytes and 512 bytes
    with pytest.raises(DataError, match=r"a.tar is truncated or damaged: the archive has no end"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("nowhere", r"root must be a folder, an archive \(\.zip, .*\) or one of digits, .*; 'nowhere' does not exist"),
        ("notes.md", "'notes.md' is no archive known here"),
        ("digits", "root='digits' names both a known set and a file or folder; write './digits' for the latter"),
        ("cifar10", "CIFAR10 is not in directory='data'; name where it is, or fetch it with download: true"),
        ("MNIST", "MNIST is not in directory='data'"),
        ("ImageNet", "ImageNet is not in directory='data'"),
    ],
)
def test_a_root_that_is_nothing_known_is_refused(tmp_path, monkeypatch, root, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").touch()
    (tmp_path / "digits").mkdir()
    with pytest.raises(DataError, match=message):
        open_source(root)


def test_digits_are_always_there():
    source = open_source("digits")
    split = source.splits["train"]
    assert len(split) == 1797
    assert source.input_size == (1, 32, 32)
    assert source.augment.flip == 0
    assert np.asarray(split.read(0)).max() in (239, 255)  # 15 or 16 of 16
    assert split.name(5) == "digits, image 5"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def family(folder: Path, *, top: int = 9, zipped: bool = True) -> Path:
    folder.mkdir(parents=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images, labels = np.arange(count * 12).reshape(count, 3, 4) % 256, np.arange(count) % 10
        labels[-1] = top
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{prefix}-{kind}-ubyte"
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


@pytest.mark.parametrize("within", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_mnist_family_are_read_where_they_lie(tmp_path, within, zipped):
    family(tmp_path / "root" / within, zipped=zipped)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(tmp_path / "root"))
    assert source.labels == [*"0123456789"]
    assert source.input_size == (1, 3, 4)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 20, "test": 10}
    assert np.array_equal(source.splits["test"].read(2), np.arange(24, 36).reshape(3, 4))
    assert source.splits["train"].targets.tolist()[:12] == [*range(10), 0, 1]
    assert sorted(tmp_path.rglob("*")) == before


def test_clothes_have_names_and_may_be_mirrored(tmp_path, monkeypatch):
    family(tmp_path / "data/FashionMNIST/raw")
    monkeypatch.chdir(tmp_path)
    source = open_source("fashionmnist")
    assert source.labels[0] == "T-shirt/top"
    assert source.augment.flip is None


def test_a_label_outside_the_range_is_named(tmp_path):
    folder = family(tmp_path / "raw", top=11)
    with pytest.raises(DataError, match=r"train-labels.*gz, image 19 has label 11, outside the range 0 to 9"):
        open_source(str(folder))


def test_damaged_or_missing_files_of_the_family_are_named(tmp_path):
    images = family(tmp_path / "raw") / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is truncated or damaged"):
        open_source(str(tmp_path))
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-3]))
    with pytest.raises(DataError, match=r"images-idx3-ubyte.gz is truncated or damaged: 256 bytes expected, got 253"):
        open_source(str(tmp_path))
    images.write_bytes(gzip.compress(b"what?"))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is no idx file of bytes"):
        open_source(str(tmp_path))
    images.write_bytes(gzip.compress(idx(np.zeros((7, 3, 4)))))
    with pytest.raises(DataError, match=r"holds \(7, 3, 4\) pixels and .* \(20,\) labels"):
        open_source(str(tmp_path))
    images.write_bytes(whole)
    (tmp_path / "raw/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"raw has images without labels or labels without images for test"):
        open_source(str(tmp_path))


def test_two_sets_in_one_folder_are_told_apart(tmp_path):
    family(tmp_path / "MNIST/raw")
    family(tmp_path / "FashionMNIST/raw")
    with pytest.raises(DataError, match=r"holds several sets, name one: .*FashionMNIST.*raw, .*MNIST.*raw"):
        open_source(str(tmp_path))


def test_cifar_comes_from_torchvision(tmp_path, monkeypatch):
    class Ten:
        def __init__(self, root, train):
            self.classes = [*"abcdefghij"]
            assert root == str(tmp_path)
            self.data = np.full((20 if train else 10, 32, 32, 3), 7, np.uint8)
            self.targets = [k % 10 for k in range(len(self.data))]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Ten)
    source = open_source("CIFAR10", directory=str(tmp_path))
    assert source.labels == [*"abcdefghij"]
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 20, "test": 10}
    assert source.splits["train"].read(3).size == (32, 32)


def test_imagenet_has_words_from_its_meta_file(tmp_path):
    import torch

    written(tmp_path, contents({"train/n01": 2, "train/n02": 1, "val/n01": 1, "val/n02": 1}))
    torch.save(({"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",)}, ["n01", "n02"]), tmp_path / "meta.bin")
    source = open_source("ImageNet", directory=str(tmp_path))
    assert source.labels == ["tench, Tinca tinca", "goldfish"]
    assert read(source, "train") == [(0, 0), (0, 1), (1, 10)]


def test_without_labels_every_image_is_there(tmp_path):
    source = open_source(str(written(tmp_path, contents({"a": 2, "b/c": 1, ".": 1}))), labelled=False)
    split = source.splits["predict"]
    names = [split.name(k).removeprefix(f"{tmp_path}/") for k in range(len(split))]
    assert names == ["0.png", "a/0.png", "a/1.PNG", "b/c/0.png"]


@pytest.mark.slow
def test_sixty_thousand_images_are_read_out_of_a_compressed_archive(shared):
    source = open_source(str(shared / "data/cifar10_jpeg/cifar10_jpeg.tar.xz"))
    assert source.labels[:2] == ["airplane", "automobile"]
    assert np.bincount(source.splits["train"].targets).tolist() == [5000] * 10
    assert np.bincount(source.splits["test"].targets).tolist() == [1000] * 10
    assert source.splits["train"].read(-1).size == (32, 32)


def test_real_handwriting_is_read_in_place(shared):
    source = open_source(str(shared / "data/MNIST"))
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(source.splits["train"].targets).tolist() == counts
    assert len(source.splits["test"]) == 10000
