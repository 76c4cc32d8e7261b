"""The positions of a backbone's last map as regions that are asked: by a sentence, or by a question."""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Built
from visattn.attention.pairwise.positions import sinusoid_2d
from visattn.attention.pairwise.transformer_block import TransformerBlock2d
from visattn.models.network import as_timm_has_it, at_least_one, image_for, named
from visattn.surgery import sites


class Regions(NamedTuple):
    """What is looked at."""

    memory: Float[Tensor, "b l d"]
    """A vector for each region."""
    size: tuple[int, int]
    """Height and width of the map whose positions, row by row, the regions are."""


class RegionNetwork(Built):
    r"""A network that asks the regions of an image.

    The positions of the backbone's last map, as many as there are, are the regions; they are never resized. With a
    ``width`` they are first narrowed by :math:`\operatorname{ReLU}(W \operatorname{LN}(v))`; they may then look at each
    other, by ``layers`` transformer blocks that know rows and columns.

    Args:
        backbone: Name of a timm model, or the model itself, which is then taken as it is; such a network is not saved.
        pretrained: Whether a backbone that is named starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, for a backbone that is named.
        width: Features of a region; None: as many as the backbone has.
        placed: Whether regions are told their rows and columns, by sines and cosines that are added to them.
        layers: How many transformer blocks the regions go through.
        heads: How many heads their attention has.
        dropout: Probability to drop a number of a region.

    Raises:
        ValueError: If an option is out of its range.
    """

    width: int
    """Features of a region."""

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        pretrained: bool,
        backbone_args: dict[str, Any] | None,
        width: int | None,
        placed: bool,
        layers: int,
        heads: int,
        dropout: float,
    ):
        super().__init__()
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        at_least_one(heads=heads, **{} if width is None else {"width": width})
        if layers < 0:
            raise ValueError(f"layers must not be negative, got {layers}")
        if not isinstance(backbone, str) and (pretrained or backbone_args):
            raise ValueError("pretrained and backbone_args are for a backbone that is named, got a model")
        model: Any = backbone
        if isinstance(backbone, str):
            options = {"num_classes": 0} | (backbone_args or {})
            model = named("backbone", backbone, pretrained=pretrained, **options)
            self.arguments |= as_timm_has_it(backbone, model)
        self.backbone = model
        (self.site,) = sites(model, at="head")
        features = self.site.channels
        self.narrow: nn.Module = nn.Identity()
        if width is not None:
            self.narrow = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.ReLU())
            features = width
        if placed and features % 4:
            raise ValueError(f"width must be divisible by 4 for regions to be told their places, got {features}")
        self.placed = placed
        blocks = [TransformerBlock2d(features, heads=heads, positions="sinusoidal") for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(features) if layers else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.width = features

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e rows columns"]:
        """Return the last map of the backbone: what a frozen one need not compute twice."""
        return self.site.to_map(self.backbone.forward_features(images))

    def freeze_unread(self) -> None:
        """Have parameters of the backbone that regions do not depend on, such as its head's, ask for no gradient."""
        shell: Any = copy.deepcopy(self.backbone).to("meta").requires_grad_(True)
        last = shell.forward_features(image_for(shell))
        found = torch.autograd.grad(last.sum(), [*shell.parameters()], allow_unused=True)
        for parameter, gradient in zip(self.backbone.parameters(), found, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)

    def regions(self, features: Float[Tensor, "b e rows columns"]) -> Regions:
        """Return what is looked at, of a map of the backbone."""
        x = self.narrow(features.movedim(1, -1)).movedim(-1, 1)
        size = (features.shape[2], features.shape[3])
        if self.placed:
            x = x + sinusoid_2d(*size, self.width, dtype=x.dtype, device=x.device)
        return Regions(self.dropout(self.norm(self.blocks(x).flatten(2).mT)), size)
