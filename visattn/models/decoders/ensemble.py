"""Several decoders that say one sentence together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from visattn.attention.core import wide
from visattn.models.decoders.core import Decoder


class Ensemble(Decoder):
    r"""Say each word by the mean of what several decoders hold likely.

    .. math:: p(y_t) = \frac1n \sum_i p_i(y_t)

    Args:
        decoders: Decoders of the same words, each of which may look at a memory of its own.

    Raises:
        ValueError: If there is none, or their vocabularies differ in size.
    """

    def __init__(self, decoders: Sequence[Decoder]):
        sizes = [each.vocabulary for each in decoders]
        if not sizes or len(set(sizes)) > 1:
            raise ValueError(f"decoders must be some with as many words each, got {sizes} words")
        super().__init__(sizes[0], 1)
        self.decoders = nn.ModuleList(decoders)

    def prepare(self, memory: Any, mask: Any = None, size: Any = None) -> list[Any]:
        """Make the memories ready: of each decoder one, with its mask and its size where there are any."""
        nothing = [None] * len(self.decoders)
        given = zip(self._each(), memory, mask or nothing, size or nothing, strict=True)
        return [decoder.prepare(*own) for decoder, *own in given]

    def begin(self, prepared: list[Any], count: int) -> list[Any]:
        return [decoder.begin(own, count) for decoder, own in zip(self._each(), prepared, strict=True)]

    def step(
        self, word: Int[Tensor, "b r"] | None, prepared: list[Any], state: list[Any]
    ) -> tuple[Float[Tensor, "b r v"], tuple[Any, ...], list[Any]]:
        """Take a step; the features of the next word are the log-probabilities of all, the maps those of each."""
        given = zip(self._each(), prepared, state, strict=True)
        found = [(decoder, *decoder.step(word, own, past)) for decoder, own, past in given]
        said = torch.stack([wide(decoder.write(features)).log_softmax(-1) for decoder, features, _, _ in found])
        maps = tuple(each for _, _, each, _ in found)
        return said.logsumexp(0) - math.log(len(found)), maps, [after for *_, after in found]

    def write(self, features: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
        return features

    def _each(self) -> list[Any]:
        return list(self.decoders)
