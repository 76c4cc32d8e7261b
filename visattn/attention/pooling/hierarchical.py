"""Yang, Yang, Dyer, He, Smola, Hovy: Hierarchical Attention Networks for Document Classification (NAACL 2016)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax


class HierarchicalWeights(NamedTuple):
    """Weights over the regions of each crop, and over the crops of each bag."""

    region: Float[Tensor, "b 1 h w"]
    crop: Float[Tensor, "bags crops 1 1"]


class Level(nn.Module):
    r"""Weights :math:`\operatorname{softmax}_i(u^\top \tanh(W x_i + b))` for the items of one level.

    Args:
        channels: Features of an item.
        width: Features of the layer between.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.inner = nn.Linear(channels, width)
        self.context = nn.Linear(width, 1, bias=False)

    def forward(self, items: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n"]:
        logits = self.context(self.inner(items).tanh())[..., 0]
        if mask is None:
            return softmax(logits).to(items.dtype)
        empty = ~mask.any(1, keepdim=True)
        logits = logits.masked_fill(~(mask | empty), -torch.inf)
        return softmax(logits).masked_fill(empty, 0.0).to(items.dtype)


class HierarchicalAttentionPool(Attention):
    r"""Weigh the regions of each crop, then the crops of each bag: several views, photos or slides of one thing.

    .. math:: v_s = \sum_i a_{si} x_{si}, \quad y = \sum_s b_s v_s, \quad
              a_s = \operatorname{softmax}_i(u^\top \tanh(W x_{si} + w)), \;
              b = \operatorname{softmax}_s(u'^\top \tanh(W' v_s + w'))

    The paper's words and sentences are our regions and crops; in place of its recurrent encoders stands the backbone.
    A bag is ``crops`` images of the batch one after the other, so a model with this pool takes (bags · crops, 3, h, w)
    and answers for bags. Bags of fewer images are filled up and masked. What a region adds to its bag is the product of
    both weights; over the bag these sum to one.

    Args:
        channels: Channels :math:`c` of the map.
        width: Features of the layer between, on both levels.
        crops: Images of a bag.

    Raises:
        ValueError: If ``width`` or ``crops`` is not positive, or the batch is no whole number of bags.

    Example:
        >>> HierarchicalAttentionPool(64, crops=3)(torch.randn(6, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    paper = "doi:10.18653/v1/N16-1174"
    place = "pool"
    replaces = "pool"

    def __init__(self, channels: int, *, width: int = 128, crops: int = 1):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        if crops < 1:
            raise ValueError(f"crops must be positive, got {crops}")
        self.crops = crops
        self.region = Level(channels, width)
        self.crop = Level(channels, width)

    def attend(
        self, x: Float[Tensor, "b c h w"], mask: Bool[Tensor, "bags crops"] | None = None
    ) -> HierarchicalWeights:
        return self._walk(x, mask)[0]

    def read(
        self,
        x: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "bags crops"] | None = None,
        *,
        weights: HierarchicalWeights,
    ) -> Float[Tensor, "bags c"]:
        crops = self._bags(weights.region.flatten(2) @ x.flatten(2).mT)
        return (weights.crop[:, :, 0, 0][:, None] @ crops)[:, 0].to(x.dtype)

    def forward(
        self, x: Float[Tensor, "b c h w"], mask: Bool[Tensor, "bags crops"] | None = None
    ) -> Float[Tensor, "bags c"]:
        weights, crops = self._walk(x, mask)
        return (weights.crop[:, :, 0, 0][:, None] @ crops)[:, 0].to(x.dtype)

    def _walk(
        self, x: Float[Tensor, "b c h w"], mask: Bool[Tensor, "bags crops"] | None
    ) -> tuple[HierarchicalWeights, Float[Tensor, "bags crops c"]]:
        regions = x.flatten(2).mT
        a = self.region(regions)[:, None]
        crops = self._bags(a @ regions)
        b = self.crop(crops, mask)
        return HierarchicalWeights(a.view(x.shape[0], 1, *x.shape[2:]), b[:, :, None, None]), crops

    def _bags(self, crops: Float[Tensor, "b 1 c"]) -> Float[Tensor, "bags crops c"]:
        if crops.shape[0] % self.crops:
            raise ValueError(f"the batch must be whole bags of crops={self.crops} images, got {crops.shape[0]} images")
        return crops[:, 0].unflatten(0, (-1, self.crops))
