"""``fit``, ``validate``, ``test`` and ``predict``: Lightning's command line for a task, with errors of one line."""

import logging
import os
import re
import shlex
import sys
import warnings
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger

from visattn import attention, models, tasks
from visattn.data.transforms import Preprocess
from visattn.data.vocabulary import Vocabulary
from visattn.models.network import Classifier
from visattn.tasks import Task
from visattn.tasks.preemption import Preemption
from visattn.tasks.provenance import Provenance, requeued
from visattn.tasks.run import (
    CHECKPOINTS,
    Best,
    Last,
    Log,
    Outcome,
    Predictions,
    Recent,
    TimmSyncBatchNorm,
    WholeFiles,
    newest_checkpoint,
)
from visattn.tasks.waiting import Waiting

DEFAULT = "Classification"
EXPECTED = (  # warnings of Lightning about what is meant to be so
    ".*overrides the configure_model",  # the averaged copy of the weights is not sharded
    ".*overridden `on_before_batch_transfer`",  # the task checks labels there, the data does nothing
    ".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
    ".*treespec, LeafSpec",  # a deprecation in torch that Lightning has yet to follow
)


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration of a training into its folder, once what it resumes has been restored."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wait: a resumption that is refused must leave the configuration of its run as it was."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class CommandLine(LightningCLI):
    """Lightning's command line for a task: the one that ``task`` names in the configuration or behind it.

    Each training has a folder, ``version_<n>`` in ``trainer.default_root_dir``, with ``config.yaml`` (resolved),
    ``environment.yaml``, ``metrics.csv``, events for TensorBoard, ``checkpoints/`` and ``model/``. Resuming goes on in
    it, and what a test finds goes there too. A job that SLURM starts again resumes by itself.
    """

    def __init__(self, args: list[str]):
        quiet = {"exit_on_error": False}  # raise, so that errors come out in one place
        self.args = args
        self.task = task_of(with_packaged_configs(args))
        self.data_class = data_of(self.task, with_packaged_configs(args))
        super().__init__(
            self.task,
            self.data_class,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"default_root_dir": "runs"},
            parser_kwargs=quiet | {name: dict(quiet) for name in self.subcommands()},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--task", default=DEFAULT, help=f"{', '.join(known_tasks())}, or the path of a class")
        kinds = ", ".join(each.__name__ for each in self.task.data)
        parser.add_argument("--datamodule", default=self.task.data[0].__name__, help=f"{kinds}, or the path of a class")
        minutes = "also save the state of the training so often; left out, at the end of epochs"
        parser.add_argument("--save_minutes", type=float | None, default=None, help=minutes)
        disk = "GiB that the checkpoints of a run may take; beyond, the oldest are removed"
        parser.add_argument("--disk", type=float | None, default=None, help=disk)
        total = "images in a step of all processes, a multiple of their number; takes the place of data.batch_size"
        parser.add_argument("--total_batch", type=int | None, default=None, help=total)
        scaling = "multiply learning rates by the number of processes (linear), or by its square root (root)"
        parser.add_argument("--scale_lr", type=Literal["linear", "root"] | None, default=None, help=scaling)
        products = (
            "of float32 matrix products: high has TF32 where a GPU has it, medium also bfloat16 where a CPU has it"
        )
        levels = Literal["highest", "high", "medium"]
        parser.add_argument("--matmul_precision", type=levels, default="high", help=products)
        parser.add_lightning_class_args(Best, "checkpoint")
        defaults = {"filename": "best", "monitor": self.task.monitor, "mode": "max", "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{name}": value for name, value in defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(with_packaged_configs(args))

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the options in the checkpoint overrule those that are given
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        given, root = config.pop("ckpt_path", None), Path(config["trainer"]["default_root_dir"])
        again = requeued(root) if given is None and subcommand == "fit" else None
        self.ckpt_path = again or find_checkpoint(given, root)
        self.since, self.known = resumption(self.ckpt_path) if self.ckpt_path else (None, {})

    def instantiate_classes(self) -> None:
        torch.set_float32_matmul_precision(self.config[self.subcommand]["matmul_precision"])
        super().instantiate_classes()
        options = self.config_init[self.subcommand]
        self.model.scale_lr = options["scale_lr"]
        if (total := options["total_batch"]) is not None:
            trainer = self.trainer
            self.datamodule.batch_size = share(total, trainer.world_size, trainer.accumulate_grad_batches)
        if self.ckpt_path:  # weights and preprocessing come from there
            self.model.pretrained = False
            made = self.known.get("transform")
            expected = Preprocess(**made) if made else None
            words, data = self.known.get("vocabulary"), self.datamodule
            has_own = hasattr(data, "vocabulary") or getattr(data, "tokenizer", None) is not None
            if words and self.subcommand != "fit" and not has_own:
                data.vocabulary = Vocabulary.load(words)  # not those of other data, nor of a part
        elif self.subcommand != "fit" and not self.model.pretrained:
            raise ValueError(f"ckpt_path must be given to {self.subcommand}: best, last or a file")
        else:
            expected = self.model.expects()
        if expected:
            self.datamodule.preprocess = expected

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        options = self.config_init[self.subcommand]
        config = options["trainer"]
        root, version = run_of(self.ckpt_path) or (Path(config["default_root_dir"]), None)
        given = config["logger"]
        if self.subcommand == "fit" and given is not False:
            log = Log(root, name="", version=version, since=self.since)
            same: dict[str, Any] = {"version": log.version, "purge_step": self.since}
            board = TensorBoardLogger(root, name="", default_hp_metric=False, **same)
            more = [] if given in (None, True) else given if isinstance(given, list) else [given]
            kwargs["logger"] = [log, board, *more]
        elif given in (None, True):
            kwargs["logger"] = False
        if self.subcommand != "fit" and version is not None:
            kwargs["default_root_dir"] = root / f"version_{version}"
        plugins = config["plugins"] or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), WholeFiles(options["disk"])]
        if config["sync_batchnorm"]:
            kwargs["sync_batchnorm"] = False
            plugins.append(TimmSyncBatchNorm())
        callbacks = config["callbacks"] or []
        callbacks = [
            *(callbacks if isinstance(callbacks, list) else [callbacks]),
            *([Recent(options["save_minutes"])] if options["save_minutes"] is not None else []),
            Last(),
            Outcome(program(), self.args),
            Preemption(),
            Provenance([*program().split(), *self.args]),
            Waiting(),
        ]
        callbacks += [Predictions()] if self.subcommand == "predict" else []
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar())
        return super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.ckpt_path}


def run_cli(args: list[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` and leave the process with a code where it fails."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda said: "Tip:" not in said.getMessage())
    try:
        CommandLine(sys.argv[1:] if args is None else list(args))
    except Exception as error:
        if os.environ.get("VISATTN_TRACEBACK"):
            raise
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)


def program() -> str:
    """What was typed to start this program."""
    file = Path(sys.argv[0])
    if file.name == "__main__.py":
        return f"python -m {file.parent.name}"
    return f"python {shlex.quote(sys.argv[0])}" if file.suffix == ".py" else file.name


def known_tasks() -> dict[str, type[Task]]:
    found = {name: getattr(tasks, name) for name in tasks.__all__}
    return {name: cls for name, cls in found.items() if issubclass(cls, Task) and cls is not Task}


def said(args: list[str], option: str, default: str) -> str:
    """Find what arguments say of an option, themselves or in configurations; the last one wins."""
    value = default
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, given = arg.partition("=")
        given = given if equals else following
        if name == f"--{option}":
            value = given
        elif name in ("--config", "-c"):
            with suppress(OSError, ValueError, yaml.YAMLError):  # what is wrong with it is said when it is parsed
                config = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
                value = config.get(option, value) if isinstance(config, dict) else value
    return value


def class_of(name: Any, known: dict[str, type], kind: type, option: str) -> Any:
    """Return the class that an option names, shortly or by its path."""
    cls = known.get(name) or (locate(name) if "." in str(name) else None)
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ValueError(f"{option} must be {', '.join(known)}, or the path of a class of that kind, got {name!r}")
    return cls


def task_of(args: list[str]) -> type[Task]:
    """Find the task that arguments name."""
    return class_of(said(args, "task", DEFAULT), known_tasks(), Task, "task")


def data_of(task: type[Task], args: list[str]) -> type[pl.LightningDataModule]:
    """Find the data that arguments name, among those the task can be trained on."""
    known = {cls.__name__: cls for cls in task.data}
    return class_of(said(args, "datamodule", task.data[0].__name__), known, pl.LightningDataModule, "datamodule")


def with_packaged_configs(args: list[str]) -> list[str]:
    """Replace the bare names of packaged configurations by their paths, where no such file lies in the folder."""
    folders = [Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"]  # a wheel, a source tree
    found = list(args)
    for i, arg in enumerate(args):
        option, equals, name = arg.rpartition("=") if arg.startswith(("--config=", "-c=")) else ("", "", arg)
        if not (equals or (i and args[i - 1] in ("--config", "-c"))) or Path(name).exists():
            continue
        if file := next((f / name for f in folders if Path(name).name == name and (f / name).is_file()), None):
            found[i] = f"{option}{equals}{file}"
    return found


def find_checkpoint(given: str | None, root: Path) -> Path | None:
    """Resolve ``ckpt_path``: a file, or the ``"last"`` or ``"best"`` one of the newest run in ``root``."""
    if given is None:
        return None
    if given in ("last", "best"):
        runs = sorted(root.glob("version_*"), key=lambda run: int(run.name.rpartition("_")[2]), reverse=True)
        found = (newest_checkpoint(run / CHECKPOINTS, given) for run in runs)
        if file := next((file for file in found if file), None):
            return file
        raise FileNotFoundError(f"ckpt_path={given}: no run in {root} has a {given} checkpoint")
    if not Path(given).is_file():
        raise FileNotFoundError(f"ckpt_path={given}: there is no such file")
    return Path(given)


def share(total: int, processes: int, accumulated: int) -> int:
    """Return how many images of all those in a step are in a batch of one process."""
    batches = processes * accumulated
    if total < 1 or total % batches:
        kinds = f"{processes} processes with accumulate_grad_batches={accumulated}"
        raise ValueError(f"total_batch must be a multiple of {batches}, for {kinds}, got {total}")
    return total // batches


def resumption(checkpoint: Path) -> tuple[int | None, dict[str, Any]]:
    """Return to which step the log of a checkpoint's run goes, and what it says of its model."""
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, and none says which file
        said = " ".join(str(error).split())[:120]
        raise ValueError(f"{checkpoint} is damaged or no checkpoint ({said})") from error
    return held.get("global_step"), held.get("visattn", {}).get("visattn", {})


def run_of(checkpoint: Path | None) -> tuple[Path, int] | None:
    """Root and number of the run whose checkpoint this is."""
    if checkpoint is None or checkpoint.parent.name != CHECKPOINTS:
        return None
    number = re.fullmatch(r"version_(\d+)", checkpoint.parent.parent.name)
    return (checkpoint.parents[2], int(number[1])) if number else None


def one_line(error: Exception) -> str:
    """Say what is wrong in one line; jsonargparse takes many, one for each type an option may have."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(str(error).split()))
    key = re.match(r'Parser key "([^"]+)":', text)
    if not key:
        return text or repr(error)
    said = f"{key[1]}:"
    if option := re.search(r"Option '(\w+)' is not accepted.*?class_path='([\w.]+)'", text):
        return f"{said} {option[2].rpartition('.')[2]} has no option {option[1]!r}"
    if name := re.search(r"dot import path string: (\w+)|has no attribute '(\w+)'", text):
        families = {
            "attention": attention.__all__,
            "network": [name for name in models.__all__ if issubclass(getattr(models, name), Classifier)],
        }
        known = families.get(key[1].rpartition(".")[2], [])
        close = get_close_matches(name[1] or name[2], known) or known
        return f"{said} there is no {name[1] or name[2]!r}" + (f", but {', '.join(close)}" if close else "")
    if reason := re.search(r"callable class: (.*?)\. Got value: Namespace", text):
        return f"{said} {reason[1]}"
    types = re.findall(r"Expected an? (\w[\w.]*(?:\[[^\]]*\])?)", text)
    given = re.search(r" (?:Given|Got) value: (.*)", text)
    if types and given:
        wanted = " or ".join(types).replace("typing.Literal", "one of ").replace("NoneType", "null")
        return f"{said} must be {wanted}, got {given[1]}"
    return text
