"""What a training takes: parameters, multiply-adds, memory and time, measured in a few steps on one device."""

import logging
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from visattn.data.images import Images
from visattn.tasks.base import parts
from visattn.tasks.command_line import EXPECTED, CommandLine

COUNTED, HELD, STEPS = 1, 4, 7  # in the first operations are counted, up to the fourth memory, then time is taken
ON_CPU = 8  # images, of which a step takes seconds


@dataclass
class Step:
    """What a step of training took on one device; memory in bytes."""

    batch: int
    images: int
    """Of an epoch."""
    parameters: int = 0
    trained: int = 0
    macs: int = 0
    """Multiply-adds of the forward."""
    weights: int = 0
    """Parameters and buffers."""
    divisible: int = 0
    """Parameters alone, which FSDP divides."""
    gathered: int = 0
    """Parameters that FSDP has whole at a time: those outside of its parts, and two parts."""
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    """Averaged weights."""
    activations: int = 0
    """The batch, and what the forward keeps for the backward."""
    seconds: float = 0.0


@dataclass
class Plan:
    """What a step takes for any batch: two measured ones, and a line through them."""

    few: Step
    many: Step
    batch: int
    """Images on a device that the training asks for."""

    def __post_init__(self) -> None:
        if self.few.batch >= self.many.batch:
            raise ValueError(f"few must be a smaller batch than many, got {self.few.batch} and {self.many.batch}")

    @property
    def per_image(self) -> float:
        """Bytes of activations that an image brings."""
        return (self.many.activations - self.few.activations) / (self.many.batch - self.few.batch)

    def activations(self, batch: int) -> int:
        return round(self.many.activations + (batch - self.many.batch) * self.per_image)

    def memory(self, batch: int, *, gpus: int = 1, divided: bool = False) -> dict[str, int]:
        """Return bytes on each device, by what they hold.

        Args:
            batch: Images on a device.
            gpus: How many there are.
            divided: Whether they divide parameters, gradients and the optimizer's memory (FSDP), or not (DDP).
        """
        step = self.many
        share = gpus if divided else 1
        whole = step.gathered if divided and gpus > 1 else 0
        return {
            "weights": step.weights - step.divisible + step.divisible // share + whole,
            "gradients": step.gradients // share + (whole * step.gradients // max(1, step.divisible)),
            "optimizer": step.optimizer // share,
            "averaged weights": step.average,
            "activations": self.activations(batch),
        }

    def largest(self, memory: float, *, gpus: int = 1, divided: bool = False) -> int:
        """Return the largest batch on a device with so many bytes; 0 where none fits."""
        fixed = sum(self.memory(0, gpus=gpus, divided=divided).values())
        return max(0, int((memory - fixed) / max(self.per_image, 1.0)))

    def epoch(self, gpus: int = 1) -> float:
        """Return the seconds of an epoch, were all devices like this one and nothing else took time."""
        return self.many.seconds / self.many.batch * self.many.images / gpus


class Planned(CommandLine):
    """Makes task, data and a trainer of one device, whatever the configuration trains on, and leaves no run."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        here = {
            "strategy": "auto",
            "accelerator": "auto",
            "devices": 1,
            "num_nodes": 1,
            "plugins": None,
            "logger": None,
        }
        for name, value in here.items():
            self.config["fit"]["trainer"][name] = value
        self.config["fit"]["ckpt_path"] = None

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.pretrained = False
        for name in {"pretrained", "compile"} & self.model.hparams.keys():
            self.model.hparams[name] = False

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init["fit"]["trainer"]
        kept = ("accelerator", "devices", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic")
        callbacks: list[Callback] = [each for each in config["callbacks"] or [] if isinstance(each, WeightAveraging)]
        return pl.Trainer(
            **{name: config[name] for name in kept},
            callbacks=callbacks,
            max_steps=STEPS,
            max_epochs=STEPS,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Noise(pl.LightningDataModule):
    """Images with labels of the size that other data has, where that data is not at hand.

    Args:
        data: The other data.
        classes: How many classes it has.
        images: How many images an epoch of it has.
    """

    labels = None
    multi_label = False

    def __init__(self, data: Images, classes: int, images: int):
        super().__init__()
        self.num_classes, self.images, self.batch_size = classes, images, data.batch_size
        self.in_chans = data.channels or 3
        self.input_size = (self.in_chans, *(data.size or (224, 224)))
        self.preprocess = None

    def train_dataloader(self) -> DataLoader:
        count = self.batch_size * STEPS
        pixels = torch.randn(1, *self.input_size).expand(count, -1, -1, -1)
        return DataLoader(TensorDataset(pixels, torch.arange(count) % self.num_classes), self.batch_size)


class Probe(Callback):
    """Fills in what steps take."""

    def __init__(self, step: Step):
        self.step = step
        self.number = 0
        self.within = ExitStack()
        self.taken: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        network, step = pl_module.model, self.step
        step.parameters = sum(p.numel() for p in network.parameters())
        step.trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        step.divisible = held(pl_module.parameters())
        step.weights = step.divisible + held(pl_module.buffers())
        if any(isinstance(each, WeightAveraging) for each in trainer.callbacks):
            step.average = step.weights
        own = owned(network)
        step.gathered = own[-1] + 2 * max(own[:-1], default=0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.number += 1
        if self.number == COUNTED:
            self.flops = self.within.enter_context(FlopCounterMode(display=False))
        elif self.number <= HELD:
            self.saved = Saved([*pl_module.parameters(), *pl_module.buffers()])
            self.saved.add(tensors(batch))
            self.within.enter_context(self.saved)
        self.began = now(trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.within.close()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.step.gradients = held(p.grad for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.number > HELD:
            self.taken.append(now(trainer) - self.began)
        elif self.number > COUNTED:
            self.step.activations = max(self.step.activations, self.saved.total)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.optimizers[0].state.values()
        self.step.optimizer = held(value for each in state for value in each.values() if isinstance(value, Tensor))
        self.step.macs = self.flops.get_total_flops() // 2 // self.step.batch
        self.step.seconds = statistics.median(self.taken)
        loader = trainer.train_dataloader
        self.step.images = getattr(trainer.datamodule, "images", None) or len(loader.dataset)


class Saved(saved_tensors_hooks):
    """Adds up what is kept for the backward, each piece of memory once.

    Args:
        known: Tensors that are there anyway.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__(self.pack, lambda tensor: tensor)
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        self.add([tensor])
        return tensor

    def add(self, kept: Iterable[Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in kept]
        self.sizes |= {each._cdata: each.nbytes() for each in storages if each._cdata not in self.known}

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def plan(
    arguments: Sequence[str], *, batch: int | None = None, classes: int | None = None, images: int | None = None
) -> Plan:
    """Train for a few steps, with ``batch`` images each and with half as many, and return what they took.

    Args:
        arguments: Those of a training, such as ``["--config", "quickstart.yaml"]``.
        batch: Images of the larger measured batch; left out, as many as the training has, on a CPU at most 8.
        classes: Where the data is not at hand: how many classes it has.
        images: The same for images.

    Raises:
        ValueError: If ``batch`` is odd or not positive, or noise cannot stand for the data.
    """
    if batch is not None and (batch < 2 or batch % 2):
        raise ValueError(f"batch must be even and at least 2, got {batch}")
    if (classes is None) != (images is None):
        raise ValueError(f"classes and images must be given together, got {classes} and {images}")
    with quiet():
        first = Planned(["fit", *arguments])
        asked = first.datamodule.batch_size
        most = asked if torch.cuda.is_available() else min(asked, ON_CPU)
        batch = batch or max(2, most // 2 * 2)
        few = measured(first, batch // 2, classes, images)
        return Plan(few, measured(Planned(["fit", *arguments]), batch, classes, images), asked)


@contextmanager
def quiet() -> Iterator[None]:
    """Have Lightning say nothing of a training that is none."""
    log = logging.getLogger("pytorch_lightning")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in (*EXPECTED, ".*have no `val_dataloader`"):  # noise is not validated
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            log.setLevel(level)


def measured(made: Planned, batch: int, classes: int | None, images: int | None) -> Step:
    """Train for a few steps, and return what the last ones took."""
    data, step = made.datamodule, Step(batch, images or 0)
    data.batch_size, data.workers = batch, 0
    if getattr(data, "cache", None):
        data.cache = None
    if classes is not None and images is not None:
        if type(data) is not Images:
            raise ValueError(f"classes must be left out for {type(data).__name__}, for which noise cannot stand")
        data = Noise(data, classes, images)
    trainer: Any = made.trainer
    trainer.callbacks.append(Probe(step))
    trainer.fit(made.model, datamodule=data)
    return step


def owned(network: nn.Module) -> list[int]:
    """Return the bytes of the parameters of each part that FSDP2 gathers at once, those of inner parts left out."""
    seen: set[int] = set()
    found = []
    for part in parts(network):
        mine = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in mine}
        found.append(held(mine))
    return found


def held(each: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each piece of memory once."""
    storages = [tensor.untyped_storage() for tensor in each]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, however it is made."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def now(trainer: pl.Trainer) -> float:
    """Return the time when the device has done all it was told."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
