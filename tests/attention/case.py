"""One line that brings a module under all that holds for every attention module (``test_contract.py``)."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from visattn.attention import Attention

Axes = int | tuple[int, ...] | None


class Case(NamedTuple):
    """A module with some options, and what its paper says of them."""

    cls: type[Attention]
    options: dict[str, Any]
    parameters: Callable[[int], int]
    """How many parameters, by channels."""
    golden: tuple[int, int]
    """The same at the two numbers of channels, as counted in reference implementations or by hand."""
    macs: Callable[[int, int, int], int]
    """Multiply-adds of the convolutions and matrix products for one map, by channels, height and width."""
    grid: tuple[int, ...] = (5, 7)
    sums_to_one: Axes | list[Axes] = None
    """The axis or axes over which the weights sum to one, if they do; a list where there are several weights."""
    norm_over: Literal["positions", "samples", "strips"] | None = None
    """What a batch norm inside takes its statistics over; training needs at least two of them."""
    inputs: int = 1
    """How many maps it takes."""
    channels: tuple[int, int] = (64, 256)
    """At which it is counted; the first is that of all other tests."""
    small: int = 16
    """Channels for the gradient in full."""

    @property
    def fixed(self) -> bool:
        """Is it tied to the size of the grid?"""
        return "size" in self.options

    def make(self, channels: int | None = None) -> Attention:
        return self.cls(self.channels[0] if channels is None else channels, **self.options)

    def lively(self, channels: int | None = None, dtype: torch.dtype = torch.double) -> Attention:
        """A module in which nothing is zero and nothing the identity."""
        module = self.make(channels).to(dtype).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                nn.init.uniform_(buffer, 0.5, 1.5)
        return module

    def input(
        self,
        batch: int = 2,
        channels: int | None = None,
        dtype: torch.dtype = torch.double,
        grid: Sequence[int] | None = None,
    ) -> tuple[Tensor, ...]:
        shape = (batch, self.channels[0] if channels is None else channels, *(self.grid if grid is None else grid))
        return tuple(torch.randn(shape, dtype=dtype) for _ in range(self.inputs))

    def axes(self, fields: int) -> list[Axes]:
        """Where each of the weights sums to one."""
        return self.sums_to_one if isinstance(self.sums_to_one, list) else [self.sums_to_one] * fields

    def __str__(self) -> str:
        options = "".join(f"-{name}={value}" for name, value in self.options.items())
        return self.cls.__name__ + options + (f"-{len(self.grid)}d" if len(self.grid) != 2 else "")


def gather() -> list[Case]:
    """The cases of all test files."""
    files = sorted(f for f in Path(__file__).parent.glob("*/test_*.py") if f.parent.name != "memory")
    own = [file for file in files if "\nCASES = [" in file.read_text("utf-8")]
    modules = [importlib.import_module(f"tests.attention.{file.parent.name}.{file.stem}") for file in own]
    return [case for module in modules for case in module.CASES]
