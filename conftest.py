"""Fixtures for all tests and doctests: one thread, the data beside the project, shapes unchecked for compilers."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace["torch"] = torch


@pytest.fixture
def shared() -> Path:
    """The folder of real data and weights, or a skip that names what is missing."""
    path = os.environ.get("VISATTN_SHARED")
    if not path or not Path(path).is_dir():
        pytest.skip("VISATTN_SHARED does not name the folder with real data and weights")
    return Path(path)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are not checked: dynamo cannot trace the checks. What it compiled is forgotten afterwards."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()
