import numpy as np
import pytest
from PIL import Image

from visattn.__main__ import main
from visattn.data.shards import open_shards


@pytest.fixture
def photos(tmp_path):
    for k in range(12):
        file = tmp_path / f"photos/{'ab'[k % 2]}/{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (12, 12), np.uint8)).save(file)
    return str(tmp_path / "photos")


def test_writes_and_checks(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["shards", photos, str(out), "--megabytes", "0.01"]) == 0
    assert f"12 images in 3 shards of together 0.1 MB are in {out}" in capsys.readouterr().out.replace("\n", " ")
    assert open_shards(str(out)).labels == ["a", "b"]
    assert main(["shards", str(out), "--check"]) == 0
    assert "3 of 3 shards are as shards.json says" in capsys.readouterr().out
    damaged = bytearray((out / "train-00001.tar").read_bytes())
    damaged[600] ^= 1
    (out / "train-00001.tar").write_bytes(damaged)
    (out / "train-00002.tar").unlink()
    assert main(["shards", str(out), "--check"]) == 1
    said = capsys.readouterr().out
    assert "train-00001.tar: is damaged: its checksum is another" in said
    assert "train-00002.tar is missing" in said
    assert "1 of 3 shards are as shards.json says" in said


def test_says_that_nothing_is_said_of_where_to(photos, capsys):
    assert main(["shards", photos]) == 2
    assert "error: dest must be given, unless --check is" in capsys.readouterr().err
