"""What a network draws of nothing, over and over in training."""

from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.seed import isolate_rng

from visattn.models.draw import DRAW
from visattn.tasks.run import folder

FOLDER, SAMPLES, FILM = "drawings", "samples.png", "film.gif"


class Sketches(Callback):
    """Draws, after epochs of training, how a network comes to draw images of nothing, always of the same chance.

    Pictures are in the folder of the run, ``drawings/step_<n>.png``: a row for each image, with the windows through
    which was written. After the training, ``drawings/samples.png`` is a sheet of images, and ``drawings/film.gif``
    shows how some of them came about.

    The training goes on as it would without: nothing random is drawn from where it draws.

    Args:
        every_n_epochs: Draw after every so many epochs.
        images: How many images a picture, and the film, has.
        columns: How many steps of each are in a picture, at most.
        samples: How many images are on the sheet.

    Raises:
        ValueError: If a value is less than 1, the model is no DRAW, or is sharded.
    """

    def __init__(self, every_n_epochs: int = 1, *, images: int = 8, columns: int = 10, samples: int = 100):
        counts = {"every_n_epochs": every_n_epochs, "images": images, "columns": columns, "samples": samples}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.columns = columns
        self.samples = samples

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        model = getattr(pl_module, "model", pl_module)
        if not isinstance(model, DRAW):
            raise ValueError(f"Sketches shows what DRAW draws, and the model is {type(model).__name__}")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            strategy = type(trainer.strategy).__name__
            raise ValueError(f"strategy must be ddp or of one device for Sketches, got {strategy}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs or not self._draws(trainer):
            return
        from visattn.drawing import draw_generation

        canvases, corners = self._drawn(pl_module.model)
        title = f"step {trainer.global_step} of training"
        figure = draw_generation(canvases, corners, columns=self.columns, title=title)
        figure.savefig(self._file(trainer, f"step_{trainer.global_step:07d}.png"))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._draws(trainer):
            return
        from visattn.drawing import draw_samples, film_generation

        canvases, corners = self._drawn(pl_module.model)
        film_generation(canvases, self._file(trainer, FILM), corners)
        with isolate_rng():
            torch.manual_seed(0)
            draw_samples(pl_module.model.generate(self.samples).canvas).save(self._file(trainer, SAMPLES))

    def _drawn(self, model: DRAW) -> tuple[Any, Any]:
        """Return the canvases after each step, and what the windows cover."""
        with isolate_rng():
            torch.manual_seed(0)
            drawing = model.generate(self.images, canvases=True)
        return drawing.canvases, model.corners(drawing)

    @staticmethod
    def _file(trainer: Any, name: str) -> Any:
        file = folder(trainer) / FOLDER / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    @staticmethod
    def _draws(trainer: Any) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run
