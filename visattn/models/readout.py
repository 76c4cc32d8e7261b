"""What is classified after a glimpse, and when there are enough of them."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import plain, softmax, wide

Readout = Literal["last", "mean", "attention"]


def scorer(readout: Readout, width: int) -> nn.Linear | None:
    """Return what scores states of this width for a readout by attention; others need nothing."""
    if readout not in get_args(Readout):
        raise ValueError(f"readout must be {' or '.join(get_args(Readout))}, got {readout!r}")
    return nn.Linear(width, 1) if readout == "attention" else None


def read_out(
    states: Float[Tensor, "t m d"], readout: Readout, score: nn.Module | None
) -> tuple[Float[Tensor, "t m d"], Float[Tensor, "m t"]]:
    """Return what is classified after each glimpse, and the weights of all states in the last of it.

    Args:
        states: After each glimpse.
        readout: The ``"last"`` state, the ``"mean"`` of all so far, or their sum by weights of ``"attention"``.
        score: What :func:`scorer` returned.
    """
    count, rows = states.shape[:2]
    if readout == "last":
        return states, at_last(states[..., 0].T)
    scores = states.new_zeros(rows, count) if score is None else score(states)[..., 0].T
    later = torch.ones(count, count, dtype=torch.bool, device=states.device).triu(1)
    weights = softmax(scores[:, None].masked_fill(later, -torch.inf))
    return (weights.to(states.dtype) @ states.transpose(0, 1)).transpose(0, 1), weights[:, -1]


def at_last(x: Float[Tensor, "m t"]) -> Float[Tensor, "m t"]:
    """Return ones in the last column, and zeros before."""
    return F.pad(torch.zeros_like(x[:, 1:]), (0, 1), value=1)


def so_far(x: Float[Tensor, "m t"]) -> Float[Tensor, "m t"]:
    """Return the sum of each column and of all before it; that of torch is never deterministic on a GPU."""
    return torch.stack([*accumulate(x.unbind(1))], 1)


class Halting(nn.Linear):
    """Say how probable it is that enough was seen, from the state after each glimpse (arXiv:2107.05407).

    Args:
        width: Components of a state.
    """

    def __init__(self, width: int):
        super().__init__(width, 1)
        nn.init.constant_(self.bias, -2.0)  # looks for long at first

    def probabilities(self, states: Float[Tensor, "t m d"]) -> Float[Tensor, "m t"]:
        """Return the probability to stop after each glimpse."""
        return stopping(self(states)[..., 0].T)

    def over(self, states: Sequence[Float[Tensor, "m d"]]) -> bool:
        """Say whether all have stopped, more likely than not; what looks at the code is not asked, and goes on."""
        if plain(states[-1]):
            return False
        go = F.logsigmoid(-self(torch.stack([*states]))[..., 0]).sum(0)
        return bool((go < math.log(0.5)).all())


def stopping(scores: Float[Tensor, "m t"]) -> Float[Tensor, "m t"]:
    r"""Return the probability to stop at each step, of scores whose sigmoids are those if there is such a step at all.

    .. math:: p_t = \lambda_t \prod_{s<t} (1 - \lambda_s)

    The last step takes what is left.

    Example:
        >>> stopping(torch.tensor([[0.0, 0.0, -9.0]]))
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    scores = wide(scores)
    going = so_far(F.pad(F.logsigmoid(-scores[:, :-1]), (1, 0)))
    return (going + F.pad(F.logsigmoid(scores[:, :-1]), (0, 1))).exp()
