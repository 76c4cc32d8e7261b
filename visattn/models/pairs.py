"""Two images compared: one convolutional network for both, in which they may look at each other."""

from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Built
from visattn.attention.pairs.abcnn import MatchingAttention, MatchingPool

Scheme = Literal["ABCNN-1", "ABCNN-2", "ABCNN-3"]


class SiameseNetwork(Built):
    r"""Say whether two images show the same kind of thing, by how alike their features are at several levels.

    .. math:: \operatorname{logit} = w_0 + \sum_l w_l
        \cos\bigl(\operatorname{mean}_{hw} x^{(l)}, \operatorname{mean}_{hw} y^{(l)}\bigr)

    The images go through one network. Its stem gives level 0; each further level is a wide convolution, which also
    reads windows that only overlap the border, a hyperbolic tangent, and pooling in windows of the same size, after
    which the map is as large as before. In between the two may look at each other (arXiv:1512.05193):

    =============== ================================================================================================
    ``attention``   where
    =============== ================================================================================================
    None            nowhere: the paper's BCNN
    ABCNN-1         before each convolution, which reads a plane of what matches (``MatchingAttention``)
    ABCNN-2         at each pooling, where a position counts as much as it matches (``MatchingPool``)
    ABCNN-3         at both
    =============== ================================================================================================

    The paper's levels read the words of a sentence; ours read the map of a stem, in windows of two axes. Swapping the
    images changes nothing. All :math:`w_l` start at 1 and :math:`w_0` where equal images give a logit of 0.

    Args:
        backbone: Name of a timm model whose feature map is level 0; None: two small convolutions of stride 2.
        backbone_args: Arguments of ``timm.create_model``, such as ``img_size``.
        pretrained: Whether the backbone starts with its trained weights.
        stage: Which of the backbone's stages gives the map, counted as in a list.
        in_chans: Channels of the images.
        size: Height and width of the images.
        attention: One of the above.
        width: Channels of the levels, and of the stem without a backbone.
        kernel_size: Height and width of the windows.
        levels: How many levels follow the stem.
        normalized: Whether the pooling of ABCNN-2 and -3 is normalised, which in the paper it is not.

    Raises:
        ValueError: If ``attention`` is unknown, or ``width``, ``kernel_size`` or ``levels`` is not positive.

    Example:
        >>> network = SiameseNetwork(in_chans=1, size=(28, 28), attention="ABCNN-3")
        >>> network(torch.randn(2, 1, 28, 28), torch.randn(2, 1, 28, 28)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        backbone: str | None = None,
        *,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        stage: int = -1,
        in_chans: int = 3,
        size: tuple[int, int] = (64, 64),
        attention: Scheme | None = None,
        width: int = 50,
        kernel_size: int = 3,
        levels: int = 2,
        normalized: bool = False,
    ):
        super().__init__()
        if attention not in (None, "ABCNN-1", "ABCNN-2", "ABCNN-3"):
            raise ValueError(f"attention must be None, ABCNN-1, ABCNN-2 or ABCNN-3, got {attention!r}")
        for name, value in (("width", width), ("kernel_size", kernel_size), ("levels", levels)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        self.stem: nn.Module
        if backbone:
            only: dict[str, Any] = {
                "features_only": True,
                "out_indices": (stage,),
                "feature_cls": "getter",
                "in_chans": in_chans,
            }
            self.stem = timm.create_model(backbone, pretrained=pretrained, **only | (backbone_args or {}))
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, width, 3, stride=2, padding=1),
                nn.Tanh(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.Tanh(),
            )
        with torch.no_grad():
            channels, *grid = self.eval()._maps(torch.zeros(1, in_chans, *size)).shape[1:]
        self.levels = nn.ModuleList(
            Level(
                channels if k == 0 else width,
                width,
                kernel_size=kernel_size,
                size=(grid[0], grid[1]),
                attention=attention,
                normalized=normalized,
            )
            for k in range(levels)
        )
        self.head = nn.Linear(1 + levels, 1)
        nn.init.ones_(self.head.weight)  # likeness speaks for one kind; where chance has it speak against, none learns
        nn.init.constant_(self.head.bias, -1.0 - levels)
        self.train()

    def forward(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
        x, y = self._maps(torch.cat((x, y))).chunk(2)
        similar = [similarity(x, y)]
        for level in self.levels:
            x, y = level(x, y)
            similar.append(similarity(x, y))
        return self.head(torch.stack(similar, 1))[:, 0]

    def _maps(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d p q"]:
        maps = self.stem(images)
        return maps[0] if isinstance(maps, list) else maps


class Level(nn.Module):
    """Carry two feature maps through one wide convolution and one pooling, with attention between them.

    Args:
        channels: Channels of the maps.
        width: Channels of what becomes of them.
        kernel_size: Height and width of the windows of both.
        size: Height and width of the maps.
        attention: Where they look at each other, as in :class:`SiameseNetwork`.
        normalized: Whether the pooling of ABCNN-2 and -3 is normalised.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        kernel_size: int,
        size: tuple[int, int],
        attention: Scheme | None,
        normalized: bool,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        self.planes = MatchingAttention(channels, size=size) if attention in ("ABCNN-1", "ABCNN-3") else None
        self.conv = nn.Conv2d(channels * (2 if self.planes else 1), width, kernel_size, padding=kernel_size - 1)
        pools = attention in ("ABCNN-2", "ABCNN-3")
        self.pool = MatchingPool(width, kernel_size=kernel_size, normalized=normalized) if pools else None

    def forward(
        self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b d h w"]]:
        both = torch.cat((x, y))
        if self.planes:
            both = torch.cat((both, torch.cat(self.planes(x, y))), 1)
        both = self.conv(both).tanh()
        if self.pool:
            return self.pool(*both.chunk(2))
        x, y = F.avg_pool2d(both, self.kernel_size, 1).chunk(2)
        return x, y


def similarity(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Cosine of the angle between the means of two feature maps."""
    return F.cosine_similarity(x.mean((2, 3)), y.mean((2, 3)))
