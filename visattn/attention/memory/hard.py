"""Xu et al.: Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (ICML 2015), hard."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visattn.attention.core import wide
from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention, OuterAttention, Prepared, spread


class HardWeights(NamedTuple):
    """What is read with, and what it was drawn from: of a step, or with more axes of several steps."""

    weights: Float[Tensor, "b r *heads l"]
    """One for the region that was drawn and zero for others; or the probabilities themselves."""
    probabilities: Float[Tensor, "b r *heads l"]
    """How likely each region was."""

    @property
    def choice(self) -> Int[Tensor, "b r *heads"] | None:
        """The regions that were drawn; None where any was read with the probabilities."""
        drawn = ((self.weights == 0) | (self.weights == 1)).all()
        return self.weights.argmax(-1) if drawn else None

    def log_probability(self, mask: Bool[Tensor, "*b"] | None = None) -> Float[Tensor, "*b"]:
        r"""Return :math:`\sum_i s_i \log a_i` of each draw.

        Its gradient goes through the probabilities alone; it is zero where they themselves were read.

        Args:
            mask: True at the draws that count; others have zero. Where it has no axes for heads or layers, what these
                draw together has the sum.
        """
        return _expected_log(self.weights.detach(), self.probabilities, mask)

    def entropy(self, mask: Bool[Tensor, "*b"] | None = None) -> Float[Tensor, "*b"]:
        r"""Return :math:`-\sum_i a_i \log a_i` of each draw.

        Args:
            mask: As of :meth:`log_probability`.
        """
        return -_expected_log(self.probabilities, self.probabilities, mask)


class HardAttention(OuterAttention):
    r"""Read from one region that is drawn.

    .. math:: z = \sum_i s_i v_i, \quad s \sim \operatorname{Categorical}(a), \quad
        a_i \propto \bar a_i^{1 / T}

    where :math:`\bar a` are the weights of the attention inside. In training a region is drawn for each query; but
    with a probability, once for a minibatch, the expected value :math:`a` takes the place of :math:`s`. No gradient
    goes through a draw: how likely it was is learned from a reward, by the
    :meth:`~visattn.attention.memory.hard.HardWeights.log_probability` and
    :meth:`~visattn.attention.memory.hard.HardWeights.entropy` of what :meth:`attend` returns. A task that draws by
    itself, from a proposal, gives the regions to :meth:`attend`.

    Differs from the released code, which lets no gradient through :math:`a` either where it is read in training. What
    an attention that remembers its looks, such as :class:`~visattn.attention.CoverageAttention`,
    :class:`~visattn.attention.LocationSensitiveAttention` or :class:`~visattn.attention.ImpatientReader`, takes from
    one look into the next is made of its own weights :math:`\bar a`, not of the region :math:`s` that was drawn.

    Args:
        query: Features of a query.
        memory: Features of the memory.
        attention: Attention whose weights say how likely a region is drawn.
        temperature: Divides the logarithms of those weights: below 1 the likely ones are drawn more often still.
        evaluation: What is read when nothing is trained: with the probabilities, ``"expected"``, or from the likeliest
            region, ``"argmax"``.
        expected: Probability to read with the probabilities in training, once for each memory that is prepared.

    Raises:
        ValueError: If a number is less than 1, ``temperature`` is not positive, ``expected`` is no probability,
            ``evaluation`` is unknown, or the attention inside picks itself.

    Example:
        >>> attention = HardAttention(16, 32).eval()
        >>> prepared = attention.prepare(torch.randn(2, 49, 32))  # two images
        >>> maps, state = attention.attend(torch.randn(2, 5, 16), prepared)  # five queries each
        >>> maps.entropy().shape
        torch.Size([2, 5])
    """

    paper = "arXiv:1502.03044"
    hard = True

    def __init__(
        self,
        query: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = AdditiveAttention,
        temperature: float = 1.0,
        evaluation: Literal["expected", "argmax"] = "expected",
        expected: float = 0.5,
    ):
        super().__init__(query, memory, attention)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if evaluation not in ("expected", "argmax"):
            raise ValueError(f"evaluation must be expected or argmax, got {evaluation!r}")
        if not 0 <= expected <= 1:
            raise ValueError(f"expected must lie in [0, 1], got {expected}")
        self.temperature, self.evaluation, self.expected = temperature, evaluation, expected

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:.4g}, evaluation={self.evaluation}, expected={self.expected:.4g}"

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        prepared = super().prepare(memory, mask, size)
        expected = torch.rand((), device=memory.device) < self.expected if self.training else None
        return prepared._replace(more=(prepared.more, expected))

    def attend(  # type: ignore[override]
        self,
        query: Float[Tensor, "b r q"],
        prepared: Prepared,
        state: Any = None,
        choice: Int[Tensor, "b r *heads"] | None = None,
    ) -> tuple[HardWeights, Any]:
        """Return what is read with and how likely it was, and the state after it.

        Args:
            query: The queries.
            prepared: What :meth:`prepare` returned.
            state: The state before.
            choice: The regions to read from; None: those that are drawn.
        """
        inner, expected = self._inner(prepared)
        looked, after = self.attention.attend(query, inner, state)
        looks = wide(looked)
        probabilities = spread(looks.clamp_min(torch.finfo(looks.dtype).tiny).log() / self.temperature, looks > 0)
        weights = self._choose(probabilities, expected, choice)
        return HardWeights(weights.to(query.dtype), probabilities.to(query.dtype)), after

    def read(  # type: ignore[override]
        self, query: Float[Tensor, "b r q"], prepared: Prepared, state: Any = None, *, weights: HardWeights
    ) -> Float[Tensor, "b r e"]:
        return self.attention.read(query, self._inner(prepared)[0], state, weights=weights.weights)

    def _choose(self, probabilities: Tensor, expected: Tensor | None, choice: Tensor | None) -> Tensor:
        """What is read with."""
        if choice is not None:
            return _one(probabilities, choice)
        if not self.training:
            return probabilities if self.evaluation == "expected" else _one(probabilities, probabilities.argmax(-1))
        likely = probabilities.detach()
        drawn = _one(likely, (likely / torch.empty_like(likely).exponential_()).argmax(-1))
        return drawn if expected is None else torch.where(expected, probabilities, drawn)

    @staticmethod
    def _inner(prepared: Prepared) -> tuple[Prepared, Bool[Tensor, ""] | None]:
        """The memory as the attention inside prepared it, and whether to read with the probabilities."""
        more, expected = prepared.more
        return prepared._replace(more=more), expected


def _one(probabilities: Float[Tensor, "*b l"], choice: Int[Tensor, "*b"]) -> Float[Tensor, "*b l"]:
    """One for what is chosen; nothing where there is nothing to choose from."""
    chosen = torch.zeros_like(probabilities).scatter(-1, choice[..., None], 1.0)
    return chosen * probabilities.any(-1, keepdim=True)


def _expected_log(
    weights: Float[Tensor, "*looks l"], probabilities: Float[Tensor, "*looks l"], mask: Bool[Tensor, "*b"] | None
) -> Float[Tensor, "..."]:
    """The mean logarithm of probabilities, in at least float32, summed over axes that a mask does not have."""
    probabilities = wide(probabilities)
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    found = (wide(weights) * logs).sum(-1)
    if mask is None:
        return found
    return (found.flatten(mask.ndim).sum(-1) if found.ndim > mask.ndim else found) * mask
