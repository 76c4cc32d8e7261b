"""A network that classifies by what it attends to at several stages, and by nothing else."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.pooling.pay_attention import PayAttention
from visattn.models.network import Network, look


class LearnToPayAttention(Network):
    r"""Ask the maps of several stages by the vector of the whole image, and classify what is read from them alone.

    .. math:: g = \operatorname{backbone}(x), \quad y_s = \sum_i a^s_i\, x^s_i, \quad
        z = W\, [y_1; \dots; y_S] \ \text{ or } \ z = \log \tfrac1S \sum_s \operatorname{softmax}(W_s\, y_s)

    The classifier of the backbone gives way; the vector :math:`g` it would read only asks
    (arXiv:1804.02391, :class:`~visattn.attention.PayAttention`). The paper's VGG pools later than others do, so that
    its maps are larger.

    Args:
        backbone: Name of a timm model, or the model itself, which becomes part of the network; such a network cannot be
            saved.
        num_classes: Number of classes; None: as many as the backbone has.
        pretrained: Whether a backbone that is named starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, such as ``in_chans``, for a backbone that is named.
        stages: The last so many levels of the backbone (of timm's ``forward_intermediates``), 2 and 3 being the paper's
            att2 and att3; or the numbers of some, counted as in a list.
        compatibility: ``"parametrised"`` (the paper's pc) or ``"dot"`` (its dp).
        normalise: ``"softmax"`` as in the paper, or ``"sigmoid"``.
        combine: One classifier of all that was read, ``"concatenate"``; or one for each, ``"independent"``, whose
            probabilities are averaged: the logarithm of their mean is returned.

    Raises:
        ValueError: If the backbone has no such levels, or ``combine`` is neither of the two.

    Example:
        >>> network = LearnToPayAttention("test_resnet", num_classes=10)
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
        stages: int | Sequence[int] = 3,
        compatibility: Literal["parametrised", "dot"] = "parametrised",
        normalise: Literal["softmax", "sigmoid"] = "softmax",
        combine: Literal["concatenate", "independent"] = "concatenate",
    ):
        if combine not in ("concatenate", "independent"):
            raise ValueError(f"combine must be concatenate or independent, got {combine!r}")
        super().__init__(backbone, num_classes, pretrained, backbone_args)
        self.backbone.reset_classifier(0)
        seen = look(self.backbone)
        self.levels, self.combine = seen.levels(stages), combine
        width = seen.vector.shape[1]
        self.attention = nn.ModuleList(
            PayAttention(
                seen.maps[level].shape[1], global_channels=width, compatibility=compatibility, normalise=normalise
            )
            for level in self.levels
        )
        count = len(self.levels)
        inputs = [count * width] if combine == "concatenate" else [width] * count
        self.classifiers = nn.ModuleList(nn.Linear(each, self.num_classes) for each in inputs)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        last, maps = self.backbone.forward_intermediates(images, indices=list(self.levels))
        g = self.backbone.forward_head(last, pre_logits=True)
        found = [attention(x, g) for attention, x in zip(self.attention, maps, strict=True)]
        if self.combine == "concatenate":
            return self.classifiers[0](torch.cat(found, 1))
        each = [classifier(y).log_softmax(1) for classifier, y in zip(self.classifiers, found, strict=True)]
        return torch.stack(each).logsumexp(0) - math.log(len(each))
