"""A network that asks its last map by what it has seen on the way there."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.pooling.attention_pool import AttentionPool
from visattn.models.network import Network, look


class RecurrentPoolNetwork(Network):
    r"""Ask the last map of a backbone by the state of an LSTM that has read the mean vectors of the stages before.

    .. math:: z = W \operatorname{pool}(x^S \mid q), \quad
        q = \mathrm{LSTM}\bigl(\mathrm{mean}_{hw}(x^1), \dots, \mathrm{mean}_{hw}(x^{S-1})\bigr)

    The pool is an :class:`~visattn.attention.AttentionPool` with ``query="recurrent"``. What the backbone has behind
    its last stage falls away.

    Args:
        backbone: Name of a timm model, or the model itself, which becomes part of the network; such a network cannot be
            saved.
        num_classes: Number of classes; None: as many as the backbone has.
        pretrained: Whether a backbone that is named starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, such as ``in_chans``, for a backbone that is named.
        stages: The last so many levels of the backbone (of timm's ``forward_intermediates``), or the numbers of some,
            counted as in a list; the map of the last of them is asked.
        heads: Number of heads.

    Raises:
        ValueError: If the backbone has no such levels, there is but one, or ``heads`` does not divide the channels of
            the last.

    Example:
        >>> network = RecurrentPoolNetwork("test_resnet", num_classes=10)
        >>> network(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_classes: int | None = None,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        stages: int | Sequence[int] = 4,
        heads: int = 8,
    ):
        super().__init__(backbone, num_classes, pretrained, backbone_args)
        seen = look(self.backbone)
        self.levels = seen.levels(stages)
        *before, channels = (seen.maps[level].shape[1] for level in self.levels)
        if not before:
            raise ValueError(f"stages must be at least two, got {stages}")
        self.backbone.prune_intermediate_layers(list(self.levels), prune_norm=True)
        self.pool = AttentionPool(channels, query="recurrent", heads=heads, stages=before)
        self.classifier = nn.Linear(channels, self.num_classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        maps = self.backbone.forward_intermediates(images, indices=list(self.levels), intermediates_only=True)
        return self.classifier(self.pool(maps[-1], *maps[:-1]))
