import subprocess

import torch
import yaml

from visattn.tasks import Classification, provenance
from visattn.tasks.provenance import Provenance, code, requeued


def test_a_run_says_where_it_comes_from_each_time_it_starts(digits, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    for _ in range(2):
        made = trainer(Provenance(["python", "train.py", "a b"]), limit_train_batches=1, limit_val_batches=0)
        made.fit(Classification("test_resnet"), datamodule=digits(seed=3))
    first, second = yaml.safe_load_all((tmp_path / "environment.yaml").read_text())
    assert first["started"] <= second["started"]
    assert first["command"] == "python train.py 'a b'"
    assert (first["seed"], first["data_seed"], first["processes"], first["job"]) == (7, 3, 1, None)
    assert first["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert first["device"] == {"kind": "cpu", "threads": 1}
    assert first["precision"] == "32-true"


def test_the_code_is_named_by_its_commit_where_it_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    said = code()
    assert set(said) == {"visattn"}

    def git(*arguments: str) -> str:
        mine = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *mine, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "__init__.py").touch()
    assert code() == said  # it lies in the repository of somebody else
    git("add", "__init__.py")
    git("commit", "-m", "one")
    assert code() == said | {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "__init__.py").write_text("changed")
    assert code()["dirty"] is True


def test_a_job_that_starts_again_finds_its_own_run(tmp_path, monkeypatch):
    for number, jobs in enumerate((["1"], ["2", "3"], ["4"])):
        run = tmp_path / f"version_{number}"
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints/last.ckpt").touch()
        (run / "environment.yaml").write_text(yaml.safe_dump_all([{"job": job} for job in jobs]))
    assert requeued(tmp_path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert requeued(tmp_path) is None  # its first start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert requeued(tmp_path) == tmp_path / "version_1/checkpoints/last.ckpt"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert requeued(tmp_path) is None
