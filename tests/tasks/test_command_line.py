import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import visattn
from tests.test_configs import Parsed
from visattn.models import AttentionBranchNetwork
from visattn.tasks import Classification, Verification
from visattn.tasks.command_line import find_checkpoint, one_line, run_cli, run_of, share, task_of, with_packaged_configs

ROOT = Path(__file__).parents[2]
FEW = (
    "--data.size 32 --data.train_per_class 8 --data.val_per_class 4 --data.batch_size 16 --trainer.max_epochs {epochs}"
)
TINY = (
    "--config quickstart.yaml --model.backbone test_resnet --model.backbone_args null --trainer.accelerator cpu " + FEW
)
QUIET = " --trainer.enable_progress_bar false --trainer.enable_model_summary false"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISATTN_TRACEBACK", raising=False)


def tiny(command: str, more: str = "", *, epochs: int = 1) -> list[str]:
    return shlex.split(f"{command} {TINY.format(epochs=epochs)}{QUIET} {more}")


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def wait_for(file: Path, process: subprocess.Popen) -> None:
    for _ in range(3000):
        if file.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"{file} did not appear")


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_fit_leaves_its_run_and_test_finds_it(tmp_path, capsys):
    run_cli(tiny("fit"))
    run = tmp_path / "runs/quickstart/version_0"
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    (events,) = [name for name in left if name.startswith("events.out.tfevents.")]
    model = {f"model/{name}" for name in ("card.md", "config.json", "model.safetensors", "visattn.safetensors")}
    texts = {"config.yaml", "environment.yaml", "hparams.yaml", "metrics.csv"}
    assert left == {*texts, events, "checkpoints/best.ckpt", "checkpoints/last.ckpt"} | model
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["attention"]["init_args"]["reduction"] == 8
    assert "- Command: `" in (run / "model/card.md").read_text()
    metrics = (run / "metrics.csv").read_text()

    run_cli(tiny("test", "--ckpt_path best"))
    assert (run / "per_class.csv").is_file()
    run_cli(tiny("predict", "--ckpt_path last"))
    assert len((run / "predictions.csv").read_text().splitlines()) == 41
    assert (run / "metrics.csv").read_text() == metrics
    assert not (tmp_path / "runs/quickstart/version_1").exists()

    config = yaml.safe_load((run / "config.yaml").read_text())
    run_cli(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert len((run / "metrics.csv").read_text().splitlines()) > len(metrics.splitlines())
    config["trainer"]["max_epochs"] = 2
    assert yaml.safe_load((run / "config.yaml").read_text()) == config
    run_cli(tiny("fit"))
    assert (tmp_path / "runs/quickstart/version_1/model").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ("--trainer.precision bf16-mixed", 5),
        ("--model.channels_last true", 5),
        ("--model.grad_checkpointing true", 5),
        ("--trainer.accumulate_grad_batches 2", 3),
        ("--model.optimizer AdamW --model.optimizer.fused true", 5),
        ("--model.optimizer SGD --model.optimizer.fused true --trainer.gradient_clip_val 1", 5),
    ],
)
def test_what_makes_a_step_faster_or_leaner_trains(more, steps, tmp_path):
    run_cli(tiny("fit", f"{more} --disk 1 --save_minutes 5 --checkpoint.save_top_k 2"))
    state = torch.load(tmp_path / "runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == steps
    fresh = Classification.load_from_checkpoint(tmp_path / "runs/quickstart/version_0/checkpoints/best.ckpt")
    assert all(value.isfinite().all() for value in fresh.state_dict().values())


def test_another_logger_stands_beside_those_that_are_always_there(tmp_path):
    more = "--trainer.logger CSVLogger --trainer.logger.save_dir other --trainer.limit_train_batches 1"
    run_cli(tiny("fit", f"{more} --trainer.limit_val_batches 1 --trainer.log_every_n_steps 1"))
    for run in (tmp_path / "runs/quickstart/version_0", tmp_path / "other/lightning_logs/version_0"):
        assert "train/loss" in (run / "metrics.csv").read_text()
    assert (tmp_path / "runs/quickstart/version_0/model").is_dir()


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is there")
def test_a_logger_whose_package_is_missing_says_which(capsys):
    with pytest.raises(SystemExit):
        run_cli(tiny("fit", "--trainer.logger WandbLogger"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: .*wandb.*pip install.*", last), last


def test_short_names_put_modules_in(tmp_path):
    two = "--model.attention null --model.attention+=CBAM --model.attention+=NonLocal --model.attention.reduction 4"
    at = """--model.at '["blocks", "stages[-1]"]'"""
    run_cli(tiny("fit", f"{two} {at} --trainer.limit_train_batches 1"))
    model = visattn.load(tmp_path / "runs/quickstart/version_0/model")
    assert [type(i.attention).__name__ for i in visattn.insertions(model)] == ["CBAM"] * 4 + ["NonLocal"]
    assert visattn.insertions(model)[-1].attention.arguments["reduction"] == 4


def test_what_a_command_line_leaves_unset_comes_from_the_site(tmp_path):
    run_cli(tiny("fit", "--model.attention AttentionPool --model.at pool --trainer.limit_train_batches 1"))
    model = visattn.load(tmp_path / "runs/quickstart/version_0/model")
    assert model.global_pool.arguments["size"] == (1, 1)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_another_optimizer_has_its_own_defaults(optimizer):
    options = ["--model.backbone", "test_resnet", "--model.optimizer", optimizer, "--model.optimizer.lr", "0.1"]
    made = Parsed(["fit", *options]).config["fit"]["model"]["optimizer"]
    assert (made["class_path"], made["init_args"]["weight_decay"]) == (f"torch.optim.{optimizer}", 0)


def test_a_network_takes_the_backbone_apart(tmp_path):
    network = "--model.network AttentionBranchNetwork --model.network.kernel_size 3"
    run_cli(tiny("fit", f"{network} --model.attention null --trainer.limit_train_batches 1"))
    model = visattn.load(tmp_path / "runs/quickstart/version_0/model")
    assert type(model) is AttentionBranchNetwork
    assert model.arguments["kernel_size"] == 3
    assert (model.num_classes, len(model.labels)) == (10, 10)


def test_trained_weights_say_how_images_are_prepared(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: seen.setdefault("model", model))
    run_cli(
        tiny("fit", "--model.pretrained true --model.backbone test_resnet.r160_in1k --trainer.limit_train_batches 1")
    )
    assert seen
    transform = visattn.load(tmp_path / "runs/quickstart/version_0/model").transform
    assert transform.input_size == (3, 32, 32)
    assert (transform.crop_pct, transform.interpolation) == (0.95, "bilinear")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--model.backbone resnt18", "backbone 'resnt18' is not known to timm; close: resnet18, .*"),
        ("--model.attention CBAMM", "model.attention: there is no 'CBAMM', but CBAM, BAM"),
        ("--model.attention visattn.CBAMM", "model.attention: there is no 'CBAMM', but CBAM, BAM"),
        ("--model.attention CBAM --model.attention.reductoin 8", "model.attention: CBAM has no option 'reductoin'"),
        ("--model.attention CBAM --model.attention.reduction two", "model.attention: .*reduction.*Expected a int.*two"),
        ("--model.attention.reduction 999", "reduction must lie between 1 and channels=.*, got 999"),
        ("--model.atention CBAM", "unrecognized arguments: --model.atention CBAM"),
        ("--model.at nowhere", "at='nowhere' matches no module; .*"),
        ("--model.network CBAM", "model.network: there is no 'CBAM', but AttentionBranchNetwork, .*PoolNetwork, .*"),
        ("--model.gate idnetity", "model.gate: must be one of \\['identity'\\] or null, got idnetity"),
        ("--trainer.max_epochs two", "trainer.max_epochs: must be int or null, got two"),
        ("--data.root nowhere/", "root must be a folder, .*'nowhere/' does not exist"),
        ("--ckpt_path last", "ckpt_path=last: no run in runs/quickstart has a last checkpoint"),
        ("--ckpt_path nowhere.ckpt", "ckpt_path=nowhere.ckpt: there is no such file"),
        ("--config nowhere.yaml", '.*"config": File does not exist: .*nowhere.yaml.*'),
    ],
)
def test_an_error_is_one_line(more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_cli(tiny("fit", more))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(f"error: {message}", last), last


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("VISATTN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is not known to timm"):
        run_cli(tiny("fit", "--model.backbone resnt18"))


def test_an_error_without_words_is_named():
    assert one_line(KeyError()) == "KeyError()"


# --- names of files ---------------------------------------------------------------------------------------------------


def test_packaged_configurations_are_found_by_name(tmp_path):
    packaged = str(ROOT / "configs/quickstart.yaml")
    assert with_packaged_configs(["fit", "--config", "quickstart.yaml"]) == ["fit", "--config", packaged]
    assert with_packaged_configs(["fit", "--config=quickstart.yaml"]) == ["fit", f"--config={packaged}"]
    assert with_packaged_configs(["fit", "-c", "x/quickstart.yaml"]) == ["fit", "-c", "x/quickstart.yaml"]
    assert with_packaged_configs(["quickstart.yaml"]) == ["quickstart.yaml"]
    (tmp_path / "quickstart.yaml").touch()
    assert with_packaged_configs(["fit", "--config", "quickstart.yaml"]) == ["fit", "--config", "quickstart.yaml"]


def test_the_task_is_the_last_that_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("task: Verification\n")
    (tmp_path / "b.yaml").write_text("data: {root: digits}\n")
    (tmp_path / "c.yaml").write_text("- no\n- mapping\n")
    assert task_of(["fit"]) is task_of(["fit", "--config", "b.yaml"]) is Classification
    assert task_of(["fit", "--config", "a.yaml", "-c", "b.yaml"]) is task_of(["fit", "--config=a.yaml"]) is Verification
    assert task_of(["fit", "--config", "a.yaml", "--task", "Classification"]) is Classification
    assert task_of(["fit", "--task=Verification", "--config", "c.yaml", "--config"]) is Verification
    assert task_of(["fit", "--config", "nowhere.yaml", "--task", "visattn.tasks.Verification"]) is Verification


@pytest.mark.slow
def test_a_refused_resumption_leaves_its_run_as_it_was(tmp_path, capsys):
    run_cli(tiny("fit", "--trainer.default_root_dir runs"))
    config = Path("runs/version_0/config.yaml").read_bytes()
    assert "the model is in runs/version_0/model" in capsys.readouterr().out
    other = "--trainer.default_root_dir runs --ckpt_path last --model.backbone resnet18"
    with pytest.raises(SystemExit):
        run_cli(tiny("fit", other))
    assert "the checkpoint holds backbone 'test_resnet', the model has 'resnet18'" in capsys.readouterr().err
    assert Path("runs/version_0/config.yaml").read_bytes() == config
    Path("runs/version_0/checkpoints/last.ckpt").write_bytes(b"PK damaged")
    with pytest.raises(SystemExit):
        run_cli(tiny("fit", "--trainer.default_root_dir runs --ckpt_path last"))
    assert "last.ckpt is damaged or no checkpoint" in capsys.readouterr().err


def test_what_was_never_trained_is_not_tested(capsys):
    with pytest.raises(SystemExit):
        run_cli(tiny("test"))
    assert "error: ckpt_path must be given to test: best, last or a file" in capsys.readouterr().err


def test_many_labels_are_judged_by_their_mean_precision(tmp_path):
    rows = ["filename,labels"]
    for number in range(24):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)).save(f"{number}.png")
        rows.append(f"{number}.png,{'red|blue' if number % 2 else 'blue' if number % 3 else 'red'}")
    Path("labels.csv").write_text("\n".join(rows) + "\n")
    run_cli(
        shlex.split(
            f"fit --model.backbone test_resnet --data.root {tmp_path} --data.size 32 --data.batch_size 8"
            f" --data.workers 0 --trainer.max_epochs 1 --trainer.accelerator cpu --trainer.default_root_dir runs{QUIET}"
        )
    )
    model = visattn.load("runs/version_0/model")
    assert model.task == "multi-label classification"
    assert sorted(model.labels) == ["blue", "red"]
    assert Path("runs/version_0/checkpoints/best.ckpt").is_file()


def test_last_is_that_of_the_newest_run(tmp_path):
    for number in (2, 10):
        (tmp_path / f"version_{number}/checkpoints").mkdir(parents=True)
        (tmp_path / f"version_{number}/checkpoints/last.ckpt").touch()
    (tmp_path / "version_11/checkpoints").mkdir(parents=True)
    file = find_checkpoint("last", tmp_path)
    assert file == tmp_path / "version_10/checkpoints/last.ckpt"
    assert run_of(file) == (tmp_path, 10)
    assert run_of(tmp_path / "last.ckpt") is run_of(None) is None


# --- processes that end and processes that are two --------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    finish(start(tiny("fit", "--trainer.default_root_dir whole --model.mixup 0.2", epochs=4)))
    parts = tiny("fit", "--trainer.default_root_dir parts --model.mixup 0.2", epochs=4)
    process = start(parts)
    wait_for(tmp_path / "parts/version_0/checkpoints/last.ckpt", process)
    process.kill()
    process.communicate()
    finish(start([*parts, "--ckpt_path", "last"]))
    whole, resumed = (
        torch.load(tmp_path / f"{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = start(tiny("fit", epochs=100))
    wait_for(tmp_path / "runs/quickstart/version_0/checkpoints/last.ckpt", process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1, said
    command = re.search(r"go on: python (.*)", said)
    assert command, said
    visattn.load(tmp_path / "runs/quickstart/version_0/model")
    script, *arguments = shlex.split(command[1])
    assert script == str(ROOT / "train.py")
    checkpoint = torch.load(arguments[-1], weights_only=True)
    finish(start([*arguments, "--trainer.max_epochs", str(checkpoint["epoch"] + 2)]))
    last = torch.load(tmp_path / "runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] > checkpoint["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGUSR1, ""),
        (signal.SIGTERM, f"--config {ROOT}/configs/scale/ddp.yaml --trainer.devices 2"),  # told to one of the two
    ],
    ids=["one", "two"],
)
def test_processes_that_are_told_to_end_save_and_say_so_by_their_code(number, more, tmp_path):
    process = start(tiny("fit", more, epochs=100))
    wait_for(tmp_path / "runs/quickstart/version_0/checkpoints/last.ckpt", process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert (tmp_path / "runs/quickstart/version_0/checkpoints/interrupted.ckpt").is_file()


def test_a_batch_is_shared_by_all_processes(tmp_path):
    run_cli(tiny("fit", "--total_batch 16 --trainer.accumulate_grad_batches 2 --scale_lr linear"))
    run = tmp_path / "runs/quickstart/version_0"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5  # 80 images by 16
    assert yaml.safe_load((run / "config.yaml").read_text())["total_batch"] == 16


@pytest.mark.parametrize(("more", "level"), [("", "high"), ("--matmul_precision medium", "medium")])
def test_matrix_products_are_as_exact_as_asked(more, level):
    before = torch.get_float32_matmul_precision()
    try:
        run_cli(tiny("fit", f"{more} --trainer.max_steps 1 --trainer.limit_val_batches 0"))
        assert torch.get_float32_matmul_precision() == level
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused():
    assert share(12, 3, 2) == 2
    with pytest.raises(ValueError, match=r"total_batch must be a multiple of 6, for 3 processes .*=2, got 64"):
        share(64, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "more"),
    [("ddp", ""), ("fsdp2", "--trainer.strategy.init_args.data_parallel_size 2"), ("bf16", "")],
)
def test_an_engine_is_stacked_on_a_configuration(engine, more, tmp_path):
    more = f"--config {ROOT}/configs/scale/{engine}.yaml --trainer.devices 2 {more}"
    finish(start(tiny("fit", more)))
    run = tmp_path / "runs/quickstart/version_0"
    assert "on 2 × cpu" in (run / "model/card.md").read_text()
    assert visattn.load(run / "model")(torch.randn(1, 1, 32, 32)).isfinite().all()
    assert yaml.safe_load((run / "environment.yaml").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "accelerator",
    ["cpu", pytest.param("gpu", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
)
def test_two_processes_train_together(accelerator, tmp_path):
    more = f"--trainer.accelerator {accelerator} --trainer.devices 2 --trainer.strategy ddp"
    more += " --trainer.sync_batchnorm true" if accelerator == "gpu" else ""
    finish(start(tiny("fit", more, epochs=2)))
    assert [path.name for path in (tmp_path / "runs/quickstart").iterdir()] == ["version_0"]
    run = tmp_path / "runs/quickstart/version_0"
    assert (
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    )  # 80 images, 2 × 16, the rest dropped
    assert f"on 2 × {'cuda' if accelerator == 'gpu' else 'cpu'}" in (run / "model/card.md").read_text()
    finish(start(tiny("test", f"{more} --ckpt_path last")))
    rows = (run / "per_class.csv").read_text().splitlines()[1:]
    assert sum(int(row.rpartition(",")[2]) for row in rows) == 40
