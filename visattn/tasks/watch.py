"""What networks make of images, drawn over and over in training: where they are warped, where they are looked at."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from numpy import ndarray
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.sampling import SpatialTransformer
from visattn.attention.sampling.grids import folded, jacobian
from visattn.models.looker import Looker
from visattn.tasks.run import folder

FILM = "film.gif"
CLASSES = 12  # that have a column, at most


class Album(Callback):
    """Keeps pictures of a training in a folder of the run, and a film of them.

    Args:
        seconds: How long a picture of the film stays.

    Raises:
        ValueError: If ``seconds`` is not positive.
    """

    called: ClassVar[str]
    """The folder."""

    def __init__(self, seconds: float):
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.seconds = seconds
        self.pictures: list[str] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.pictures = []

    def state_dict(self) -> dict[str, Any]:
        return {"pictures": list(self.pictures)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pictures = list(state_dict["pictures"])

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            strategy = type(trainer.strategy).__name__
            raise ValueError(f"strategy must be ddp or of one device for {type(self).__name__}, got {strategy}")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._draws(trainer):
            return
        from visattn.drawing import film

        pictures = [folder(trainer) / self.called / name for name in self.pictures]
        if there := [picture for picture in pictures if picture.is_file()]:
            film(there, folder(trainer) / self.called / FILM, seconds=self.seconds)

    @staticmethod
    def _draws(trainer: Any) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run

    def _keep(self, trainer: Any, figure: Any, name: str) -> None:
        file = folder(trainer) / self.called / name
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        self.pictures.append(name)


class Alignment(Album):
    """Draws, over and over in training, what a spatial transformer makes of the same images of the validation data.

    It is the first one that images go through. A picture has a column for each class (of many, those with most of the
    images): the mean of its images and of what they become, then examples with the lattices that are sampled. Pictures
    are in the folder of the run, ``warps/step_<n>.png``, the last one of the state at the end, and after the training
    ``warps/film.gif`` shows them all. Logged are the share of the grids that is folded over, ``warp/folded``, and the
    mean determinant of their Jacobian, ``warp/determinant``.

    The training goes on as it would without: nothing random is drawn from where it draws.

    Args:
        every_n_epochs: Draw after every so many epochs; left out, after each, unless steps are counted.
        every_n_steps: Draw after every so many steps instead.
        images: How many images it looks at, drawn by a chance that is always the same.
        examples: How many of each class are drawn.
        seconds: How long a picture of the film stays.

    Raises:
        ValueError: If a value is out of its range, both epochs and steps are counted, the model has no spatial
            transformer, or is sharded.
    """

    called = "warps"

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        *,
        images: int = 200,
        examples: int = 1,
        seconds: float = 0.5,
    ):
        if every_n_epochs and every_n_steps:
            raise ValueError(
                f"every_n_epochs must be left out where every_n_steps is given, got {every_n_epochs}, {every_n_steps}"
            )
        counts = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "images": images}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if examples < 0:
            raise ValueError(f"examples must not be negative, got {examples}")
        super().__init__(seconds)
        self.every_n_epochs = None if every_n_steps else every_n_epochs or 1
        self.every_n_steps = every_n_steps
        self.images = images
        self.examples = examples
        self.batches: list[Tensor] = []
        self.targets = torch.empty(0)

    # --- when ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not any(isinstance(module, SpatialTransformer) for module in pl_module.modules()):
            model = type(getattr(pl_module, "model", pl_module)).__name__
            raise ValueError(f"Alignment watches a spatial transformer, and the model, {model}, has none")
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._draws(trainer):
            self._choose(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        steps = trainer.global_step  # none yet, where gradients are gathered
        if self.every_n_steps and steps and steps % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._draw(trainer, pl_module)

    # --- what ---------------------------------------------------------------------------------------------------------

    def _choose(self, trainer: Any) -> None:
        """Keep the images, and what they show."""
        data = trainer.datamodule
        loader = trainer.val_dataloaders if data is None else data.val_dataloader()
        loader = loader[0] if isinstance(loader, Sequence) else loader
        if loader is None:
            raise ValueError("Alignment watches images of the validation data, and there are none")
        count = len(loader.dataset)
        chosen = np.random.default_rng(0).permutation(count)[: self.images]
        with isolate_rng():
            batches = type(loader)(
                loader.dataset,
                batch_size=loader.batch_size,
                sampler=sorted(chosen.tolist()),
                collate_fn=loader.collate_fn,
            )
            found = [(batch[0], batch[1]) for batch in batches]
        self.batches = [images for images, _ in found]
        self.targets = torch.cat([targets for _, targets in found])

    def _draw(self, trainer: Any, pl_module: Any) -> None:
        name = f"step_{trainer.global_step:07d}.png"
        if not self._draws(trainer) or name in self.pictures:
            return
        from visattn.drawing import denormalise, draw_alignment, sampled

        with _looking(trainer, pl_module):
            seen = [_look(trainer, pl_module, images) for images in self.batches]
        grids = torch.cat([grids for grids, _ in seen])
        preprocess = getattr(pl_module, "preprocess", None)

        def photos(batches: Iterable[Tensor]) -> ndarray:
            images = [image for images in batches for image in images.flatten(0, -4)]
            mean, std = (preprocess.mean, preprocess.std) if preprocess else ([0.0], [1.0])
            return np.stack([denormalise(image, mean, std) for image in images])

        inputs = photos(_first(images) for images in self.batches)
        if all(outputs is not None for _, outputs in seen):
            outputs = photos(outputs for _, outputs in seen if outputs is not None)
            outputs = outputs.reshape(*grids.shape[:2], *outputs.shape[1:])
        else:
            pairs = zip(inputs, grids.numpy(), strict=True)
            outputs = np.stack([np.stack([sampled(photo, grid) for grid in each]) for photo, each in pairs])
        share, determinant = (float(of(grids.flatten(0, 1)).mean()) for of in (folded, jacobian))
        title = f"step {trainer.global_step}   {100 * share:.3g}% folded over   determinant {determinant:.3g}"
        classes = _classes(self.targets, getattr(pl_module, "labels", None))
        figure = draw_alignment(inputs, outputs, grids.numpy(), classes, examples=self.examples, title=title)
        self._keep(trainer, figure, name)
        for logger in trainer.loggers:  # at once, and with the step as Lightning counts it
            logger.log_metrics({"warp/folded": share, "warp/determinant": determinant}, trainer.global_step - 1)


class Gaze(Album):
    """Draws, over and over in training, where a network that looks at one place after another looks for each class.

    All images of a validation count, and each location is the mean of the policy. A picture has a column for each class
    (of many, those with most of the images) and a row for each glimpse; the class's mean image is below. Pictures are
    in the folder of the run: ``gaze/step_<n>.png`` after validations in training and ``gaze/film.gif`` of all of them,
    ``gaze/val.png`` of a validation alone, and ``gaze/test.png`` of a test.

    The training goes on as it would without: nothing random is drawn from where it draws.

    Args:
        every_n_epochs: Draw at the validations of every so many epochs.
        seconds: How long a picture of the film stays.

    Raises:
        ValueError: If a value is out of its range, or the model does not look at one place after another, or is
            sharded.
    """

    called = "gaze"

    def __init__(self, every_n_epochs: int = 1, *, seconds: float = 0.5):
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        super().__init__(seconds)
        self.every_n_epochs = every_n_epochs
        self.counts = False
        self.fixations: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._looker(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        due = trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self.counts = due and not trainer.sanity_checking and not trainer.fast_dev_run
        self.fixations = None

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self.counts:
            return
        from visattn.drawing import Fixations

        model, (images, targets) = self._looker(pl_module), batch[:2]
        with _looking(trainer, pl_module), pl_module.repeatable(batch_idx):
            rollout = model.rollout(images, policy="mean")
            corners = model.sensor.corners(rollout.locations.flatten(0, 1), tuple(images.shape[2:]))
        corners = corners[:, 0].unflatten(0, rollout.locations.shape[:2])
        if self.fixations is None:
            self.fixations = Fixations(model.num_classes, corners.shape[1], tuple(images.shape[1:]))
        self.fixations.add(images, corners, targets, rollout.glimpses)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.fixations is None:
            return
        for part in self.fixations.sums:
            part.copy_(trainer.strategy.reduce(part.to(pl_module.device), reduce_op="sum"))
        fits = trainer.state.fn == "fit"
        name = f"step_{trainer.global_step:07d}.png" if fits else "test.png" if trainer.testing else "val.png"
        if not self._draws(trainer) or name in self.pictures:
            return
        from visattn.drawing import draw_fixations

        preprocess = getattr(pl_module, "preprocess", None)
        known = {"mean": preprocess.mean, "std": preprocess.std} if preprocess else {}
        title = f"step {trainer.global_step}" if fits else f"{int(self.fixations.shown.sum())} images"
        labels = getattr(pl_module, "labels", None)
        self._keep(trainer, draw_fixations(self.fixations, labels, columns=CLASSES, title=title, **known), name)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    @staticmethod
    def _looker(pl_module: Any) -> Any:
        model = getattr(pl_module, "model", pl_module)
        if not isinstance(model, Looker):
            raise ValueError(
                f"Gaze watches a network that looks at one place after another, got {type(model).__name__}"
            )
        return model


@contextmanager
def _looking(trainer: Any, pl_module: Any) -> Iterator[None]:
    """Nothing is trained, nothing random is drawn, and hooks are called even where the network is compiled."""
    modes = {module: module.training for module in pl_module.modules()}
    with ExitStack() as stack:
        for context in (isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context()):
            stack.enter_context(context)
        if any(module._compiled_call_impl is not None for module in modes):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            pl_module.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _first(images: Tensor) -> Tensor:
    """The first images of pairs; images that are none, themselves."""
    return images[:, 0] if images.ndim == 5 else images


def _look(trainer: Any, pl_module: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the grids of the first spatial transformer that is called, and, if it is given images, its outputs."""
    seen: list[Any] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        if not seen:
            seen.extend((args[0], module.attend(*args), output))

    transformers = [module for module in pl_module.modules() if isinstance(module, SpatialTransformer)]
    hooks = [transformer.register_forward_hook(keep) for transformer in transformers]
    try:
        pl_module(trainer.precision_plugin.convert_input(images.to(pl_module.device)))
    finally:
        for hook in hooks:
            hook.remove()
    x, grids, outputs = seen
    given = x.shape == _first(images).shape
    return grids.float().cpu(), outputs.unflatten(1, (grids.shape[1], -1)).float().cpu() if given else None


def _classes(targets: Tensor, labels: Sequence[str] | None) -> dict[str, list[int]]:
    """The numbers of the images of each class, by its name; of many classes, those with most of them."""
    members = targets > 0 if targets.ndim == 2 else F.one_hot(targets.long()).bool()
    most = members.sum(0).argsort(descending=True, stable=True)[:CLASSES].sort().values.tolist()
    found = {labels[k] if labels else str(k): members[:, k].nonzero()[:, 0].tolist() for k in most}
    return {name: numbers for name, numbers in found.items() if numbers}
