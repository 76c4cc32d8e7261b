"""One line that brings a decoder under all that holds for every one of them (``test_every_decoder.py``)."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visattn.models.decoders import Decoder, Said

VOCABULARY, MEMORY = 11, 8
SIZE = (3, 5)
REGIONS = SIZE[0] * SIZE[1]


class DecoderCase(NamedTuple):
    """A decoder with some options, and what its paper says of it."""

    cls: type[Decoder]
    options: dict[str, Any]
    parameters: Callable[[int, int], int]
    """How many parameters, by words and features of the memory."""
    golden: int
    """The same for 10,000 words and a memory of 512 features, counted by hand."""

    def make(self, vocabulary: int = VOCABULARY, memory: int = MEMORY) -> Decoder:
        return self.cls(vocabulary, memory, **self.options)

    def lively(self, dtype: torch.dtype = torch.double) -> Decoder:
        """A decoder in which nothing is zero."""
        decoder = self.make().to(dtype).eval()
        for parameter in decoder.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim < 2 else min(0.5, parameter.shape[1] ** -0.5))
        return decoder

    def __str__(self) -> str:
        options = {name: getattr(value, "__name__", value) for name, value in self.options.items()}
        return self.cls.__name__ + "".join(f"-{name}={value}" for name, value in options.items())


def memory(batch: int = 2, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(batch, REGIONS, MEMORY, dtype=dtype)


def sentences(batch: int = 2, count: int = 3, length: int = 4) -> Tensor:
    return torch.randint(VOCABULARY, (batch, count, length))


def step_by_step(decoder: Decoder, prepared: Any, words: Tensor) -> Said:
    """What a decoder says if it is told the words one after another."""
    return Decoder.forward(decoder, prepared, words)


def gather() -> list[DecoderCase]:
    """The cases of all test files."""
    files = sorted(file for file in Path(__file__).parent.glob("test_*.py") if "\nCASES = [" in file.read_text("utf-8"))
    return [case for file in files for case in importlib.import_module(f"tests.models.decoders.{file.stem}").CASES]
