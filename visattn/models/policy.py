"""How a network chooses where to look next: by chance, around a place that it names."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GaussianPolicy(nn.Module):
    r"""Draw actions around their means, by a normal distribution; a location is an action that is kept in the image.

    .. math:: a = \mu + \sigma \epsilon, \quad \epsilon \sim \mathcal N(0, I), \quad l = \min(\max(a, -1), 1)

    The log-probability is that of the action :math:`a`, not of the location, and no gradient goes through :math:`a`.

    Args:
        size: Components of an action.
        spread: Standard deviation :math:`\sigma`, in units of half the image; or the first and the last of a training,
            during which :meth:`narrow` goes from one to the other.
        learned: Whether it is a parameter, one for each component, that starts at the first.

    Raises:
        ValueError: If ``spread`` or ``size`` is not positive, or ``spread`` not finite.

    Example:
        >>> policy = GaussianPolicy(spread=(0.2, 0.05))
        >>> policy.narrow(0.5)
        >>> policy.spread
        tensor(0.1000)
    """

    narrowed: Tensor

    def __init__(self, size: int = 2, *, spread: float | tuple[float, float] = (0.2, 0.05), learned: bool = False):
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.ends = (spread, spread) if isinstance(spread, (int, float)) else tuple(spread)
        if len(self.ends) != 2 or not all(0 < end < math.inf for end in self.ends):
            raise ValueError(f"spread must be one or two positive numbers, got {spread}")
        self.size = size
        self.log_spread = nn.Parameter(torch.full((size,), math.log(self.ends[0]))) if learned else None
        if not learned:
            self.register_buffer("narrowed", torch.tensor(float(self.ends[0])))

    def extra_repr(self) -> str:
        return f"{self.size}, spread={self.ends}"

    @property
    def spread(self) -> Float[Tensor, "*p"]:
        """The standard deviation as it is now."""
        return self.narrowed if self.log_spread is None else self.log_spread.exp()

    def narrow(self, progress: float) -> None:
        """Set the spread to what it is after this part, from 0 to 1, of a training; a learned one stays."""
        if self.log_spread is None:
            first, last = self.ends
            self.narrowed.fill_(first * (last / first) ** min(1.0, max(0.0, progress)))

    def sample(self, mean: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
        """Draw actions."""
        return (mean + self.spread * torch.randn_like(mean)).detach()

    def log_prob(self, mean: Float[Tensor, "*b p"], action: Float[Tensor, "*b p"]) -> Float[Tensor, "*b"]:
        """Return the log-probability of actions, by which means, and a spread that is learned, get a gradient."""
        spread = self.spread
        squares = ((action.detach() - mean) / spread).square().sum(-1)
        return -0.5 * squares - spread.log().expand(self.size).sum() - 0.5 * self.size * math.log(2 * math.pi)

    def entropy(self, mean: Float[Tensor, "*b p"]) -> Float[Tensor, "*b"]:
        """Return the entropy; it does not depend on where the means are."""
        entropy = self.spread.log().expand(self.size).sum() + 0.5 * self.size * math.log(2 * math.pi * math.e)
        return entropy.expand(mean.shape[:-1])
