"""Say what an image shows: a timm backbone with attention in it, trained by Lightning."""

import csv
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import ReduceLROnPlateau
from rich.console import Console
from rich.table import Table
from timm.data import Mixup
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassStatScores,
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelStatScores,
)

from visattn import attention as zoo
from visattn import models
from visattn.attention import Attention
from visattn.data.canvas import Canvas
from visattn.data.images import Images
from visattn.models.network import Classifier, Network
from visattn.surgery import insert, insertions
from visattn.tasks.base import Task, found_class, known_to_timm, mean_over_ranks, trained_weights
from visattn.tasks.recognition import Recognition
from visattn.tasks.run import folder

MakeAttention = Callable[[int], Attention]
MakeNetwork = Callable[[Any], Classifier]


class Classification(Recognition):
    """Train a backbone, with attention inserted, to say what an image shows.

    The network, ``model``, is built when a trainer (or ``load_from_checkpoint``) asks for it, because the data module
    says how many classes and channels there are, and how large images are: ``num_classes``, ``in_chans`` and
    ``input_size``. Without one, give ``num_classes`` in ``backbone_args``.

    Without ``schedule``, the learning rate rises linearly during the first part of all steps and falls to zero along a
    cosine. Norms, biases and gates have no weight decay.

    Args:
        backbone: Name of a timm model; also ``local-dir:FOLDER`` and ``hf-hub:NAME``. Left out for a network that has
            none.
        pretrained: Whether the backbone starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, such as ``drop_path_rate``. ``num_classes`` and ``in_chans``
            come from the data unless they are given here.
        network: What is made of the backbone: a network of ``visattn.models`` with its options. One that returns
            several logits in training has the sum of their losses. A network without a backbone gets classes, channels
            and size of its input from the data, where its options leave them as they are.
        attention: What to insert: an attention class with its options, or several.
        at: Where, in the grammar of ``visattn.sites``; left out, where the module's paper puts it. With several
            modules, a list gives the place of each.
        gate: ``"identity"`` leaves the output of the backbone unchanged at first; None inserts as in the paper.
        freeze_backbone: Train the classifier and what is inserted only; the rest stays in evaluation mode.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Parameter of the beta distribution that mixes pairs of images; 0 mixes none, nor does an odd batch.
        cutmix: The same for pasting a part of one image into another.
        class_weights: Weight of each class in the loss (of its positives, where an image has many labels).
        multi_label: Whether an image may have any number of labels; left out, as the data says.
        optimizer: An optimizer with its options; left out, AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch.
        warmup: Share of all steps in which the learning rate rises, without ``schedule``.
        attention_lr_factor: Learning rate of what is inserted, and of the attention modules of a network, relative to
            that of the rest.
        penalty_factor: Weight in the loss of the penalties that modules put on their weights.
        channels_last: Whether feature maps lie in memory with the channels last: faster on most GPUs.
        grad_checkpointing: Whether the backbone keeps only some feature maps of a step, and makes the others again on
            the way back: far less memory, a third more time.
        compile: Whether to compile the network by ``torch.compile``.

    Raises:
        ValueError: If timm knows no such backbone, or an option does not fit the data.
    """

    data = (Images, Canvas)
    monitor = "val/top1"
    classes = Task.classes | {"attention": zoo, "network": models}

    mix: Mixup | None
    class_weights: Tensor | None

    def __init__(
        self,
        backbone: str | None = None,
        *,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        network: MakeNetwork | None = None,
        attention: list[MakeAttention] | MakeAttention | None = None,
        at: list[str] | str | None = None,
        gate: Literal["identity"] | None = "identity",
        freeze_backbone: bool = False,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        class_weights: list[float] | None = None,
        multi_label: bool | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        warmup: float = 0.05,
        attention_lr_factor: float = 1.0,
        penalty_factor: float = 1.0,
        channels_last: bool = False,
        grad_checkpointing: bool = False,
        compile: bool = False,
    ):
        super().__init__(optimizer, schedule, pretrained)
        if backbone:
            known_to_timm(backbone)
        elif network is None:
            raise ValueError("backbone must be given, unless there is a network that has none")
        for name, value in (("label_smoothing", label_smoothing), ("warmup", warmup)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        if network and freeze_backbone:
            raise ValueError("freeze_backbone must be false with a network, which takes the backbone apart, got true")
        modules = attention if isinstance(attention, list) else [attention] if attention else []
        if isinstance(attention, list) and isinstance(at, list) and len(at) != len(attention):
            raise ValueError(f"at must give one place for each of the {len(attention)} modules, got {len(at)}")

        self.save_hyperparameters(ignore=["_instantiator"])
        self.remember(attention=attention, network=network)
        self.insert, self.network = modules, network
        if network and issubclass(found_class(network), Network):
            if not backbone:
                raise ValueError(f"backbone must be given: {found_class(network).__name__} is made of one")
            for name in ("num_classes", "pretrained", "backbone_args"):
                if self.hparams["network"]["init_args"].get(name):
                    raise ValueError(f"{name} must be given beside the network, not as an option of it")
        elif network:
            known = {"backbone": backbone, "pretrained": pretrained, "backbone_args": backbone_args}
            for name, given in known.items():
                if given:
                    raise ValueError(f"{name} must be left out: {found_class(network).__name__} has no backbone")

    # --- the network --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        h, known = self.hparams, self.read_data()
        data: Any = getattr(self._trainer, "datamodule", None)
        if h["backbone"]:
            h["backbone_args"] = {name: known[name] for name in known if name != "size"} | (h["backbone_args"] or {})
            if "num_classes" not in h["backbone_args"]:
                raise ValueError("num_classes must be given in backbone_args, since no data module says it")
        else:
            self.options(self.network, known)
        if h["multi_label"] is None:
            h["multi_label"] = bool(getattr(data, "multi_label", False))

        # without a trainer, or on the way to a checkpoint, the weights come from elsewhere
        pretrained = self.pretrained and self._trainer is not None
        with trained_weights(h["backbone"]) if pretrained else nullcontext():
            model: Any = self._built(pretrained)
        if pretrained and not self.network and model.num_classes != model.pretrained_cfg.get("num_classes"):
            for head in _heads(model):  # some of timm's start with logits so large that unlearning them takes epochs
                if isinstance(head, (nn.Linear, nn.Conv2d)):
                    nn.init.trunc_normal_(head.weight, std=0.01)
        size = getattr(data, "input_size", None) or _made_for(model)
        for number, make in enumerate(self.insert):
            at = h["at"][number] if isinstance(h["attention"], list) and isinstance(h["at"], list) else h["at"]
            insert(model, make, at=at, gate=h["gate"], input_size=size)
        self.num_classes = model.num_classes
        self.check_entries(labels=self.labels, class_weights=h["class_weights"])
        if h["channels_last"]:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        if h["freeze_backbone"]:
            model.requires_grad_(False)
            for module in self._trained():
                module.requires_grad_(True)
            self.train(self.training)
        if h["grad_checkpointing"]:
            remake_maps(model)
        if h["compile"]:
            model.compile()
        mixes = h["mixup"] > 0 or h["cutmix"] > 0
        self.mix = (
            Mixup(
                h["mixup"], h["cutmix"], label_smoothing=0.0, num_classes=self.num_classes, multi_label=h["multi_label"]
            )
            if mixes
            else None
        )
        weights = h["class_weights"]
        self.register_buffer("class_weights", torch.tensor(weights) if weights else None, persistent=False)
        scores = self._scores()
        self.val_scores, self.test_scores = scores.clone("val/"), scores.clone("test/")
        self.per_class = (
            MultilabelStatScores(self.num_classes, average=None)
            if h["multi_label"]
            else MulticlassStatScores(self.num_classes, average=None)
        )

    def _built(self, pretrained: bool) -> nn.Module:
        make: Any = self.network
        if not self.hparams["backbone"]:
            return found_class(make)(**self.hparams["network"]["init_args"])
        name, options = self.hparams["backbone"], dict(self.hparams["backbone_args"])
        if make is None:
            return timm.create_model(name, pretrained=pretrained, **options)
        classes = options.pop("num_classes")
        return make(name, num_classes=classes, pretrained=pretrained, backbone_args=options)

    def _trained(self) -> Iterator[nn.Module]:
        """What trains where the backbone is frozen."""
        yield from _heads(self.model)
        for inserted in insertions(self.model):
            yield inserted
            yield inserted.attention

    def _scores(self) -> MetricCollection:
        if self.hparams["multi_label"]:
            mean_precision = MultilabelAveragePrecision(self.num_classes)
            return MetricCollection({"mAP": mean_precision, "f1": MultilabelF1Score(self.num_classes)})
        tops = [k for k in (1, 5) if k == 1 or k < self.num_classes]
        return MetricCollection(
            {f"top{k}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro") for k in tops},
            compute_groups=False,
        )

    def train(self, mode: bool = True) -> "Classification":
        super().train(mode)
        if mode and hasattr(self, "model") and self.hparams["freeze_backbone"]:
            self.model.eval()
            for module in self._trained():
                module.train()
        return self

    def forward(self, images: Tensor) -> Any:
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    # --- steps --------------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.hparams["label_smoothing"] if self.training else 0.0
        if self.hparams["multi_label"]:
            targets = targets * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), pos_weight=self.class_weights)
        options: Any = {"weight": self.class_weights, "label_smoothing": smoothing}
        if self.class_weights is None or targets.is_floating_point() or not self.training:
            return F.cross_entropy(logits, targets, **options)
        weights = self.class_weights[targets].sum()
        return F.cross_entropy(logits, targets, reduction="sum", **options) / mean_over_ranks(weights)

    def training_loss(self, batch: Sequence[Tensor]) -> Tensor:
        images, targets = batch
        if self.mix and len(images) % 2 == 0:
            images, targets = self.mix(images, targets)
        logits = self.forward(images)
        several = logits if isinstance(logits, tuple) else (logits,)
        return torch.stack([self.loss(each, targets) for each in several]).sum()

    def on_train_epoch_end(self) -> None:
        inserted = getattr(self.model, "visattn", None)
        for name, module in inserted.items() if inserted is not None else ():
            if module.gate is not None:
                self.log(f"gate/{name.replace('__', '.')}", module.gate.detach().float().squeeze())

    def _evaluate(self, batch: Sequence[Tensor], stage: str, scores: MetricCollection) -> tuple[Tensor, Tensor]:
        images, targets = batch
        logits = self.forward(images).float()
        weight: float = len(images)
        if self.class_weights is not None and not self.hparams["multi_label"]:
            weight = self.class_weights[targets].sum().item()
        self.log(f"{stage}/loss", self.loss(logits, targets), prog_bar=True, sync_dist=True, batch_size=weight)
        targets = targets.int()
        scores.update(logits, targets)
        self.log_dict(scores, prog_bar=True, batch_size=len(images))
        return logits, targets

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_scores)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.per_class.update(*self._evaluate(batch, "test", self.test_scores))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the probabilities."""
        logits = self.forward(batch[0] if isinstance(batch, (list, tuple)) else batch).float()
        return logits.sigmoid() if self.hparams["multi_label"] else logits.softmax(-1)

    def on_test_epoch_end(self) -> None:
        rows = _report(self.per_class.compute(), self.labels or [str(k) for k in range(self.num_classes)])
        self.per_class.reset()
        if not self.trainer.is_global_zero:
            return
        file = folder(self.trainer) / "per_class.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        _print(rows, file)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def described(self) -> dict[str, Any]:
        """What ``visattn.save`` is told beside the network."""
        task = "multi-label classification" if self.hparams["multi_label"] else "classification"
        args = self.hparams["backbone_args"] if self.network is None else None
        return {"labels": self.labels, "transform": self.preprocess, "task": task, "model_args": args}


def remake_maps(model: Any) -> None:
    """Have a backbone keep only some feature maps of a step."""
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError) as error:
        kind = type(model).__name__
        raise ValueError(f"grad_checkpointing must be false for {kind}, which cannot do it, got true") from error


def _made_for(model: Any) -> tuple[int, int, int] | None:
    """The input for which a network without a backbone was built, where it has options that say so."""
    known = inspect.signature(type(model)).parameters
    options = {name: option.default for name, option in known.items()} | getattr(model, "arguments", {})
    return (options["in_chans"], *options["size"]) if {"in_chans", "size"} <= options.keys() else None


def _heads(model: nn.Module) -> tuple[Any, ...]:
    """The classifiers of a backbone; some have one more for distillation."""
    head = model.get_classifier()  # type: ignore[operator]
    return tuple(head) if isinstance(head, (list, tuple)) else (head,)


def _report(counts: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Turn true and false positives and negatives of each class into precision, recall and F1."""
    rows = []
    for label, (tp, fp, _, fn, support) in zip(labels, counts.tolist(), strict=True):
        precision, recall, f1 = (
            a / b if b else math.nan for a, b in ((tp, tp + fp), (tp, support), (2 * tp, 2 * tp + fp + fn))
        )
        rows.append({"label": label, "precision": precision, "recall": recall, "f1": f1, "images": support})
    return rows


def _print(rows: list[dict[str, Any]], file: Path, most: int = 20) -> None:
    title = f"per class ({file})" if len(rows) <= most else f"the {most} worst of {len(rows)} classes ({file})"
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "label" else "right")
    worst = rows if len(rows) <= most else sorted(rows, key=lambda row: row["f1"])[:most]
    for row in worst:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
