"""Learn to draw: a network that makes images of nothing, trained by Lightning to tell those of the data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from visattn import models
from visattn.data.canvas import Canvas
from visattn.data.images import Images
from visattn.models.draw import DRAW
from visattn.tasks.base import Task, found_class

MakeDrawing = Callable[[Any], DRAW]
Binarisation = Literal["dynamic", "static", "threshold"]


class Generation(Task):
    r"""Train a network to draw images like those of the data, by what it takes to tell an image with it.

    .. math:: L = -\log p(x \mid c_T) + \sum_t D_{KL}\bigl(q(z_t \mid x) \,\|\, \mathcal N(0, I)\bigr)

    on average, in nats, where :math:`c_T` are the logits of pixels that are either on or off (arXiv:1502.04623). It is
    no less than :math:`-\log p(x)`. An evaluation logs it as ``val/nats``, its two parts as ``val/reconstruction`` and
    ``val/kl``, and :math:`-L`, which bounds the log-likelihood from below, as ``val/bound``; it draws the same
    numbers, and has the same pixels, every time.

    Args:
        network: The network with its options; left out, :class:`~visattn.models.DRAW`. Channels and size of the images
            come from the data, unless they are among the options.
        binarisation: What is on of an image: what chance says, by the values of its pixels, anew in every step of
            training (``"dynamic"``) or for each image once and for all (``"static"``); or what is brighter than a half
            (``"threshold"``). Evaluation has no ``"dynamic"`` one, but the ``"static"``.
        optimizer: An optimizer with its options; left out, AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch; left out, the rate rises linearly
            and falls to zero along a cosine, step by step.
        warmup: Share of all steps in which the learning rate rises, without ``schedule``.

    Raises:
        ValueError: If an option is out of its range, or the network does not draw.
    """

    data = (Canvas, Images)
    monitor = "val/bound"
    classes = Task.classes | {"network": models}

    def __init__(
        self,
        network: MakeDrawing | None = None,
        *,
        binarisation: Binarisation = "dynamic",
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        warmup: float = 0.05,
    ):
        super().__init__(optimizer, schedule, False)
        network = network or DRAW  # no default, whose options a command line would hand on to another
        if not issubclass(found_class(network), DRAW):
            raise ValueError(f"network must be one that draws, such as DRAW, got {network!r}")
        if binarisation not in get_args(Binarisation):
            raise ValueError(f"binarisation must be one of {', '.join(get_args(Binarisation))}, got {binarisation!r}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {warmup}")
        self.save_hyperparameters(ignore=["_instantiator"])
        self.remember(network=network)
        self.network = network

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        data: Any = getattr(self._trainer, "datamodule", None)
        known: dict[str, Any] = {}
        if data is not None:
            in_chans, *size = data.input_size
            known = {"in_chans": in_chans, "size": tuple(size)}
            if data.preprocess:  # the network takes pixels from 0 to 1
                self.preprocess = replace(data.preprocess, mean=(0.0,) * in_chans, std=(1.0,) * in_chans)
        self.model = found_class(self.network)(**self.options(self.network, known))

    def forward(self, images: Tensor) -> Any:
        return self.model(images)

    # --- steps --------------------------------------------------------------------------------------------------------

    def pixels(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return images as they were before the data module normalised them, from 0 to 1."""
        known = getattr(getattr(self._trainer, "datamodule", None), "preprocess", None)
        if known:
            mean, std = (images.new_tensor(each)[:, None, None] for each in (known.mean, known.std))
            images = images * std + mean
        return images.clamp(0, 1)

    def binarised(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return images of zeros and ones."""
        pixels, kind = self.pixels(images), self.hparams["binarisation"]
        if kind == "threshold":
            return (pixels > 0.5).to(images)
        if kind == "dynamic" and self.training:
            return pixels.bernoulli()
        return (scattered(pixels) < pixels).to(images)

    def losses(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what it takes on average, in nats, to tell the pixels by what is drawn, and to tell what to draw."""
        images = self.binarised(batch[0])
        drawing = self.forward(images)
        errors = F.binary_cross_entropy_with_logits(drawing.canvas, images.to(drawing.canvas), reduction="none")
        return errors.sum((1, 2, 3)).mean(), drawing.divergences.sum(1).mean()

    def training_loss(self, batch: Sequence[Tensor]) -> Tensor:
        reconstruction, divergence = self.losses(batch)
        self.log_dict({"train/reconstruction": reconstruction, "train/kl": divergence})
        return reconstruction + divergence

    def _evaluate(self, batch: Sequence[Tensor], batch_idx: int, stage: str) -> None:
        with self.repeatable(batch_idx):
            reconstruction, divergence = self.losses(batch)
        nats = reconstruction + divergence
        shown = {f"{stage}/nats": nats, f"{stage}/bound": -nats}
        parts = {f"{stage}/reconstruction": reconstruction, f"{stage}/kl": divergence}
        self.log_dict(shown, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))
        self.log_dict(parts, sync_dist=True, batch_size=len(batch[0]))

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("predict needs a network that says what images show, and this one draws: see its generate")

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def described(self) -> dict[str, Any]:
        """What ``visattn.save`` is told beside the network."""
        return {"transform": self.preprocess, "task": "generation"}


def scattered(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return numbers from 0 to below 1 as if by chance, that follow from the image they are for, and from their place.

    So they depend neither on the batch nor on the device. Bytes of images are hashed by the steps of SplitMix64.

    Example:
        >>> images = torch.rand(3, 1, 28, 28)
        >>> bool((scattered(images[1:2]) == scattered(images)[1:2]).all())
        True
    """
    place = torch.arange(images[0:1].numel(), device=images.device)
    key = mixed((images * 255).round().long().flatten(1) + 256 * place).sum(1, keepdim=True)
    return ((mixed(key + place) >> 40 & 2**24 - 1).float() * 2.0**-24).view_as(images)


def mixed(bits: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Return what SplitMix64 makes of its counter."""
    bits = bits - 0x61C8864680B583EB
    bits = (bits ^ (bits >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & 2**33 - 1)
