"""Two processes with half the batch each train what one trains with the whole batch: tasks, by Lightning."""

import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment
from PIL import Image
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import visattn
from visattn.attention import HardAttention
from visattn.data.canvas import Canvas
from visattn.data.captions import Captions
from visattn.data.images import Images
from visattn.models import DRAW, DeepRecurrentAttention, GlanceFocus, RecurrentAttention
from visattn.models.decoders import ShowAttendAndTell
from visattn.tasks import Captioning, Classification, Focusing, Generation, Looking, base
from visattn.tasks.base import Task
from visattn.tasks.preemption import Preemption
from visattn.tasks.run import Last, Outcome, WholeFiles

ROOT = Path(__file__).parents[2]
EVALUATES = ("classification", "classes-weighted", "looking-average", "captions-words")  # without noise
STEPS, BATCH, EVALUATED = 5, 8, 17  # of 17 images one process has nine, in three batches, the other eight, in two
ENGINES: dict[str, Callable[[], Any]] = {
    "ddp": partial(DDPStrategy, process_group_backend="gloo", gradient_as_bucket_view=True),
    "fsdp2": partial(
        ModelParallelStrategy,
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo",
    ),
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


# --- noise that follows from the image --------------------------------------------------------------------------------


class Keyed(TorchDispatchMode):
    """Draws what belongs to an image from (step, image, number of the draw); rows belong to one image after another.

    The library draws from (seed, epoch, step, process), by which different numbers of processes cannot be compared.
    """

    def __init__(self, step: int, images: Tensor):
        super().__init__()
        self.keys = [(step, zlib.crc32(image.numpy().tobytes())) for image in images]
        self.draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs or {})
        self.draws += 1
        aten = torch.ops.aten
        if func is aten.rand.default:
            assert args[0] == []  # one for all images
            return torch.tensor(np.random.default_rng(self.draws).random(), dtype=torch.float32)
        if func is aten.randn_like.default:
            return self.drawn(args[0], "standard_normal")
        if func is aten.randn.default:
            steps, rows, numbers = args[0]
            return self.drawn(torch.empty(rows, steps, numbers), "standard_normal").transpose(0, 1)
        if func is aten.rand_like.default:
            return self.drawn(args[0], "random")
        if func is aten.uniform_.default:
            assert args[1:] == (-1,)  # to 1
            return args[0].copy_(2 * self.drawn(args[0], "random") - 1)
        if func is aten.exponential_.default:
            return args[0].copy_(self.drawn(args[0], "standard_exponential"))
        assert func is aten.multinomial.default, func
        below = args[0].double().cumsum(-1) / args[0].double().sum(-1, keepdim=True)
        return (below < self.drawn(below[:, :1], "random")).sum(-1, keepdim=True)

    def drawn(self, like: Tensor, kind: str) -> Tensor:
        assert len(like) % len(self.keys) == 0
        each = like.unflatten(0, (len(self.keys), -1)).shape[1:]
        tail = math.prod(each[-2:])  # what comes later, such as longer captions need, changes nothing before it
        found = [
            getattr(np.random.default_rng((*key, self.draws, place)), kind)(tail)
            for key in self.keys
            for place in range(math.prod(each[:-2]))
        ]
        return torch.from_numpy(np.stack(found)).reshape(like.shape).to(like)


class Steps(pl.Callback):
    """Keys the noise of each step, and notes the loss, its mean over processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.drawn = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.keyed = Keyed(trainer.global_step, batch[0])
        self.stack = ExitStack()
        self.stack.enter_context(self.keyed)

    def on_before_backward(self, trainer, pl_module, loss):
        self.stack.close()
        self.drawn += self.keyed.draws
        loss = loss.detach().clone()
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.losses.append(loss.item() / trainer.world_size)


# --- what is trained --------------------------------------------------------------------------------------------------


class Few(Images):
    """Digits, of which an odd number is there to evaluate with."""

    def divided(self, splits):
        splits = super().divided(splits)
        return {name: split if name == "train" else split.take(np.arange(EVALUATED)) for name, split in splits.items()}


def digits(folder: Path, batch_size: int) -> Images:
    return Few("digits", train_per_class=4, augment=True, batch_size=batch_size, workers=0)


def sequences(folder: Path, batch_size: int) -> Canvas:
    return Canvas("sequences", size=(40, 60), batch_size=batch_size)


def photos(folder: Path, batch_size: int) -> Captions:
    few = {"captions_per_image": 2, "min_count": 1, "size": 96, "pool": 1, "augment": False}
    return Captions(str(folder / "captions.csv"), str(folder / "photos"), batch_size=batch_size, workers=0, **few)


def draw_photos(folder: Path) -> None:
    """Squares of three colours, each with its own noise, and captions of two to thirteen words."""
    (folder / "photos").mkdir()
    rows, chance = ["image,caption,split"], np.random.default_rng(0)
    for k in range(BATCH * STEPS + EVALUATED):
        name, colour = list(COLOURS.items())[k % 3]
        pixels = np.clip(colour + chance.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{k}.png")
        split = "train" if k < BATCH * STEPS else "val"
        rows += [f"{k}.png,{name} {'very ' * chance.integers(11)}square,{split}" for _ in range(2)]
    (folder / "captions.csv").write_text("\n".join(rows))


def with_sgd(task: type[Task], *args: Any, lr: float, **options: Any) -> Task:
    return task(*args, optimizer=partial(SGD, lr=lr), warmup=0.0, **options)


LOOKS = partial(RecurrentAttention, width=24, glimpse_width=16, location_width=8, glimpses=3)
NAMES = partial(
    DeepRecurrentAttention, width=16, glimpse_width=16, filters=(4, 4, 8), context_filters=(4, 4, 8), glimpses=2
)
FOCUSES = partial(GlanceFocus, backbone="test_convnext", patch=32, glimpses=3, width=16, policy_width=16)
DRAWS = partial(DRAW, steps=3, width=16, latent=8)
TELLS = partial(ShowAttendAndTell, hidden=24, embedding=16, dropout=0.0, first="begin")
CLASSIFIES = {"backbone": "test_convnext", "attention": partial(visattn.AffineTransformer, view=16)}
CAPTIONS = {
    "backbone": "test_convnext",
    "decoder": TELLS,
    "width": 16,
    "beam": 2,
    "longest": 16,
    "freeze_backbone": False,
}

CASES: dict[str, tuple[Callable[[Path, int], Any], Callable[[Path], Task]]] = {
    "classification": (digits, lambda _: with_sgd(Classification, lr=0.05, **CLASSIFIES)),
    "classes-weighted": (
        digits,
        lambda _: with_sgd(
            Classification, lr=0.05, class_weights=[1.0 + k for k in range(10)], label_smoothing=0.1, **CLASSIFIES
        ),
    ),
    "looking-learned": (
        digits,
        lambda _: with_sgd(Looking, LOOKS, lr=0.05, baseline="learned", rollouts=2, policy_factor=1.0),
    ),
    "looking-average": (
        digits,
        lambda _: with_sgd(
            Looking,
            partial(LOOKS, first="centre", learned_spread=True),
            lr=0.05,
            baseline="average",
            policy_factor=1.0,
            entropy_factor=0.01,
        ),
    ),
    "looking-sequences": (sequences, lambda _: with_sgd(Looking, NAMES, lr=0.05, every_step=1.0, policy_factor=1.0)),
    "focusing": (digits, lambda _: with_sgd(Focusing, FOCUSES, lr=0.05, rollouts=2)),
    "drawing": (digits, lambda _: with_sgd(Generation, DRAWS, lr=1e-4, binarisation="static")),
    "captions-words": (photos, lambda _: with_sgd(Captioning, lr=0.5, doubly=0.01, **CAPTIONS)),
    "captions-hard": (
        photos,
        lambda _: with_sgd(
            Captioning, lr=0.5, attention=partial(HardAttention, expected=0.3), policy_factor=1.0, **CAPTIONS
        ),
    ),
    "captions-wake-sleep": (
        photos,
        lambda _: with_sgd(Captioning, lr=0.5, attention=HardAttention, learning="wake_sleep", samples=3, **CAPTIONS),
    ),
    "captions-critical": (
        photos,
        lambda folder: with_sgd(
            Captioning, lr=0.5, learning="self_critical", samples=3, start=str(folder / "captioner"), **CAPTIONS
        ),
    ),
}


def trained(case: str, folder: Path, engine: str | None = None, **options: Any) -> tuple[pl.Trainer, Task, Steps]:
    """Train in one process, or in this one of two."""
    make_data, make_task = CASES[case]
    torch.manual_seed(1)
    task, steps = make_task(folder), Steps()
    many = {"strategy": ENGINES[engine](), "devices": 2} if engine else {"devices": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        plugins=[LightningEnvironment(), WholeFiles()],
        callbacks=[steps],
        **many,
        **{"limit_val_batches": 0} | options,
    )
    trainer.fit(task, datamodule=make_data(folder, BATCH // 2 if engine else BATCH))
    return trainer, task, steps


def whole(task: Task) -> dict[str, Tensor]:
    """Return the weights, also of a network that is divided."""
    found = {name: p.detach() for name, p in task.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in found.items()}


def outcome(case: str, folder: Path, engine: str | None = None) -> dict[str, Any]:
    evaluates = case in EVALUATES
    trainer, task, steps = trained(case, folder, engine, **{"limit_val_batches": None} if evaluates else {})
    scores = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert bool(scores) == evaluates
    return {"losses": steps.losses, "drawn": steps.drawn, "weights": whole(task), "scores": scores}


def join(rank: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    base.PART = 2000  # so that small networks are divided into parts
    os.environ.pop("PL_GLOBAL_SEED", None)  # which Lightning would draw weights by, in several processes alone
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    work(rank, *arguments)
    dist.destroy_process_group()


def together(work: Callable[..., None], *arguments: Any) -> None:
    """Do something in two processes that a trainer finds started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(join, (port, work, *arguments), nprocs=2)


def outcomes(rank: int, folder: Path, engine: str) -> None:
    for case in CASES:
        found = outcome(case, folder, engine)
        if rank == 0:
            torch.save(found, folder / f"{case}.pt")


@pytest.fixture(scope="module", params=ENGINES)
def results(request, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What two processes found in all cases, one after another: to start them takes the most time."""
    folder = tmp_path_factory.mktemp(request.param)
    draw_photos(folder)
    _, task, _ = trained("captions-words", folder)
    visattn.save(task.model, folder / "captioner", **task.described)
    together(outcomes, folder, request.param)
    return folder, {case: torch.load(folder / f"{case}.pt", weights_only=True) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_and_score_what_one_does_with_both_halves(case, results):
    folder, found = results
    one, two = outcome(case, folder), found[case]
    assert len(one["losses"]) == STEPS
    assert (one["drawn"] > 0) == (case not in ("classification", "classes-weighted", "captions-words"))
    loss = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    assert one["weights"].keys() == two["weights"].keys()
    apart = {name: (weight - two["weights"][name]).abs().max().item() for name, weight in one["weights"].items()}
    print(f"{case}: losses differ by {loss:.1e}, weights by {max(apart.values()):.1e}")
    assert loss < max(1e-5, 4 * torch.finfo(torch.float32).eps * max(one["losses"]))  # hundreds of nats are rounded
    assert max(apart.values()) < 1e-5, max(apart, key=apart.__getitem__)
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-6)  # of 17 images, by one process nine
    assert bool(one["scores"]) == (case in EVALUATES)


# --- going on ---------------------------------------------------------------------------------------------------------


class Told(pl.Callback):
    """Notes losses, and has the second of two processes told to end in its third step."""

    def __init__(self, ends: bool):
        self.ends, self.losses = ends, list[float]()

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss.item())
        if self.ends and trainer.global_rank == 1 and len(self.losses) == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def divided(case: str, folder: Path, name: str, *, ends: bool = False, **options: Any) -> list[float]:
    """Train a divided network, with the library's own noise, and return the losses of this process."""
    make_data, make_task = CASES[case]
    torch.manual_seed(1)
    task, told = make_task(folder), Told(ends)
    task.optimizer = partial(SGD, lr=0.05, momentum=0.9)  # Lightning restores none that remembers nothing
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ENGINES["fsdp2"](),
        max_steps=STEPS,
        default_root_dir=folder / f"{case}-{name}",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        plugins=[LightningEnvironment(), WholeFiles()],
        callbacks=[told, Last(), Outcome(), Preemption()],
    )
    with pytest.raises(SystemExit) if ends else nullcontext():
        trainer.fit(task, datamodule=make_data(folder, BATCH // 2), **options)
    return told.losses


def interrupted(rank: int, folder: Path) -> None:
    os.environ["PL_GLOBAL_SEED"] = "3"
    for case in ("classification", "looking-learned", "captions-hard"):
        whole, first = divided(case, folder, "whole"), divided(case, folder, "parts", ends=True)
        file = folder / f"{case}-parts/checkpoints/interrupted.ckpt"
        assert len(first) == 3
        assert first + divided(case, folder, "parts", ckpt_path=file) == whole, case


@pytest.mark.slow
def test_a_divided_network_that_is_told_to_end_goes_on_with_the_same_losses(tmp_path):
    draw_photos(tmp_path)
    together(interrupted, tmp_path)


# --- a process that dies ----------------------------------------------------------------------------------------------


class Dies(pl.Callback):
    """Ends the second of two processes in its third step."""

    def __init__(self, how: str):
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            Path(os.environ["VISATTN_DIES"]).write_text(str(time.time()))
            if self.how == "raises":
                raise RuntimeError("the second process cannot go on")
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["train.py", "torchrun"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", {"train.py": "error: the second process cannot go on", "torchrun": "cannot go on"}),
        ("killed", {"train.py": "process 1 ended by SIGKILL", "torchrun": "Signal 9 (SIGKILL) received"}),
    ],
)
def test_a_process_that_dies_ends_the_others_and_says_why(how, said, launcher, tmp_path):
    options = (
        f"fit --config {ROOT}/configs/scale/ddp.yaml --model.backbone test_resnet --data.size 32 --data.workers 0"
        f" --data.train_per_class 8 --data.val_per_class 1 --data.batch_size 4 --trainer.accelerator cpu"
        f" --trainer.devices 2 --trainer.max_epochs 1 --trainer.enable_progress_bar false"
        f" --trainer.default_root_dir {tmp_path} --trainer.callbacks+=tests.tasks.test_together.Dies"
        f" --trainer.callbacks.how {how}"
    )
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 " * (launcher == "torchrun")
    command = [sys.executable, *shlex.split(f"{torchrun}{ROOT}/train.py {options}")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VISATTN_DIES": str(tmp_path / "when")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode > 0
    assert said[launcher] in done.stdout + done.stderr
    assert time.time() - float((tmp_path / "when").read_text()) < 60
