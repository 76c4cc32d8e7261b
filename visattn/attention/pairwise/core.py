"""What every position reads from every other: three affinities, each as a matrix and without one."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import SMALL, uncast


def halve(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *half"]:
    """Max-pool a map of one to three axes by 2 in space, never in time; what is left over at the border counts."""
    if x.ndim == 3:
        return F.max_pool1d(x, 2, ceil_mode=True)
    if x.ndim == 4:
        return F.max_pool2d(x, 2, ceil_mode=True)
    return F.max_pool3d(x, (1, 2, 2), ceil_mode=True)


def read(value: Float[Tensor, "b m e"], weights: Float[Tensor, "b n m"]) -> Float[Tensor, "b n e"]:
    """Sum the values by their weights, in the layout of a map: features outside, positions inside."""
    return torch.bmm(value.mT, weights.mT).mT


class Softmax(nn.Module):
    r"""Weights :math:`\operatorname{softmax}_j(s\, q_i^\top k_j)`: every query spreads a weight of one over the keys.

    Args:
        scale: Factor :math:`s` of the logits.
        causal: Whether a query reads the keys up to its own place only.
    """

    def __init__(self, scale: float = 1.0, *, causal: bool = False):
        super().__init__()
        self.scale = scale
        self.causal = causal

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}"

    def logits(self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
        return torch.bmm(query if self.scale == 1 else query * self.scale, key.mT)

    def weights(self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
        """Logits and softmax in at least float32, under autocast too: unscaled logits overflow in float16."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        with uncast(query.device):
            logits = self.logits(query.to(dtype), key.to(dtype))
        if self.causal:
            logits = logits + torch.full_like(logits[0], -torch.inf).triu(1)
        return logits.softmax(-1).to(query.dtype)

    def read(
        self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"], value: Float[Tensor, "b m e"]
    ) -> Float[Tensor, "b n e"]:
        """Equal ``weights(query, key) @ value``, without the matrix where that is faster or the matrix is large.

        The fused kernel of the CPU takes one width only, so the narrower side is padded with zeros there. They cost
        time, which moves the size from which the kernel is faster. A compiled graph is the same for all sizes.
        The kernels have no second derivative; the matrix has.
        """
        features, cpu = value.shape[2], query.device.type == "cpu"
        width = max(query.shape[2], features)
        if cpu and not torch.compiler.is_compiling():
            padding = 2 * width - query.shape[2] - features
            size = query.shape[0] * query.shape[1] * key.shape[1]
            if size <= SMALL * (1 + padding / 32 + (width / 256) ** 2):
                return read(value, self.weights(query, key))
        if cpu and query.shape[2] != features:
            query, key, value = (F.pad(x, (0, width - x.shape[2])) for x in (query, key, value))
        query, key, value = (x.contiguous()[:, None] for x in (query, key, value))  # as the kernels want them
        fused = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.scale)
        return fused[:, 0, :, :features]


class Dot(nn.Module):
    r"""Weights :math:`q_i^\top k_j / m` over :math:`m` keys; their sum is not one."""

    def weights(self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
        return torch.bmm(query, key.mT) / key.shape[1]

    def read(
        self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"], value: Float[Tensor, "b m e"]
    ) -> Float[Tensor, "b n e"]:
        r"""Equal ``weights(query, key) @ value`` as :math:`q_i^\top (\sum_j k_j v_j^\top / m)`, in linear time."""
        (n, d), (m, e) = query.shape[1:], value.shape[1:]
        if not torch.compiler.is_compiling() and n * m * (d + e) < d * e * (n + m):
            return read(value, self.weights(query, key))
        return torch.bmm(query, torch.bmm(key.mT, value / m))


class Concatenation(nn.Module):
    r"""Weights :math:`\operatorname{ReLU}(w^\top [q_i; k_j]) / m` over :math:`m` keys; their sum is not one.

    With :math:`w = [u; v]` the score is :math:`a_i + b_j = u^\top q_i + v^\top k_j`: no pair is ever concatenated.

    Args:
        width: Features :math:`d` of queries and of keys.
    """

    def __init__(self, width: int):
        super().__init__()
        self.join = nn.Linear(2 * width, 1, bias=False)

    def scores(
        self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]:
        ours, theirs = self.join.weight[0].chunk(2)
        return query @ ours, key @ theirs

    def weights(self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
        a, b = self.scores(query, key)
        return (a[:, :, None] + b[:, None]).relu() / key.shape[1]

    def read(
        self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"], value: Float[Tensor, "b m e"]
    ) -> Float[Tensor, "b n e"]:
        r"""Equal ``weights(query, key) @ value`` in time :math:`O((n + m) \log m)`.

        With the keys sorted by :math:`-b_j`, those with :math:`a_i + b_j > 0` are the first few, and
        :math:`\sum_j (a_i + b_j)\, v_j = a_i \sum_j v_j + \sum_j b_j v_j` over them is two running sums.
        """
        n, (m, e) = query.shape[1], value.shape[1:]
        if not torch.compiler.is_compiling() and n * m * (e + 128) < 512 * (n + m) * e:  # as measured
            return read(value, self.weights(query, key))
        dtype = torch.promote_types(value.dtype, torch.float32)
        a, b = (score.to(dtype) for score in self.scores(query, key))
        threshold, order = (-b).sort()
        sorted_value = value.to(dtype).gather(1, order[..., None].expand_as(value))
        sums = torch.cat((sorted_value, -threshold[..., None] * sorted_value), 2).cumsum(1)
        sums = F.pad(sums, (0, 0, 1, 0))
        count = torch.searchsorted(threshold.detach(), a.detach().contiguous())
        plain, weighted = sums.gather(1, count[..., None].expand(-1, -1, sums.shape[2])).chunk(2, 2)
        return ((a[..., None] * plain + weighted) / m).to(value.dtype)
