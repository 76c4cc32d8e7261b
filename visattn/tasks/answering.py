"""Answer questions about an image: a network that reads the question and looks for what is asked."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from visattn import attention as zoo
from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention
from visattn.attention.memory.hard import HardWeights
from visattn.data.described import QuestionBatch, QuestionedCanvas
from visattn.metrics.pointing import points_into
from visattn.models.question_answerer import Answered, QuestionAnswerer, at
from visattn.tasks.base import Task, known_to_timm, plainly, trained_weights
from visattn.tasks.regions import RegionTask, averaged, not_negative, probable

STAGES = ("val", "test", "test_more")


class Answering(RegionTask):
    """Train a network to answer questions about images: visual question answering.

    The network, ``model``, is a :class:`~visattn.models.QuestionAnswerer`, built when a trainer (or
    ``load_from_checkpoint``) asks for it, because the data says which words and answers there are.

    It learns by the cross entropy of the answers. A reader that picks regions is taught by what its picks make likely,
    the log-probability of the right answer less its moving average.

    An evaluation tells the share of right answers, ``accuracy``, and where answers have a place, the share of those
    whose map, at the last look, has its peak there, ``grounded``.

    Args:
        backbone: Name of a timm model; also ``local-dir:FOLDER`` and ``hf-hub:NAME``.
        pretrained: Whether the backbone starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``.
        channels_last: Whether the backbone's maps lie in memory with the channels last: faster on most GPUs, and for
            small networks on a processor.
        reader: What looks at the regions, with its options; left out,
            :class:`~visattn.attention.AttentiveReader`.
        embedding: Features of a word.
        hidden: Units of the network that reads questions.
        width: Features of a region; left out, as many as the backbone has.
        placed: Whether regions are told their rows and columns, by sines and cosines that are added to them.
        layers: How many transformer blocks the regions go through.
        heads: How many heads their attention has.
        dropout: Probability to drop a number of a region, and of what the answer is told from.
        penalty_factor: Weight of the penalty that the reader itself has on its weights.
        policy_factor: Weight of what teaches picks.
        entropy_factor: Weight of the entropy of picks, which is to be great.
        optimizer: An optimizer with its options; left out, AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch; left out, the rate rises linearly
            and falls to zero along a cosine, step by step.
        warmup: Share of all steps in which the learning rate rises, without ``schedule``.

    Raises:
        ValueError: If timm knows no such backbone, or an option is out of its range.
    """

    data = (QuestionedCanvas,)
    monitor = "val/accuracy"
    columns = ("question", "answer", "probability")
    """What a prediction says beside the name of an image."""
    classes = Task.classes | {"reader": zoo}
    asks = "reader"

    def __init__(
        self,
        backbone: str = "resnet10t",
        *,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        channels_last: bool = False,
        reader: Callable[[int, int], MemoryAttention] | None = None,
        embedding: int = 128,
        hidden: int = 256,
        width: int | None = None,
        placed: bool = False,
        layers: int = 0,
        heads: int = 8,
        dropout: float = 0.0,
        penalty_factor: float = 1.0,
        policy_factor: float = 0.1,
        entropy_factor: float = 0.002,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        warmup: float = 0.05,
    ):
        super().__init__(optimizer, schedule, pretrained)
        known_to_timm(backbone)
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {warmup}")
        not_negative(penalty_factor=penalty_factor, policy_factor=policy_factor, entropy_factor=entropy_factor)
        self.save_hyperparameters(ignore=["_instantiator"])
        self.reader = reader
        self.remember(reader=reader)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        h, data = self.hparams, getattr(self._trainer, "datamodule", None)
        self.vocabulary, self.labels = getattr(data, "vocabulary", None), getattr(data, "labels", None)
        self.preprocess = getattr(data, "preprocess", None)
        if self.vocabulary is None or self.labels is None:
            raise ValueError("the data must say which words and which answers there are")
        names = ("backbone", "backbone_args", "embedding", "hidden", "width", "placed", "layers", "heads", "dropout")
        options: Any = {name: h[name] for name in names}
        if self.reader is not None:
            options["reader"] = plainly(self.reader, "reader")
        with trained_weights(h["backbone"]):
            self.model = QuestionAnswerer(len(self.vocabulary), len(self.labels), pretrained=h["pretrained"], **options)
        if h["channels_last"]:
            self.model.backbone.to(memory_format=torch.channels_last)  # maps follow the weights
        self.model.freeze_unread()
        if self.model.reader.hard:
            self.register_buffer("average", torch.zeros(()))
        make = partial(MulticlassAccuracy, len(self.labels), average="micro")
        self.accuracy: Any = torch.nn.ModuleDict({stage: make() for stage in STAGES})
        self.grounded: Any = torch.nn.ModuleDict({stage: MeanMetric() for stage in STAGES})

    def training_loss(self, batch: QuestionBatch) -> Tensor:
        found = self.model.answer(batch.images, batch.words, batch.lengths)
        there = torch.arange(probable(found.maps).shape[2], device=self.device) < found.lengths[..., None]
        total = loss(found.logits, batch) + self.penalty_loss(found.maps, there)
        if not isinstance(found.maps, HardWeights):
            return total
        likely = wide(found.logits.detach()).log_softmax(-1).gather(2, batch.answers[..., None])[..., 0]
        return total + self.picking_loss(found.maps, there, self.gain(likely), likely.numel())

    def validation_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: QuestionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, "test_more" if dataloader_idx else "test")

    def evaluate(self, batch: QuestionBatch, stage: str) -> None:
        """Log how many answers are right, and read where they are."""
        features = self.model.features(batch.images)
        found = self.model.asked(features, batch.words, batch.lengths)
        options: Any = {"batch_size": len(batch.images), "add_dataloader_idx": False}
        self.log(f"{stage}/loss", loss(found.logits, batch), sync_dist=True, **options)
        self.accuracy[stage].update(found.logits.flatten(0, 1), batch.answers.flatten())
        self.log(f"{stage}/accuracy", self.accuracy[stage], prog_bar=True, **options)
        image, size = batch.images.shape, features.shape
        inside = points_into(last_map(found), batch.boxes, (size[2], size[3]), (image[2], image[3]))
        self.grounded[stage].update(inside[batch.boxes.any(-1)].float())
        self.log(f"{stage}/grounded", self.grounded[stage], prog_bar=True, **options)

    def predict_step(self, batch: QuestionBatch, batch_idx: int) -> list[list[tuple[str, str, str]]]:
        """Return of each image its questions, the likeliest answer to each, and how likely it is."""
        assert self.vocabulary is not None
        assert self.labels is not None
        likely, found = wide(self.model(batch.images, batch.words, batch.lengths)).softmax(-1).max(-1)
        return [
            [
                (self.vocabulary.decode(words), self.labels[number], f"{p:.4f}")
                for words, number, p in zip(*each, strict=True)
            ]
            for each in zip(batch.words.tolist(), found.tolist(), likely.tolist(), strict=True)
        ]

    @property
    def described(self) -> dict[str, Any]:
        return {
            "vocabulary": self.vocabulary,
            "labels": self.labels,
            "transform": self.preprocess,
            "task": "question answering",
        }


def loss(logits: Tensor, batch: QuestionBatch) -> Tensor:
    """Return the mean cross entropy of the answers."""
    return F.cross_entropy(wide(logits).flatten(0, 1), batch.answers.flatten())


def last_map(found: Answered) -> Tensor:
    """Return where was looked last for each question, in the mean of heads."""
    return at(averaged(found.maps), found.lengths - 1)
