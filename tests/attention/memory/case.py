"""One line that brings a memory attention under all that holds for every one of them (``test_every_memory.py``)."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention, Prepared

QUERY, MEMORY = 6, 8
SIZE = (3, 5)
REGIONS = SIZE[0] * SIZE[1]


class MemoryCase(NamedTuple):
    """A memory attention with some options, and what its paper says of it."""

    cls: type[MemoryAttention]
    options: dict[str, Any]
    parameters: Callable[[int, int], int]
    """How many parameters, by features of query and memory."""
    golden: int
    """The same for queries of 512 and a memory of 1280 features, counted by hand."""
    sums_to_one: bool = True
    """Do the weights of a query sum to one, where there is something to read?"""
    ordered: bool = False
    """Does it matter in which order the regions lie?"""
    alike: bool = True
    """Does a query read the same whoever asks beside it, and in whatever order?"""
    parts: int = 1
    """Of how many vectors is a query made? A sentinel comes beside the state that it belongs to."""

    def make(self, query: int = QUERY, memory: int = MEMORY) -> MemoryAttention:
        return self.cls(query // self.parts, memory, **self.options)

    def lively(self, dtype: torch.dtype = torch.double) -> MemoryAttention:
        """A module in which nothing is zero."""
        module = self.make().to(dtype).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        return module

    def __str__(self) -> str:
        options = {name: getattr(value, "__name__", value) for name, value in self.options.items()}
        return self.cls.__name__ + "".join(f"-{name}={value}" for name, value in options.items())


def small(query: int, memory: int) -> MemoryAttention:
    """Attention of few units, for others to be built on."""
    return AdditiveAttention(query, memory, width=5)


def memory(batch: int = 2, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(batch, REGIONS, MEMORY, dtype=dtype)


def queries(batch: int = 2, count: int = 3, steps: int = 2, dtype: torch.dtype = torch.double) -> list[Tensor]:
    """Queries of several steps."""
    return [torch.randn(batch, count, QUERY, dtype=dtype) for _ in range(steps)]


def steps(module: MemoryAttention, queries: list[Tensor], prepared: Prepared) -> tuple[list[Any], list[Tensor]]:
    """What is looked at, and what is read, step by step."""
    state, looked, found = None, [], []
    for query in queries:
        weights, after = module.attend(query, prepared, state)
        looked.append(weights)
        found.append(module.read(query, prepared, state, weights=weights))
        state = after
    return looked, found


def gather() -> list[MemoryCase]:
    """The cases of all test files."""
    files = sorted(file for file in Path(__file__).parent.glob("test_*.py") if "\nCASES = [" in file.read_text("utf-8"))
    return [case for file in files for case in importlib.import_module(f"tests.attention.memory.{file.stem}").CASES]
