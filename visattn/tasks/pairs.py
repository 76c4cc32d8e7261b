"""Say whether two images show the same kind of thing: a Siamese network, trained by Lightning."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import BinaryAccuracy

from visattn.data.pairs import Pairs
from visattn.models.pairs import Scheme, SiameseNetwork
from visattn.tasks.base import Task, known_to_timm, trained_weights


class Verification(Task):
    """Train a network to say whether two images are of one class.

    The network, ``model``, is a :class:`~visattn.models.SiameseNetwork`, built when a trainer (or
    ``load_from_checkpoint``) asks for it, because the data says how large the images are.

    Args:
        backbone: Name of a timm model whose feature map is compared; left out, two small convolutions.
        backbone_args: Arguments of ``timm.create_model``, such as ``img_size``.
        pretrained: Whether the backbone starts with its trained weights.
        stage: Which of the backbone's stages gives the feature map, counted as in a list.
        attention: How the images look at each other: ``"ABCNN-1"``, ``"ABCNN-2"``, ``"ABCNN-3"``, or not at all.
        width: Channels of the levels of the network, and of its two convolutions without a backbone.
        kernel_size: Height and width of the windows of convolution and pooling.
        levels: How many levels there are.
        normalized: Whether the pooling of ABCNN-2 and -3 is normalised, which in the paper it is not.
        input_size: Channels, height and width of the images; left out, as the data says.
        optimizer: An optimizer with its options; left out, AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch; left out, the rate rises linearly
            and falls to zero along a cosine, step by step.
        warmup: Share of all steps in which the learning rate rises, without ``schedule``.

    Raises:
        ValueError: If timm knows no such backbone, or an option does not fit the others or the data.
    """

    data = (Pairs,)
    monitor = "val/accuracy"

    def __init__(
        self,
        backbone: str | None = None,
        *,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        stage: int = -1,
        attention: Scheme | None = None,
        width: int = 50,
        kernel_size: int = 3,
        levels: int = 2,
        normalized: bool = False,
        input_size: tuple[int, int, int] | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        warmup: float = 0.05,
    ):
        super().__init__(optimizer, schedule, pretrained)
        if backbone:
            known_to_timm(backbone)
        elif pretrained:
            raise ValueError("pretrained must be false without a backbone, got true")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {warmup}")
        self.save_hyperparameters(ignore=["_instantiator"])
        self.remember()

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        h = self.hparams
        self.labels = ["different", "same"]
        self.preprocess = getattr(getattr(self._trainer, "datamodule", None), "preprocess", None)
        if h["input_size"] is None:
            if self.preprocess is None:
                raise ValueError("input_size must be given, since there is no data module that says it")
            h["input_size"] = tuple(self.preprocess.input_size)
        in_chans, height, width = h["input_size"]
        names = ("backbone", "backbone_args", "stage", "attention", "width", "kernel_size", "levels", "normalized")
        options = {name: h[name] for name in names}
        # without a trainer, or on the way to a checkpoint, the weights come from elsewhere
        pretrained = self.pretrained and self._trainer is not None
        with trained_weights(h["backbone"]) if pretrained else nullcontext():
            self.model = SiameseNetwork(**options, pretrained=pretrained, in_chans=in_chans, size=(height, width))
        self.val_accuracy, self.test_accuracy = BinaryAccuracy(), BinaryAccuracy()

    def forward(self, images: Tensor) -> Tensor:
        """Return a logit for each pair, of images of shape (b, 2, c, h, w)."""
        return self.model(*images.unbind(1))

    def training_loss(self, batch: Sequence[Tensor]) -> Tensor:
        images, same = batch
        return F.binary_cross_entropy_with_logits(self.forward(images), same)

    def _evaluate(self, batch: Sequence[Tensor], stage: str, accuracy: BinaryAccuracy) -> None:
        images, same = batch
        logits = self.forward(images).float()
        loss = F.binary_cross_entropy_with_logits(logits, same)
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(images))
        accuracy.update((logits > 0).int(), same.int())
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(images))

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the probabilities of two classes and of one."""
        same = self.forward(batch[0] if isinstance(batch, (list, tuple)) else batch).float().sigmoid()
        return torch.stack((1 - same, same), 1)

    @property
    def described(self) -> dict[str, Any]:
        return {"labels": self.labels, "transform": self.preprocess, "task": "verification"}
