"""Li, Wang, Hu, Yang: Selective Kernel Networks (CVPR 2019)."""

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax
from visattn.attention.kernel.core import check_groups, mix


class SelectiveKernel(Attention):
    r"""Let every channel choose between convolutions of growing reach, by what all of them found.

    .. math:: y = \sum_m a_m \odot u_m, \quad u_m = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_m(x))),
        \quad a = \operatorname{softmax}_m\bigl(A_m\, \mathrm{ReLU}(\mathrm{BN}(W\, \mathrm{mean}_{hw}\textstyle\sum_m
        u_m))\bigr)

    Convolution :math:`m = 1, 2, \dots` is a 3×3 with dilation :math:`m`: the second stands for a 5×5, as in the paper.
    As in the released code, neither :math:`W` nor :math:`A` has biases. Our squeeze and select are the paper's
    :math:`W` and :math:`A`, our branches, reduction and groups its :math:`M, r, G`.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels :math:`c` to return; None: ``channels``.
        stride: Stride of the convolutions.
        groups: Groups :math:`G` of the convolutions.
        branches: Number :math:`M` of convolutions.
        reduction: Ratio :math:`r` by which the squeezed vector is shorter than ``out_channels``.
        min_width: Features :math:`L` that the squeezed vector has at least.

    Raises:
        ValueError: If ``groups`` does not divide both numbers of channels, or another option is not positive; in
            training, if the batch is one image: the squeezed vector is normalised over the batch.

    Example:
        >>> SelectiveKernel(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1903.06586"
    place = "convolutions"
    replaces = "convolution"

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        groups: int = 32,
        branches: int = 2,
        reduction: int = 16,
        min_width: int = 32,
    ):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        check_groups(groups, channels, out_channels)
        for name, value in {"branches": branches, "reduction": reduction, "min_width": min_width}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        width = max(out_channels // reduction, min_width)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 3, stride, reach, reach, groups, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            )
            for reach in range(1, branches + 1)
        )
        self.squeeze = nn.Sequential(nn.Linear(out_channels, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.select = nn.Linear(width, branches * out_channels, bias=False)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k d 1 1"]:
        return self._choose(self._convolve(x))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k d 1 1"]) -> Float[Tensor, "b d h2 w2"]:
        return mix(self._convolve(x), weights).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        maps = self._convolve(x)
        return mix(maps, self._choose(maps)).to(x.dtype)

    def _convolve(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]

    def _choose(self, maps: list[Tensor]) -> Float[Tensor, "b k d 1 1"]:
        logits = self.select(self.squeeze(sum(each.mean((2, 3)) for each in maps)))
        return softmax(logits.unflatten(1, (len(maps), -1)), 1)[..., None, None].to(maps[0].dtype)
