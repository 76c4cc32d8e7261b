"""What all tasks have in common: optimisation, steps that can be repeated, checkpoints that name but never run."""

import inspect
import math
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property, partial, wraps
from itertools import chain, zip_longest
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import pytorch_lightning as pl
import timm
import torch
import torch.distributed as dist
from jaxtyping import Float
from pytorch_lightning.cli import LightningCLI, ReduceLROnPlateau
from pytorch_lightning.plugins import MixedPrecision, Precision
from pytorch_lightning.utilities import GradClipAlgorithmType
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from visattn import attention
from visattn.attention import Attention
from visattn.attention.memory.core import MemoryAttention
from visattn.checkpoint import describe
from visattn.data.transforms import Preprocess
from visattn.data.vocabulary import Vocabulary
from visattn.surgery import insertions
from visattn.tasks.run import RunError

PART = 1_000_000  # parameters, fewer of which are not worth a message of their own


class Task(pl.LightningModule):
    """A network, ``model``, that a subclass builds in ``configure_model``, and what it is trained for.

    A subclass saves its arguments as hyperparameters, among them ``warmup`` and, where it has a ``backbone``, also
    ``backbone_args``. It writes :meth:`training_loss`, Lightning's other steps, and :attr:`described`.

    Without ``schedule``, the learning rate rises linearly during the first part of all steps and falls to zero along a
    cosine. Norms, biases and gates have no weight decay.

    Args:
        optimizer: An optimizer with its options; None: AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch.
        pretrained: Whether the network starts with trained weights.
    """

    data: ClassVar[tuple[type[pl.LightningDataModule], ...]]
    """What the command line can train it on; the first, where nothing else is said."""
    monitor: ClassVar[str]
    """The metric of which the command line keeps the best, greatest, state."""
    classes: ClassVar[dict[str, ModuleType]] = {"optimizer": torch.optim, "schedule": torch.optim.lr_scheduler}
    """Arguments that are classes, and where a checkpoint may take them from."""

    scale_lr: Literal["linear", "root"] | None = None
    """Whether learning rates are those given times the number of processes, or times its square root."""

    model: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "configure_model" in vars(cls):
            cls.configure_model = sharding(cls.configure_model)  # type: ignore[method-assign]

    def __init__(
        self,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None,
        pretrained: bool,
    ):
        super().__init__()
        # not a default of subclasses: there the command line would hand its options on to another optimizer
        self.optimizer = optimizer or AdamW
        self.schedule = schedule
        self.pretrained = pretrained
        self.labels: list[str] | None = None
        self.vocabulary: Vocabulary | None = None
        self.preprocess: Preprocess | None = None
        self.description: dict[str, Any] | None = None

    def remember(self, **options: Any) -> None:
        """Note how to optimise, and what else is a class, in the hyperparameters, as a checkpoint may hold it."""
        classes = options | {"optimizer": self.optimizer, "schedule": self.schedule}
        self.hparams.update({name: _named(make, name) for name, make in classes.items()})

    def expects(self) -> Preprocess | None:
        """Return what the trained weights of the backbone expect of an image; None where it starts with none."""
        if not self.pretrained:
            return None
        with torch.device("meta"):  # only what it says of itself is asked, not its weights
            return Preprocess.of(timm.create_model(self.hparams["backbone"], **(self.hparams["backbone_args"] or {})))

    def options(self, network: Any, known: dict[str, Any]) -> dict[str, Any]:
        """Complete the options of a network, in the hyperparameters, by what is known, unless they say otherwise."""
        options, parameters = self.hparams["network"]["init_args"], inspect.signature(found_class(network)).parameters
        for name, value in known.items():  # a command line gives all options, those left unset as well
            if name in parameters and options.get(name, parameters[name].default) == parameters[name].default:
                options[name] = value
        return options

    def log(self, name: str, value: Any, *, batch_size: int | float | None = None, **options: Any) -> None:  # type: ignore[override]
        # no integer, of which Lightning would round down the mean over processes
        super().log(name, value, batch_size=None if batch_size is None else float(batch_size), **options)  # type: ignore[arg-type]

    # --- steps --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit":  # moments that fade away would in time make a step on the CPU three times as slow
            torch.set_flush_denormal(True)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            torch.set_flush_denormal(False)

    def on_train_start(self) -> None:
        loop: Any = self.trainer.fit_loop
        states, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
        if states or self.current_epoch:  # workers began before it was known what is resumed: the schedule counts steps
            loop._combined_loader._load_state_dicts(states)
            for loader in loop._combined_loader.flattened:
                if hasattr(getattr(loader, "sampler", None), "set_epoch"):
                    loader.sampler.set_epoch(self.current_epoch)
            iter(loop._data_fetcher)
        self.anneal()  # which epoch it is within, a resumed run is told by nobody else

    def on_train_epoch_start(self) -> None:
        self.anneal()

    def anneal(self) -> None:
        """Bring modules that change with time to where they are in this epoch."""
        epochs = self.trainer.max_epochs or -1  # -1 where steps are counted
        for module in self.model.modules():
            if hasattr(module, "anneal"):  # over the first 10 epochs, or half of a shorter run
                module.anneal(self.current_epoch / (min(10, epochs / 2) if epochs > 0 else 10))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if seed := os.environ.get("PL_GLOBAL_SEED"):  # so that a resumed run draws what an uninterrupted one would
            place = (int(seed), self.current_epoch, batch_idx, self.global_rank)
            drawn = [int(number) for number in np.random.SeedSequence(place).generate_state(2)]
            alone = self.device.type == "cpu"  # torch.manual_seed writes down the stack for GPUs that are yet to start
            (torch.default_generator.manual_seed if alone else torch.manual_seed)(drawn[0])
            random.seed(drawn[0])
            np.random.seed(drawn[1])  # noqa: NPY002 - what timm's Mixup draws from

    @cached_property
    def penalised(self) -> dict[str, "Penalised"]:
        """What collects the penalties, by the names of the modules; the same in every step, as compilers want it."""
        found = {
            n: m
            for n, m in self.model.named_modules()
            if hasattr(m, "penalty") and isinstance(m, Attention) and not isinstance(m, MemoryAttention)
        }
        names = {n: n.removeprefix("visattn.").removesuffix(".attention").replace("__", ".") for n in found}
        return {names[n]: Penalised(module) for n, module in found.items()}

    def training_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with _penalties(self.penalised) as penalties:
            loss = self.training_loss(batch)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        if penalties:
            penalty = torch.stack(list(penalties.values())).sum()
            self.log("train/penalty", penalty)
            self.log_dict({f"penalty/{name}": value for name, value in penalties.items()})
            loss = loss + self.hparams.get("penalty_factor", 1.0) * penalty
        if not loss.isfinite():
            raise RunError(f"loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch})")
        return loss

    def on_validation_start(self) -> None:
        gather(self, whole=True)

    def on_validation_end(self) -> None:
        gather(self, whole=False)

    def on_test_start(self) -> None:
        gather(self, whole=True)

    def on_predict_start(self) -> None:
        gather(self, whole=True)

    @contextmanager
    def repeatable(self, batch_idx: int) -> Iterator[None]:
        """Draw the same numbers in every evaluation, and none from where the training draws."""
        with isolate_rng():
            torch.manual_seed(batch_idx * self.trainer.world_size + self.global_rank)
            yield

    # --- optimization -------------------------------------------------------------------------------------------------

    def beside(self) -> dict[str, nn.Module]:
        """Return what learns beside the network, for the sake of its training alone, by name."""
        return {}

    def configure_optimizers(self) -> Any:
        beside = self.beside()
        modules = chain(self.model.modules(), *(each.modules() for each in beside.values()))
        named = chain(self.model.named_parameters(), *(each.named_parameters(name) for name, each in beside.items()))
        looks = [module for module in modules if isinstance(module, Attention)]
        ours = {id(p) for part in (*insertions(self.model), *looks) for p in part.parameters()}
        exempt = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, p in named:
            if p.requires_grad:
                decays = p.ndim > 1 and not name.endswith("bias") and name not in exempt
                groups[id(p) in ours, decays].append(p)
        optimizer = self.optimizer(
            [{"params": params} | ({} if decays else {"weight_decay": 0.0}) for (_, decays), params in groups.items()]
        )
        rate = self.trainer.world_size ** {None: 0.0, "root": 0.5, "linear": 1.0}[self.scale_lr]
        for (attends, _), group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] *= rate
            if attends:
                group["lr"] *= self.hparams.get("attention_lr_factor", 1.0)
        if self.schedule:
            return LightningCLI.configure_optimizers(self, optimizer, self.schedule(optimizer))
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "max_epochs or max_steps must be set: without schedule, the learning rate falls until the end"
            )
        warmup = round(self.hparams["warmup"] * steps)
        schedule = LambdaLR(optimizer, partial(warmup_cosine, steps=int(steps), warmup=warmup))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            # Lightning refuses fused optimizers, which undo the scaling of gradients by themselves; bfloat16 has none
            how = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, how)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def described(self) -> dict[str, Any]:
        """What ``visattn.save`` is told beside the network."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.description is None:
            self.description = describe(self.model, **self.described)
        checkpoint["visattn"] = self.description

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as Lightning does; classes that are neither this package's nor torch's are given as options."""
        held = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
        made = {
            name: _called(held.get(name), module, name) for name, module in cls.classes.items() if name not in kwargs
        }
        return super().load_from_checkpoint(checkpoint_path, *args, **made | kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        theirs, backbone = (h.get("backbone") for h in (checkpoint.get("hyper_parameters", {}), self.hparams))
        if theirs is not None and theirs != backbone:
            raise ValueError(f"the checkpoint holds backbone {theirs!r}, the model has {backbone!r}")
        block = checkpoint.get("visattn", {}).get("visattn", {})
        words = block.get("vocabulary")
        if self.vocabulary is not None and words is not None and words != self.vocabulary.state:
            difference = unlike(Vocabulary.load(words), self.vocabulary)
            raise ValueError(f"the checkpoint has other words than the data: {difference}")
        states = self.state_dict(), checkpoint.get("state_dict", self.state_dict())  # a divided network has loaded it
        mine, other = ({k: v.shape for k, v in d.items()} for d in states)
        if different := sorted(k for k in mine.keys() | other.keys() if mine.get(k) != other.get(k)):
            name = different[0]
            shapes = [tuple(d[name]) if name in d else "absent" for d in (other, mine)]
            raise ValueError(
                f"the checkpoint holds another network than this {backbone or type(self.model).__name__}: "
                f"{name} is {shapes[0]} there and {shapes[1]} here ({len(different)} differ)"
            )
        if self.labels is not None and block.get("labels") is not None and list(self.labels) != block["labels"]:
            there, here = next(pair for pair in zip(block["labels"], self.labels, strict=True) if pair[0] != pair[1])
            raise ValueError(f"the checkpoint has other labels than the data: {there!r} where the data has {here!r}")
        self.labels = self.labels or block.get("labels")
        if self.preprocess is None and block.get("transform"):
            self.preprocess = Preprocess(**block["transform"])
        if loop := checkpoint.get("loops", {}).get("fit_loop"):
            _to_next_epoch(loop)
            for loader in loop["state_dict"].get("combined_loader", []):  # a batch given may not have been trained on
                loader["batches"] = loop["epoch_loop.batch_progress"]["current"]["processed"]


def sharding(configure: Callable[..., None]) -> Callable[..., None]:
    """Have what a task builds divided among devices, where Lightning's ``ModelParallelStrategy`` is.

    What is not in a large part is gathered for a whole step, which may call any method of the network; but not the
    task itself (it calls its ``forward``), as that would gather for less.
    """

    @wraps(configure)
    def configured(task: Any) -> None:
        whole = type(task).configure_model is configured  # else a subclass has more to do
        configure(task)
        if whole and task.device_mesh is not None and not isinstance(task, FSDPModule):
            task.to(task.trainer.strategy.root_device)
            for part in [*parts(task.model)[:-1], task]:
                fully_shard(part, mesh=task.device_mesh["data_parallel"])
            for step in ("training_step", "validation_step", "test_step", "predict_step"):
                register_fsdp_forward_method(task, step)

    return configured


def gather(task: nn.Module, whole: bool) -> None:
    """Have all that was divided on each device, or no longer: in evaluation processes may differ in their batches."""
    for part in task.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(not whole and part is not task, recurse=False)
            part.unshard() if whole else part.reshard()


def parts(network: nn.Module) -> list[nn.Module]:
    """Return what FSDP2 gathers at once, inner parts first: large steps of sequences, and the network with the rest."""
    steps = [step for sequence in network.modules() if isinstance(sequence, nn.Sequential) for step in sequence]
    large = [step for step in dict.fromkeys(steps) if sum(p.numel() for p in step.parameters()) >= PART]
    return [*reversed(large), network]


def mean_over_ranks(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the mean of what all processes have.

    A sum divided by that of a count has, in the mean over processes, the gradient of the mean over all that is counted.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def unlike(there: Vocabulary, here: Vocabulary) -> str:
    """Say in which word two vocabularies differ first."""
    both = ([repr(each.word(number)) for number in range(len(each))] for each in (there, here))
    for number, (one, other) in enumerate(zip_longest(*both, fillvalue="absent")):
        if one != other:
            return f"word {number} is {one} there and {other} here"
    return "captions are cut into the same words in another way"


def known_to_timm(backbone: str) -> None:
    """Raise a ``ValueError`` that names what is close, if timm knows no such backbone."""
    if ":" not in backbone and not timm.is_model(backbone.partition(".")[0]):
        close = ", ".join(get_close_matches(backbone, timm.list_models(), n=3))
        hint = f"close: {close}" if close else "timm.list_models() lists the names"
        raise ValueError(f"backbone {backbone!r} is not known to timm; {hint}")


def _to_next_epoch(loop: dict[str, Any]) -> None:
    """Have Lightning's loop, saved at the end of an epoch or at the start of one, begin the next.

    Else it takes that start for a whole epoch, and where steps are counted goes through an empty one.
    """
    epochs = loop["epoch_progress"]
    if epochs["current"]["started"] != epochs["current"]["processed"]:
        return  # within one
    for count in epochs.values():
        count["ready"] = count["completed"] = count["processed"]

    def clear(progress: dict[str, Any]) -> None:
        for name, value in progress.items():
            if name == "current":
                value.update(dict.fromkeys(value, 0))
            elif name == "is_last_batch":
                progress[name] = False
            elif isinstance(value, dict):
                clear(value)

    clear({name: value for name, value in loop.items() if name.startswith("epoch_loop.")})


@contextmanager
def trained_weights(backbone: str) -> Iterator[None]:
    """Say in words why the trained weights of a backbone cannot be had."""
    config = timm.get_pretrained_cfg(backbone) if ":" not in backbone else None
    if config and not config.has_weights:
        raise ValueError(f"pretrained must be false for backbone {backbone!r}: timm has no weights of it")
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the trained weights of backbone {backbone!r} cannot be had ({str(error).splitlines()[0]}); "
            f"without a network give pretrained=false, or local-dir:FOLDER as backbone"
        ) from error


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: up linearly in ``warmup`` steps, then down a cosine to 0 at ``steps``.

    Example:
        >>> [round(warmup_cosine(step, steps=6, warmup=2), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))))


class Penalised:
    """Stands before the ``attend`` of a module in a step of training, and sums its penalties on what that returns."""

    def __init__(self, module: Any):
        self.module = module
        self.penalty: Tensor | None = None

    def __call__(self, *inputs: Any) -> Any:
        weights = type(self.module).attend(self.module, *inputs)
        penalty = self.module.penalty(weights)
        self.penalty = penalty if self.penalty is None else self.penalty + penalty
        return weights


@contextmanager
def _penalties(penalised: dict[str, Penalised]) -> Iterator[dict[str, Tensor]]:
    """Collect, by name of the module, what modules with ``penalty`` say of the weights they find in a forward."""
    found: dict[str, Tensor] = {}
    for each in penalised.values():
        each.module.__dict__["attend"] = each
    try:
        yield found
        for name, each in penalised.items():
            if each.penalty is None:
                raise RunError(f"{name} has a penalty on its weights, but its forward does not call attend")
            found[name] = each.penalty
    finally:
        for each in penalised.values():
            del each.module.__dict__["attend"]
            each.penalty = None


def found_class(make: Any, what: str = "network") -> type:
    """Return the class that a class, or ``functools.partial`` of one with options by name, makes."""
    parts: list[Any] = [make]
    while isinstance(parts[0], partial):
        parts = [parts[0].func, *parts[0].args]
    cls = next((part for part in reversed(parts) if isinstance(part, type)), None)
    if cls is None:
        raise ValueError(
            f"{what} must be a class or functools.partial of one, so that a checkpoint can name it, got {make!r}"
        )
    if parts[-1] is not cls:
        raise ValueError(f"{what} must have its options by name, for a checkpoint to hold them, got {make!r}")
    return cls


def plainly(make: Any, what: str) -> Any:
    """Return a class, or whatever makes one, as ``functools.partial`` of it; so also what is among its options."""
    cls = found_class(make, what)
    options: dict[str, Any] = {}
    while isinstance(make, partial):
        options = make.keywords | options
        make = make.func
    return partial(cls, **{n: plainly(v, n) if isinstance(v, (partial, type)) else v for n, v in options.items()})


def _named(make: Any, what: str) -> Any:
    """Write a class, or ``functools.partial`` of one, or several, in plain values, as a checkpoint may hold them."""
    if isinstance(make, list):
        return [_named(one, what) for one in make]
    if make is None:
        return None
    made = plainly(make, what)
    options = {n: _named(value, n) if isinstance(value, partial) else value for n, value in made.keywords.items()}
    return {"class_path": f"{made.func.__module__}.{made.func.__qualname__}", "init_args": options}


def _called(named: Any, module: ModuleType, what: str) -> Any:
    """Turn what :func:`_named` wrote into what it was. Nothing is imported because a checkpoint names it.

    Among its options, classes are attention.
    """
    if isinstance(named, list):
        return [_called(one, module, what) for one in named]
    if named is None:
        return None
    cls = getattr(module, named["class_path"].rpartition(".")[2], None)
    if not isinstance(cls, type) or f"{cls.__module__}.{cls.__qualname__}" != named["class_path"]:
        path = named["class_path"]
        raise ValueError(
            f"{what} {path!r} is not in {module.__name__}: give the class to load_from_checkpoint as {what}="
        )
    options = {
        name: _called(value, attention, name) if isinstance(value, dict) and "class_path" in value else value
        for name, value in named["init_args"].items()
    }
    return partial(cls, **options)
