"""A word of a caption, and where it was read."""

import math
import re
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention
from visattn.explain.replacing import replaced
from visattn.explain.subject import Gradient, Subject, evaluated, strength
from visattn.models.captioner import Captioner
from visattn.models.decoders.core import Decoder, over

FUNCTION = frozenset(
    re.findall(
        r"\w+",
        """
        a about above across after against all along also among an and another any are around as at away back be been
        before behind being below beneath beside between both but by can could did do does doing down during each either
        every for from had has have having he her hers him his how if in inside into is it its like may might my near
        next no nor not of off on onto or other our out outside over past she should since so some that the their them
        then there these they this those through to together toward towards under until up upon was we were what when
        where which while who whose will with within without would you your
        """,
    )
)
"""English words that hold a sentence together, and are seldom seen in a picture."""


class Word(Subject):
    """A word of a caption, said with those before it known, and the weights of an attention of the decoder.

    Regions are those of the decoder's memory: one is left out by a mask. What is read at other words stays as it is
    where weights are replaced.

    Args:
        captioner: The captioner, in eval mode.
        image: The image, as it takes it.
        words: The caption.
        place: Which of its words.
        name: Which attention, by its name in the decoder; None: the last.

    Raises:
        ValueError: If there is no such word, or no such attention.
    """

    pictured = False

    def __init__(
        self,
        captioner: Captioner,
        image: Float[Tensor, "c h w"],
        words: Int[Tensor, " t"],
        place: int,
        *,
        name: str | None = None,
    ):
        evaluated(captioner)
        if not 0 <= place < len(words):
            raise ValueError(f"place must be that of one of {len(words)} words, got {place}")
        looks = looking(captioner.decoder)
        if name is not None and name not in looks:
            raise ValueError(f"name must be that of an attention ({', '.join(looks) or 'it has none'}), got {name!r}")
        if not looks:
            raise ValueError(f"captioner must look at regions, {type(captioner.decoder).__name__} looks nowhere")
        name = list(looks)[-1] if name is None else name
        self.captioner, self.module, self.before = captioner, looks[name], words[:place]
        with torch.no_grad():
            self.memory, size = captioner.regions(captioner.features(image[None]))
            self.prepared = captioner.decoder.prepare(self.memory, None, size)
            self.state = captioner.decoder.begin(self.prepared, 1)
            for word in [None, *self.before][:-1]:
                _, _, self.state = self._step(word, 1)
            looked: list[Tensor] = []

            def keep(own: Any) -> Any:
                looked.append(_plain(own))
                return own

            with replaced(self.module, keep):
                self._step(self._last, 1)
        self.rows = looked[-1][0, 0].float().view(-1, looked[-1].shape[-1])
        super().__init__(image, name, int(words[place]), self.rows[:, : math.prod(size)], size)

    @property
    def _last(self) -> Tensor | None:
        return self.before[-1] if len(self.before) else None

    def _step(self, word: Tensor | None, count: int) -> tuple[Tensor, Any, Any]:
        asked = None if word is None else word.expand(1, count)
        state = over(lambda each: each.expand(-1, count, *each.shape[2:]), self.state)
        return self.captioner.decoder.step(asked, self.prepared, state)

    def said(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b v"]:
        return self._told(self.captioner.regions(self.captioner.features(images)).memory, None)

    def read(self, weights: Float[Tensor, "b k n"]) -> Float[Tensor, "b v"]:
        rest = self.rows[:, weights.shape[2] :].expand(len(weights), -1, -1)  # a sentinel, or slots, as they were
        rows = torch.cat((weights, rest), 2)

        def change(own: Any) -> Any:
            before = _plain(own)
            after = rows.view(before.shape).to(before.dtype)
            return after if isinstance(own, Tensor) else own._replace(weights=after)

        with replaced(self.module, change):
            features, _, _ = self._step(self._last, len(weights))
        return self.captioner.decoder.write(features)[0].float().softmax(1)

    def left(self, there: Bool[Tensor, "b rows columns"], empty: Float[Tensor, "c h w"]) -> Float[Tensor, "b v"]:
        return self._told(self.memory.expand(len(there), -1, -1), there.flatten(1))

    def gradient(self, kind: Gradient = "norm") -> Float[Tensor, "h w"]:
        memory = self.memory.detach().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._told(memory, None)[0, self.target], [memory])
        return strength(wide(gradient), wide(memory.detach()), kind)[0].view(self.size)

    def _told(self, memory: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None) -> Float[Tensor, "b v"]:
        decoder = self.captioner.decoder
        said = decoder(decoder.prepare(memory, mask, self.size), self.before.expand(len(memory), 1, -1))
        return decoder.write(said.features[:, 0, -1]).float().softmax(1)


def looking(decoder: Decoder) -> dict[str, MemoryAttention]:
    """Return what looks at regions in a decoder, by name; not what lies within another, or looks at words."""
    found: dict[str, MemoryAttention] = {}
    for name, module in decoder.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, MemoryAttention) and not (within or module.causal):
            found[name] = module
    return found


def _plain(looked: Any) -> Tensor:
    """What is read with."""
    return looked if isinstance(looked, Tensor) else looked.weights
