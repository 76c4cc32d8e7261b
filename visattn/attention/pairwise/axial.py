"""Wang, Zhu, Green, Adam, Yuille, Chen: Axial-DeepLab: Stand-Alone Axial-Attention for Segmentation (ECCV 2020)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import softmax
from visattn.attention.pairwise.positions import near


class AxialWeights(NamedTuple):
    """Weights along the columns and then along the rows, in the form of all pairs of positions."""

    height: Float[Tensor, "b heads n m"]
    width: Float[Tensor, "b heads n m"]


class Axis(nn.Module):
    """Attention along lines: ``b c l`` to ``b d l``.

    Args:
        channels: Channels of a line.
        out_channels: Channels of the result.
        length: Positions of a line.
        heads: How many heads there are.
    """

    def __init__(self, channels: int, out_channels: int, length: int, heads: int):
        super().__init__()
        width = out_channels // heads
        self.widths = width // 2, width // 2, width  # of query, key and value
        self.heads = heads
        self.project = nn.Conv1d(channels, 2 * out_channels, 1, bias=False)
        self.norm = nn.BatchNorm1d(2 * out_channels)
        self.positions = nn.Parameter(torch.empty(2 * length - 1, 2 * width))
        self.logit_norm = nn.BatchNorm2d(3 * heads)
        self.out_norm = nn.BatchNorm1d(2 * out_channels)
        nn.init.normal_(self.project.weight, std=channels**-0.5)
        nn.init.normal_(self.positions, std=width**-0.5)

    def project_and_weigh(
        self, x: Float[Tensor, "b c l"]
    ) -> tuple[Float[Tensor, "b heads d l"], Float[Tensor, "b heads n m"]]:
        """The values and their weights."""
        query, key, value = self.norm(self.project(x)).unflatten(1, (self.heads, -1)).split(self.widths, 2)
        to_query, to_key, _ = near(self.positions, x.shape[2]).split(self.widths, 1)
        content = query.mT @ key
        asked = torch.einsum("bgdi,idj->bgij", query, to_query)
        offered = torch.einsum("bgdj,idj->bgij", key, to_key)
        logits = self.logit_norm(torch.cat((content, asked, offered), 1)).unflatten(1, (3, -1)).sum(1)
        return value, softmax(logits).to(value.dtype)

    def read(
        self, value: Float[Tensor, "b heads d l"], weights: Float[Tensor, "b heads n m"]
    ) -> Float[Tensor, "b c l"]:
        placed = near(self.positions, value.shape[3])[:, -self.widths[2] :]
        sums = value @ weights.mT, torch.einsum("bgij,idj->bgdi", weights, placed)
        return self.out_norm(torch.stack(sums, 3).flatten(1, 3)).unflatten(1, (-1, 2)).sum(2)


class AxialAttention(Attention):
    r"""Let every position read its column, and then its row, with learned distances in query, key and value.

    .. math::
        y_o = \mathrm{BN}\Bigl(\sum_p a_{op} v_p\Bigr) + \mathrm{BN}\Bigl(\sum_p a_{op} r^v_{p-o}\Bigr), \quad
        a_{op} = \operatorname{softmax}_p\bigl(\mathrm{BN}(q_o^\top k_p) + \mathrm{BN}(q_o^\top r^q_{p-o})
        + \mathrm{BN}(k_p^\top r^k_{p-o})\bigr)

    Queries and keys have half the features of a value; they come from one projection with a batch norm. Heads share the
    vectors :math:`r`. Nothing is divided by a :math:`\sqrt d`. The released code counts the distances of :math:`r^q`
    and :math:`r^v` the other way round, so those of its tables are ours upside down. Our heads are its groups.

    Args:
        channels: Channels of the feature map.
        size: Height and width of the feature map, the spans of the two axes.
        out_channels: Channels of the result; None: as many as ``channels``.
        stride: Positions of the map for one of the result, along each axis; their mean is taken at the end.
        heads: How many heads there are.

    Raises:
        ValueError: If ``size`` is missing or a map is of another, the channels of the result are not divisible by twice
            ``heads``, or ``stride`` is not positive; in training, if the batch is one position.

    Example:
        >>> AxialAttention(64, size=(8, 8))(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2003.07853"
    place = "convolutions"
    replaces = "convolution"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        size: tuple[int, int] | None = None,
        out_channels: int | None = None,
        stride: int = 1,
        heads: int = 8,
    ):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if size is None:
            raise ValueError("size must be the (height, width) of the feature map, got None")
        if heads < 1 or out_channels % (2 * heads):
            raise ValueError(f"heads must divide half of out_channels={out_channels}, got {heads}")
        if stride < 1:
            raise ValueError(f"stride must be positive, got {stride}")
        self.size, self.stride = size, stride
        self.height = Axis(channels, out_channels, size[0], heads)
        self.width = Axis(out_channels, out_channels, size[1], heads)

    def attend(self, x: Float[Tensor, "b c h w"]) -> AxialWeights:
        value, along_height = self.height.project_and_weigh(self._columns(x))
        between = self._from_columns(self.height.read(value, along_height), x)
        _, along_width = self.width.project_and_weigh(self._rows(between))
        (h, w), batch = self.size, (x.shape[0], -1)
        height = torch.diag_embed(along_height.unflatten(0, batch).permute(0, 2, 3, 4, 1))  # b g h h w w
        width = torch.diag_embed(along_width.unflatten(0, batch).permute(0, 2, 3, 4, 1))  # b g w w h h
        return AxialWeights(
            height.permute(0, 1, 2, 4, 3, 5).reshape(x.shape[0], -1, h * w, h * w),
            width.permute(0, 1, 4, 2, 5, 3).reshape(x.shape[0], -1, h * w, h * w),
        )

    def read(self, x: Float[Tensor, "b c h w"], *, weights: AxialWeights) -> Float[Tensor, "b o h2 w2"]:
        height, width = (each.unflatten(2, self.size).unflatten(4, self.size) for each in weights)  # b g h w h w
        along_height = height.diagonal(dim1=3, dim2=5).permute(0, 4, 1, 2, 3).flatten(0, 1)
        along_width = width.diagonal(dim1=2, dim2=4).permute(0, 4, 1, 2, 3).flatten(0, 1)
        value, _ = self.height.project_and_weigh(self._columns(x))
        between = self._from_columns(self.height.read(value, along_height), x)
        value, _ = self.width.project_and_weigh(self._rows(between))
        return self._write(x, self.width.read(value, along_width))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        between = self._from_columns(self.height.read(*self.height.project_and_weigh(self._columns(x))), x)
        return self._write(x, self.width.read(*self.width.project_and_weigh(self._rows(between))))

    def _columns(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "bw c h"]:
        if x.shape[2:] != self.size:
            raise ValueError(f"size must be {self.size} as constructed, got {tuple(x.shape[2:])}")
        return x.permute(0, 3, 1, 2).flatten(0, 1)

    def _rows(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "bh c w"]:
        return x.permute(0, 2, 1, 3).flatten(0, 1)

    def _from_columns(self, y: Float[Tensor, "bw d h"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 3, 1)

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "bh d w"]) -> Float[Tensor, "b o h2 w2"]:
        y = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2).to(x.dtype)
        return y if self.stride == 1 else F.avg_pool2d(y, self.stride, ceil_mode=True)
