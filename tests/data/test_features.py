import json
import pickle

import numpy as np
import pytest
import torch

from visattn.data import features
from visattn.data.features import Features, digest, fill
from visattn.data.sources import DataError

IMAGES = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 4, 4)


def look(images):
    return images[:, :2, ::2]


class Batches:
    """Two images at a time; notes from where on; may break off."""

    def __init__(self, left_out=(), breaks_at=None):
        self.left_out, self.breaks_at, self.starts = left_out, breaks_at, []

    def __call__(self, start):
        self.starts.append(start)
        for first in range(start, 10, 2):
            if self.breaks_at is not None and first >= self.breaks_at:
                raise KeyboardInterrupt
            rows = [k for k in range(first, min(first + 2, 10)) if k not in self.left_out]
            if rows:
                yield IMAGES[rows], torch.tensor(rows)


def filled(folder, batches=None, about=None, look=look, count=10):
    return fill(folder, look, batches or Batches(), count=count, about=about or {"encoder": "this"})


def test_maps_are_made_once_in_half_precision(tmp_path):
    maps = filled(tmp_path / "new")
    assert (len(maps), maps.shape) == (10, (10, 2, 2, 4))
    for k in (7, 0, 9):
        assert maps[k].dtype == torch.float16
        assert torch.equal(maps[k].float(), look(IMAGES)[k])
    again = Batches()
    assert torch.equal(filled(tmp_path / "new", again)[3], maps[3])
    assert again.starts == []
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["features.json", "features.npy"]
    assert np.load(tmp_path / "new/features.npy").dtype == np.float16
    assert json.loads((tmp_path / "new/features.json").read_text())["about"] == {"encoder": "this"}


def test_workers_get_the_place_and_not_the_maps(tmp_path):
    maps = filled(tmp_path)
    sent = pickle.dumps(maps)
    assert len(sent) < 2 * np.prod(maps.shape) + 500
    assert torch.equal(pickle.loads(sent)[4], maps[4])


@pytest.mark.parametrize("often", [1, 32])
def test_what_was_broken_off_goes_on(tmp_path, monkeypatch, often):
    monkeypatch.setattr(features, "OFTEN", often)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Batches(breaks_at=4))
    with pytest.raises(DataError, match=r"must hold the maps of all images, it has only 4 of 10"):
        Features(tmp_path)
    again = Batches()
    maps = filled(tmp_path, again)
    assert again.starts == [4]
    assert torch.equal(torch.stack([maps[k] for k in range(10)]).float(), look(IMAGES))


def test_images_that_could_not_be_read_have_no_map(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Batches(left_out=(0, 3, 8, 9), breaks_at=6))
    maps = filled(tmp_path, Batches(left_out=(0, 3, 8, 9)))
    assert maps.absent == {0, 3, 8, 9}
    for k in maps.absent:
        with pytest.raises(OSError, match=f"could not be read when the maps in {tmp_path} were made"):
            maps[k]
    assert torch.equal(maps[7].float(), look(IMAGES)[7])


def test_maps_of_something_else_are_refused(tmp_path):
    filled(tmp_path, about={"encoder": "this", "size": (4, 4)})
    filled(tmp_path, about={"size": [4, 4], "encoder": "this"})  # the same, as JSON holds it
    with pytest.raises(DataError, match=r"holds other maps, delete it or name another: encoder is this, not that"):
        filled(tmp_path, about={"encoder": "that", "size": (4, 4)})
    with pytest.raises(DataError, match=r"size is \[4, 4\], not None"):
        filled(tmp_path, about={"encoder": "this"})
    with pytest.raises(DataError, match=r"holds the maps of 10 images, not 11"):
        filled(tmp_path, about={"encoder": "this", "size": (4, 4)}, count=11)


def test_maps_that_cannot_be_kept_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"maps must be finite and below 65,504"):
        filled(tmp_path / "large", look=lambda x: x * 1e5)
    with pytest.raises(DataError, match=r"maps must all be \(3, 4, 4\), got \(3, 4, 2\)"):
        filled(tmp_path / "shapes", look=lambda x: x if x[0].sum() == 0 else x[..., :2])
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"needs 0.0 GB for the maps, the disk has 0.0 GB"):
        filled(tmp_path / "full")
    assert not (tmp_path / "full/features.npy").exists()


def test_damage_is_named(tmp_path):
    with pytest.raises(DataError, match=r"must hold the maps of all images, it has none"):
        Features(tmp_path)
    filled(tmp_path)
    whole = (tmp_path / "features.npy").read_bytes()
    (tmp_path / "features.npy").write_bytes(whole[:200])
    with pytest.raises(DataError, match=r"features.npy is damaged, delete the folder"):
        Features(tmp_path)
    np.save(tmp_path / "features.npy", np.zeros((10, 2, 2, 4), np.float32))
    with pytest.raises(DataError, match=r"features.npy must be float16 \(10, 2, 2, 4\), got float32"):
        filled(tmp_path)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"features.json is damaged, delete the folder"):
        Features(tmp_path)


def test_a_digest_stands_for_names_shapes_and_values():
    weights = {"a": torch.zeros(2, 3), "b": torch.tensor(1), "c": torch.zeros(2, dtype=torch.bfloat16)}
    same = digest({name: tensor.clone() for name, tensor in weights.items()})
    assert digest(weights) == same
    changed = [
        {**weights, "b": torch.tensor(2)},
        {**weights, "a": torch.zeros(3, 2)},
        {"d" if name == "a" else name: tensor for name, tensor in weights.items()},
        {**weights, "c": torch.zeros(2, dtype=torch.float16)},
    ]
    assert len({same, *map(digest, changed)}) == 5
    assert digest(["ab", "c"]) != digest(["a", "bc"])
