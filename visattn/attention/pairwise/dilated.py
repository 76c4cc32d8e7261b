"""Huang, Yuan, Guo, Zhang, Chen, Wang: Interlaced Sparse Self-Attention for Semantic Segmentation (2019)."""

import torch
from jaxtyping import Bool
from torch import Tensor

from visattn.attention.pairwise.sparse import Groups, _SparseSelfAttention, pair_up, product


class DilatedSelfAttention(_SparseSelfAttention):
    r"""Let every position read from those in every :math:`s`-th row and column from its own (atrous).

    .. math::
        y_i = W_o \sum_{j \in \Omega_i} \operatorname{softmax}_{j \in \Omega_i}(q_i^\top k_j / \sqrt d)\, v_j,
        \quad \Omega_i = \{j : \Delta y \equiv \Delta x \equiv 0 \bmod s\}

    in each head of :math:`d` features. So the map falls into :math:`s^2` interlaced maps, and attention is dense in
    each. This is the paper's long-range step, in multi-head form; local attention takes its short-range step. The
    grid attention of arXiv:2204.01697 is the same at :math:`s = H / g` for a grid of side :math:`g`.

    Args:
        channels: Channels of the feature map.
        rate: Distance :math:`s` in rows and in columns between the positions that meet; it need not divide the map.
        heads: Heads, each of ``channels / heads`` features.

    Raises:
        ValueError: If ``rate`` is not positive or ``heads`` does not divide ``channels``.

    Example:
        >>> DilatedSelfAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1907.12273"
    place = "head"

    def __init__(self, channels: int, *, rate: int = 2, heads: int = 4):
        super().__init__(channels, heads)
        if rate < 1:
            raise ValueError(f"rate must be positive, got {rate}")
        self.rate = rate

    def reach(self, height: int, width: int, device: torch.device | None = None) -> Bool[Tensor, "n n"]:
        rows, columns = (torch.arange(length, device=device) % self.rate for length in (height, width))
        return pair_up(rows[:, None] == rows, columns[:, None] == columns)

    def _groups(self, height: int, width: int, device: torch.device) -> Groups:
        return product(self._phases(height, device), self._phases(width, device))

    def _phases(self, length: int, device: torch.device) -> Groups:
        """The groups of a line: positions that leave the same rest, filled up where the rate does not divide it."""
        size = -(-length // self.rate)
        at, phase = torch.arange(length, device=device), torch.arange(self.rate, device=device)
        positions = phase[:, None] + self.rate * torch.arange(size, device=device)
        taken = positions.clamp(max=length - 1)
        return Groups(taken, taken, positions[:, None] < length, at % self.rate * size + at // self.rate)
