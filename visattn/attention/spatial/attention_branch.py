"""Fukui, Hirakawa, Yamashita, Fujiyoshi: Attention Branch Network (CVPR 2019)."""

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class AttentionBranch(Attention):
    r"""Stress the positions at which a branch beside the network, with a loss of its own, sees the classes.

    .. math:: y = x \odot (1 + M), \quad M = \sigma\bigl(\mathrm{BN}(\mathrm{conv}_k(f))\bigr), \quad
        f = \mathrm{ReLU}\bigl(\mathrm{BN}(W_1\, \mathrm{BN}(s(x)))\bigr)

    There is one map :math:`f` for each class; :meth:`look` also returns the logits :math:`W_2\, \mathrm{mean}_{hw}(f)`
    of the branch, whose loss is to be added to that of the network, or the map learns only what the network needs. As
    in the released code no layer has a bias. Used in :class:`~visattn.models.AttentionBranchNetwork`.

    Args:
        channels: Channels of the feature map.
        classes: Number of classes.
        stage: What makes features of the map, :math:`s`: in the paper a copy of the backbone's last stage with stride
            1; None: nothing.
        features: Channels of what ``stage`` returns; None: ``channels``.
        kernel_size: Width :math:`k` of the convolution that makes one map of all: 1 as in the paper, 3 in the released
            code.

    Raises:
        ValueError: If ``classes`` is not positive, or ``kernel_size`` is even or not positive; in training, if there is
            but one position in the batch.

    Example:
        >>> AttentionBranch(64, classes=10)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1812.10025"
    neutral = 0.0

    def __init__(
        self,
        channels: int,
        *,
        classes: int = 1000,
        stage: nn.Module | None = None,
        features: int | None = None,
        kernel_size: int = 1,
    ):
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be positive, got {classes}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.stage = nn.Identity() if stage is None else stage
        self.classes = nn.Sequential(
            nn.BatchNorm2d(features or channels),
            nn.Conv2d(features or channels, classes, 1, bias=False),
            nn.BatchNorm2d(classes),
            nn.ReLU(),
        )
        self.map = nn.Sequential(
            nn.Conv2d(classes, 1, kernel_size, padding=kernel_size // 2, bias=False), nn.BatchNorm2d(1), nn.Sigmoid()
        )
        self.classifier = nn.Linear(classes, classes, bias=False)

    def look(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b k"]]:
        """Return the weights, and the logits of the branch."""
        maps = self.classes(self.stage(x))
        return self.map(maps), self.classifier(maps.mean((2, 3)))

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        return self.map(self.classes(self.stage(x)))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
        return x * (1 + weights).to(x.dtype)
