"""A few digits and a trainer without ornaments, for trainings of a second."""

import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl

from visattn.data.images import Images
from visattn.tasks.run import Last, Outcome, WholeFiles

logging.getLogger("pytorch_lightning").setLevel("ERROR")


@pytest.fixture
def digits():
    """Makes the data: 80 images to train with, 40 to evaluate with, unless told otherwise."""

    def make(**options) -> Images:
        few = {"size": 32, "batch_size": 16, "workers": 0, "train_per_class": 8, "val_per_class": 4}
        return Images("digits", **few | options)

    return make


@pytest.fixture
def trainer(tmp_path: Path):
    """Makes a trainer that keeps its run in the folder of the test."""

    def make(*callbacks: pl.Callback, **options) -> pl.Trainer:
        best = pl.callbacks.ModelCheckpoint(
            filename="best", monitor="val/top1", mode="max", enable_version_counter=False
        )
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        kept = {
            "default_root_dir": tmp_path,
            "plugins": [WholeFiles()],
            "callbacks": [*callbacks, best, Last(), Outcome()],
        }
        return pl.Trainer(**{"max_epochs": 1, **quiet, **kept, **options})

    return make
