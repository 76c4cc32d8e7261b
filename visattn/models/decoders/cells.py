"""Recurrent cells whose part that does not wait for the state is computed for all steps at once."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

Kind = Literal["lstm", "gru"]


class Cell(nn.Module):
    r"""A long short-term memory, or a gated recurrent unit, whose inputs come in parts.

    .. math:: \begin{pmatrix} i & f & g & o \end{pmatrix} = W_x x + W_z z + W_h h + b, \quad
        c' = \sigma(f)\, c + \sigma(i) \tanh g, \quad h' = \sigma(o) \tanh c'

    Args:
        known: Features of what is known of all steps before the first, such as words.
        found: Features of what is found step by step; 0: nothing.
        width: Units.
        kind: ``"lstm"`` or ``"gru"``.
    """

    def __init__(self, known: int, found: int, width: int, *, kind: Kind = "lstm"):
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"cell must be {' or '.join(get_args(Kind))}, got {kind!r}")
        self.kind, self.width = kind, width
        gates = 4 if kind == "lstm" else 3
        self.known = nn.Linear(known, gates * width)
        self.found = nn.Linear(found, gates * width, bias=False) if found else None
        self.hidden = nn.Linear(width, gates * width, bias=kind == "gru")  # the reset gate stands before its bias
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    @property
    def states(self) -> int:
        """How many vectors its state has; the first is what others see."""
        return 2 if self.kind == "lstm" else 1

    def forward(
        self,
        known: Float[Tensor, "*b g"],
        found: Float[Tensor, "*b z"] | None,
        state: tuple[Float[Tensor, "*b h"], ...],
    ) -> tuple[Float[Tensor, "*b h"], ...]:
        """Return the state after a step.

        Args:
            known: What ``self.known`` made of what is known.
            found: What was found in this step.
            state: The state before it.
        """
        hidden = self.hidden(state[0])
        if found is not None and self.found is not None:
            known = known + self.found(found)
        if self.kind == "lstm":
            in_, forget, new, out = (known + hidden).chunk(4, -1)
            memory = torch.addcmul(forget.sigmoid() * state[1], in_.sigmoid(), new.tanh())
            return out.sigmoid() * memory.tanh(), memory
        reset, update, new = known.chunk(3, -1)
        old_reset, old_update, old = hidden.chunk(3, -1)
        new = torch.addcmul(new, (reset + old_reset).sigmoid(), old).tanh()
        return (torch.lerp(new, state[0], (update + old_update).sigmoid()),)
