"""How much samples count that were drawn from something else: what wake-sleep learning weighs them by."""

from jaxtyping import Float
from torch import Tensor


def importance(
    likelihood: Float[Tensor, "*b m"], prior: Float[Tensor, "*b m"], drawn: Float[Tensor, "*b m"]
) -> tuple[Float[Tensor, "*b m"], Float[Tensor, "*b m"]]:
    r"""Return how much each of m samples counts, one on average, and how much more than without the answer.

    .. math:: w_m \propto p(y \mid a_m)\, p(a_m) / q(a_m), \quad \tilde w_m \propto p(a_m) / q(a_m)

    As :math:`\tilde w` weighs the samples as the prior does, under which the mean of :math:`\nabla \log p(a)` is zero,
    :math:`w - \tilde w` in place of :math:`w` leaves the gradient of the prior what it is, but steadier
    (arXiv:1509.06812).

    Args:
        likelihood: Logarithm of the probability of the answer, by each sample.
        prior: Logarithm of the probability of the sample.
        drawn: Logarithm of the probability with which it was drawn.

    Example:
        >>> importance(torch.tensor([0.6, 0.2]).log(), torch.zeros(2), torch.zeros(2))
        (tensor([1.5000, 0.5000]), tensor([ 0.5000, -0.5000]))
    """
    odds, samples = prior - drawn, prior.shape[-1]
    share, without = ((logits.softmax(-1) * samples) for logits in (odds + likelihood, odds))
    return share, share - without
