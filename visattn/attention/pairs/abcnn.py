"""Yin, Schütze, Xiang, Zhou: ABCNN: Attention-Based Convolutional Neural Network for Modeling Sentence Pairs (2016)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import uncast


def match(x: Float[Tensor, "b c n"], y: Float[Tensor, "b c m"]) -> Float[Tensor, "b n m"]:
    r"""Weights :math:`1 / (1 + \lVert x_i - y_j \rVert)`, in at least float32.

    On a CPU the distances come out of one matrix product, several times faster than pair by pair; what is equal up to
    its rounding counts as equal, and has no gradient. On a GPU such products may be rounded to ten bits.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y, narrow = x.to(dtype), y.to(dtype), x.dtype
    if x.device.type != "cpu":
        distance = torch.cdist(x.mT, y.mT, compute_mode="donot_use_mm_for_euclid_dist")
        return (1 / (1 + distance)).to(narrow)
    with uncast(x.device):
        squares = x.square().sum(1)[:, :, None] + y.square().sum(1)[:, None]
        square = torch.baddbmm(squares, x.mT, y, alpha=-2)
    equal = square <= 16 * torch.finfo(dtype).eps * squares
    distance = square.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)
    return (1 / (1 + distance)).to(narrow)


class _Matching(Attention):
    paper = "arXiv:1512.05193"
    queried = True

    def attend(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c p q"]) -> Float[Tensor, "b n m"]:
        return match(x.flatten(2), y.flatten(2))


class MatchingAttention(_Matching):
    r"""Show each of two feature maps, as one more plane, what matches in the other (ABCNN-1).

    .. math:: x'_i = \sum_j A_{ij}\, v_j, \quad y'_j = \sum_i A_{ij}\, v_i, \quad
        A_{ij} = \frac{1}{1 + \lVert x_i - y_j \rVert}

    A convolution then reads each map and its plane together, as ``torch.cat((x, x_plane), 1)``. Our :math:`x, y` are
    the paper's :math:`F_0, F_1`, and the learned :math:`v_j` and :math:`v_i` the columns of its :math:`W_0` and
    :math:`W_1`: a vector for every position, the same for all images.

    Args:
        channels: Channels :math:`c` of both feature maps.
        values: What the weights read: ``"learned"`` vectors as in the paper, or the features of the other ``"map"``,
            where the weights of each position are divided by their sum: no parameters, and maps of any size.
        shared: Whether one set of learned vectors serves both maps, which must be for the two to be interchangeable.
        size: Height and width of both feature maps, which learned vectors are tied to.

    Raises:
        ValueError: If ``values`` is unknown, ``size`` is missing where vectors are learned, or a map has another size.

    Example:
        >>> x, y = MatchingAttention(64, size=(8, 8))(torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8))
        >>> x.shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        values: Literal["learned", "map"] = "learned",
        shared: bool = True,
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if values not in ("learned", "map"):
            raise ValueError(f"values must be learned or map, got {values!r}")
        if size is None and values == "learned":
            raise ValueError("size must be the (height, width) of the feature map, got None")
        self.size = size if values == "learned" else None
        if self.size:
            positions = self.size[0] * self.size[1]
            self.values = nn.Parameter(torch.empty(1 if shared else 2, channels, positions))
            nn.init.uniform_(self.values, -(positions**-0.5), positions**-0.5)

    def read(
        self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c p q"], *, weights: Float[Tensor, "b n m"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c p q"]]:
        if self.size:
            for each in (x, y):
                if tuple(each.shape[2:]) != tuple(self.size):
                    raise ValueError(f"size must be {tuple(self.size)}, as given, got {tuple(each.shape[2:])}")
            ours, theirs = (self.values[k].expand(x.shape[0], -1, -1) for k in (0, -1))
            x_plane, y_plane = torch.bmm(ours, weights.mT), torch.bmm(theirs, weights)
        else:
            x_plane = torch.bmm(y.flatten(2), (weights / weights.sum(2, keepdim=True)).mT)
            y_plane = torch.bmm(x.flatten(2), weights / weights.sum(1, keepdim=True))
        return x_plane.view(x.shape).to(x.dtype), y_plane.view(y.shape).to(y.dtype)


class MatchingPool(_Matching):
    r"""Pool each of two feature maps in windows, every position as strong as it matches the other map (ABCNN-2).

    .. math:: x'_i = \sum_{k \in \mathrm{window}(i)} a_k\, x_k, \quad a_k = \sum_j A_{kj}, \quad
        A_{kj} = \frac{1}{1 + \lVert x_k - y_j \rVert}

    and likewise for :math:`y` with the sums over the columns of :math:`A`. Our :math:`x, y` are the paper's :math:`F_0,
    F_1` as its convolutions leave them, wider by :math:`w - 1` than what comes out, and our ``kernel_size`` its
    :math:`w`. The sums grow with the size of the other map.

    Args:
        channels: Channels of both feature maps.
        kernel_size: Height and width of the windows, which lie one position apart.
        padding: Zeros around the maps; without any, what comes out is smaller by ``kernel_size - 1``.
        normalized: Whether the strengths of a map are divided by their mean, and the sums by the positions in a window:
            where everything matches alike this is average pooling. The paper does neither.

    Raises:
        ValueError: If ``kernel_size`` is not positive, ``padding`` does not lie between 0 and half of it, or a padded
            map is smaller than a window.

    Example:
        >>> x, y = MatchingPool(64)(torch.randn(2, 64, 10, 10), torch.randn(2, 64, 10, 10))
        >>> x.shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, channels: int, *, kernel_size: int = 3, padding: int = 0, normalized: bool = False):
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be positive, got {kernel_size}")
        if not 0 <= padding <= kernel_size // 2:
            raise ValueError(f"padding must lie between 0 and half of kernel_size={kernel_size}, got {padding}")
        self.kernel_size, self.padding, self.normalized = kernel_size, padding, normalized

    def read(
        self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c p q"], *, weights: Float[Tensor, "b n m"]
    ) -> tuple[Float[Tensor, "b c s t"], Float[Tensor, "b c u v"]]:
        return self._pool(x, weights.sum(2)), self._pool(y, weights.sum(1))

    def _pool(self, x: Float[Tensor, "b c h w"], strength: Float[Tensor, "b n"]) -> Float[Tensor, "b c s t"]:
        if min(x.shape[2:]) + 2 * self.padding < self.kernel_size:
            least = self.kernel_size - 2 * self.padding
            raise ValueError(f"maps must be at least {least} high and wide, got {tuple(x.shape[2:])}")
        if self.normalized:
            strength = strength / strength.mean(1, keepdim=True)
        weighted = x * strength.unflatten(1, x.shape[2:])[:, None]
        divisor = None if self.normalized else 1
        return F.avg_pool2d(weighted, self.kernel_size, 1, self.padding, divisor_override=divisor)
