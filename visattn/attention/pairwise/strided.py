"""Child, Gray, Radford, Sutskever: Generating Long Sequences with Sparse Transformers (2019)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from visattn.attention.pairwise.sparse import Groups, _SparseSelfAttention, attend_in_groups, causal, to_tokens


class StridedSelfAttention(_SparseSelfAttention):
    r"""Let every position read from a few of those before it, row by row: half of the heads each way.

    .. math:: y_i = W_o \sum_{j \in \Omega_i} \operatorname{softmax}_{j \in \Omega_i}(q_i^\top k_j / \sqrt d)\, v_j

    in each head of :math:`d` features, where :math:`\Omega_i` holds of the positions :math:`j \le i`

    =========== ===================================== ============================================================
    ``pattern`` first half of the heads               second half
    =========== ===================================== ============================================================
    strided     the last :math:`l` before, and itself every :math:`l`-th from itself: :math:`i \equiv j \bmod l`
    fixed       those in its own block of :math:`l`   the last :math:`c` of every block: :math:`j \bmod l \ge l - c`
    =========== ===================================== ============================================================

    Two steps of the strided pattern reach all that came before. A query of the second half that finds nobody there,
    as the first ones of the fixed pattern do, reads zeros.

    Args:
        channels: Channels of the feature map.
        pattern: Which two patterns.
        stride: Positions :math:`l`; None: a row of the map.
        summary: Positions :math:`c` of each block that the fixed pattern reads from afar.
        form: How far the first strided pattern looks back: ``"paper"`` over :math:`l` positions and itself,
            ``"released"`` over :math:`l` with itself, as in the released code, which has no fixed pattern.
        heads: Heads, each of ``channels / heads`` features; an even number.

    Raises:
        ValueError: If ``pattern`` or ``form`` is unknown or they do not go together, ``stride`` is not positive,
            ``summary`` does not lie between 1 and it, or ``heads`` is odd or does not divide ``channels``.

    Example:
        >>> StridedSelfAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1904.10509"

    def __init__(
        self,
        channels: int,
        *,
        pattern: Literal["strided", "fixed"] = "strided",
        stride: int | None = None,
        summary: int = 1,
        form: Literal["paper", "released"] = "paper",
        heads: int = 4,
    ):
        super().__init__(channels, heads)
        if heads % 2:
            raise ValueError(f"heads must be even, half of them for each pattern, got {heads}")
        if pattern not in ("strided", "fixed"):
            raise ValueError(f"pattern must be strided or fixed, got {pattern!r}")
        if form not in ("paper", "released"):
            raise ValueError(f"form must be paper or released, got {form!r}")
        if (pattern, form) == ("fixed", "released"):
            raise ValueError("form must be paper for the fixed pattern, got 'released'")
        if stride is not None and stride < 1:
            raise ValueError(f"stride must be positive, got {stride}")
        if summary < 1 or (stride is not None and summary > stride):
            raise ValueError(f"summary must lie between 1 and stride={stride}, got {summary}")
        self.pattern, self.stride, self.summary, self.form = pattern, stride, summary, form

    def reach(self, height: int, width: int, device: torch.device | None = None) -> Bool[Tensor, "heads n n"]:
        key, stride = torch.arange(height * width, device=device), self.stride or width
        query = key[:, None]
        if self.pattern == "strided":
            near, far = query - key < self._span(stride), query % stride == key % stride
        else:
            near, far = query // stride == key // stride, (key % stride >= stride - self.summary).expand(len(key), -1)
        both = torch.stack((near, far)) & (key <= query)
        return both.repeat_interleave(self.heads // 2, 0)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = to_tokens(x)
        halves = []
        for half, groups in enumerate(self._halves(tokens.shape[0], self.stride or x.shape[3], x.device)):
            query, key, value = (
                F.linear(tokens, layer.weight.chunk(2)[half], layer.bias.chunk(2)[half])
                .unflatten(2, (self.heads // 2, -1))
                .flatten(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            halves.append(attend_in_groups(query, key, value, groups).unflatten(1, (-1, self.heads // 2)))
        return self._write(x, torch.cat(halves, 2))

    def _span(self, stride: int) -> int:
        """How many positions the first strided pattern reads, with the query's."""
        return stride + 1 if self.form == "paper" else stride

    def _halves(self, n: int, stride: int, device: torch.device) -> tuple[Groups, Groups]:
        """The groups of both patterns. What fills up the last block comes after every query, so none reaches it."""
        at, count = torch.arange(n, device=device), -(-n // stride)
        block = torch.arange(count * stride, device=device).view(count, stride)
        if self.pattern == "fixed":
            last = block[:, stride - torch.sym_min(self.summary, stride) :].flatten()
            far = Groups(at[None], last.clamp(max=n - 1)[None], (last <= at[:, None])[None], at)
            return causal(block, at), far
        before = self._span(stride) - 1
        keys = block[:, :1] - before + torch.arange(before + stride, device=device)
        query, key = block[:1, :, None], keys[:1, None]
        reached = (key <= query) & (query - key <= before) & (keys[:, None] >= 0)
        near = Groups(block.clamp(max=n - 1), keys.clamp(min=0).clamp(max=n - 1), reached, at)
        return near, causal(block.mT, at % stride * count + at // stride)
