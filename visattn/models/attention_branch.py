"""A network in which a second classifier, beside the last stage, says where to look."""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.spatial.attention_branch import AttentionBranch
from visattn.models.network import Network, look


class Logits(NamedTuple):
    """What both branches of an :class:`AttentionBranchNetwork` say; each has its loss."""

    perception: Float[Tensor, "b k"]
    attention: Float[Tensor, "b k"]


class AttentionBranchNetwork(Network):
    r"""Split a backbone before its last stage, and let a branch that classifies by itself stress what the rest reads.

    .. math:: F = \operatorname{trunk}(x), \quad M, z_a = \operatorname{branch}(F), \quad
        z_p = \operatorname{head}\bigl(\operatorname{stage}(F \odot (1 + M))\bigr)

    The branch (arXiv:1812.10025, :class:`~visattn.attention.AttentionBranch`) starts with a copy of all that follows in
    the backbone up to its head, with stride 1. In training both logits are returned, as :class:`Logits`, and the loss
    is the sum of both losses; in evaluation only those of the perception branch.

    Args:
        backbone: Name of a timm model, or the model itself, which becomes part of the network; such a network cannot be
            saved.
        num_classes: Number of classes; None: as many as the backbone has.
        pretrained: Whether a backbone that is named starts with its trained weights; so does the branch.
        backbone_args: Arguments of ``timm.create_model``, such as ``in_chans``, for a backbone that is named.
        split: The level of the backbone (of timm's ``forward_intermediates``) whose map is stressed, counted as in a
            list.
        kernel_size: Width of the convolution that makes the map: 1 as in the paper, 3 in the released code.

    Raises:
        ValueError: If the backbone cannot be split there: what follows is not one module by one, or loses positions
            with stride 1.

    Example:
        >>> network = AttentionBranchNetwork("test_resnet", num_classes=10)
        >>> network.eval()(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
        >>> [logits.shape for logits in network.train()(torch.randn(2, 3, 64, 96))]
        [torch.Size([2, 10]), torch.Size([2, 10])]
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_classes: int | None = None,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        split: int = -2,
        kernel_size: int = 1,
    ):
        super().__init__(backbone, num_classes, pretrained, backbone_args)
        seen = look(self.backbone)
        (self.level,) = seen.levels((split,))
        self.behind = seen.behind(self.level)
        stage = undivided([self.backbone.get_submodule(name) for name in self.behind])
        if not any(True for _ in stage.parameters()):
            raise ValueError(f"split must leave layers of {seen.name} behind it, got {split}")
        given = seen.maps[self.level]
        try:
            with torch.no_grad():
                returned = copy.deepcopy(stage).to("meta").eval()(given)
            if returned.shape[2:] != given.shape[2:]:
                sizes = " to ".join(f"{height}×{width}" for height, width in (given.shape[2:], returned.shape[2:]))
                raise ValueError(f"it turns {sizes}")
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{seen.name} cannot be split at level {self.level}: what follows does not run with stride 1: {reason}"
            ) from error
        self.attention = AttentionBranch(
            given.shape[1],
            classes=self.num_classes,
            stage=stage,
            features=returned.shape[1],
            kernel_size=kernel_size,
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> Logits | Float[Tensor, "b k"]:
        (x,) = self.backbone.forward_intermediates(
            images, indices=[self.level], intermediates_only=True, stop_early=True
        )
        if not self.training:
            return self._perceive(self.attention(x))
        weights, logits = self.attention.look(x)
        return Logits(self._perceive(self.attention.read(x, weights=weights)), logits)

    def _perceive(self, stressed: Float[Tensor, "b d p q"]) -> Float[Tensor, "b k"]:
        for name in self.behind:
            stressed = self.backbone.get_submodule(name)(stressed)
        return self.backbone.forward_head(stressed)


def undivided(modules: list[nn.Module]) -> nn.Sequential:
    """Copy modules, with stride 1 wherever they have another; a pool that only divides the map falls away."""
    stage = nn.Sequential(*copy.deepcopy(modules))
    for parent in list(stage.modules()):
        for name, child in parent.named_children():
            module: Any = child
            stride = getattr(module, "stride", 1)
            if not isinstance(stride, (int, tuple)) or pair(stride) == (1, 1):
                continue
            if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)) and pair(module.kernel_size) == pair(stride):
                parent._modules[name] = nn.Identity()
                continue
            module.stride = (1, 1) if isinstance(stride, tuple) else 1
            if isinstance(module, nn.Conv2d) and any(size % 2 == 0 for size in module.kernel_size):
                module.padding = "same"
    return stage


def pair(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return sizes if isinstance(sizes, tuple) else (sizes, sizes)
