"""How far apart two outputs are, or two maps: in value, and in order."""

import torch
from jaxtyping import Float
from scipy.stats import kendalltau
from torch import Tensor


def total_variation(p: Float[Tensor, "*#b v"], q: Float[Tensor, "*#b v"]) -> Float[Tensor, "*b"]:
    r"""Return how much of one distribution must move to make it another, :math:`\frac12 \sum_i |p_i - q_i|`.

    Example:
        >>> total_variation(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
        tensor(0.5000)
    """
    return (p - q).abs().sum(-1) / 2


def jensen_shannon(p: Float[Tensor, "*#b n"], q: Float[Tensor, "*#b n"]) -> Float[Tensor, "*b"]:
    r"""Return the Jensen-Shannon divergence of two distributions, in nats: at most :math:`\ln 2`.

    .. math:: \tfrac12 \operatorname{KL}(p \,\|\, m) + \tfrac12 \operatorname{KL}(q \,\|\, m), \quad m = (p + q) / 2

    Example:
        >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(0.6931)
    """
    logs = [each.clamp_min(torch.finfo(each.dtype).tiny).log() for each in (p, q, (p + q) / 2)]
    return (p * (logs[0] - logs[2]) + q * (logs[1] - logs[2])).sum(-1) / 2


def kendall(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float:
    r"""Return in how far two maps put regions in the same order: Kendall's :math:`\tau_b`, NaN if one has no order.

    Example:
        >>> round(kendall(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])), 4)
        0.9129
    """
    if a.shape != b.shape:
        raise ValueError(f"maps must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    orders = (each.detach().flatten().double().cpu().numpy() for each in (a, b))
    return float(kendalltau(*orders).statistic)
