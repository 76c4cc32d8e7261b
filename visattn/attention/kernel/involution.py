"""Li, Hu, Wang, Li, Zhu, Wang, Zhang, Chen: Involution: Inverting the Inherence of Convolution (CVPR 2021)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.kernel.core import aggregate, check_kernel_size


class Involution(Attention):
    r"""Make a kernel at every position, out of what is there, and read the positions around with it.

    .. math:: y_{i, c} = \sum_{j \in k \times k} K_{i, g(c), j}\, x_{i + j, c},
        \quad K_i = W_2\, \mathrm{ReLU}(\mathrm{BN}(W_1 x_i))

    All channels of a group share its kernel; no softmax: a kernel may have any sign and sum. With a stride, the kernels
    are made from the mean of the pixels they stand for, of those inside the map at its border: so any size will do,
    while the released code wants multiples of the stride. Our squeeze and span are the paper's :math:`W_1` and
    :math:`W_2`, without and with biases.

    Args:
        channels: Channels of the feature map, which it keeps.
        stride: Distance in pixels between the positions of the output.
        kernel_size: Height and width :math:`k` of a kernel in pixels.
        group_channels: Channels of a group.
        reduction: Ratio by which the layer inside is narrower than ``channels``.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive, ``group_channels`` does not divide ``channels``, or
            ``reduction`` does not lie between 1 and ``channels``; in training, if there is but one position in the
            batch.

    Example:
        >>> Involution(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2103.06255"
    place = "convolutions"
    replaces = "convolution"

    def __init__(
        self,
        channels: int,
        *,
        stride: int = 1,
        kernel_size: int = 7,
        group_channels: int = 16,
        reduction: int = 4,
    ):
        super().__init__()
        check_kernel_size(kernel_size)
        if group_channels < 1 or channels % group_channels:
            raise ValueError(f"group_channels must divide channels={channels}, got {group_channels}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        self.stride, self.kernel_size, self.group_channels = stride, kernel_size, group_channels
        width = channels // reduction
        self.squeeze = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.span = nn.Conv2d(width, kernel_size**2 * channels // group_channels, 1)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b g k k h2 w2"]:
        seen = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.span(self.squeeze(seen)).unflatten(1, (-1, self.kernel_size, self.kernel_size))

    def read(
        self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b g k k h2 w2"]
    ) -> Float[Tensor, "b c h2 w2"]:
        return aggregate(x.unflatten(1, (-1, self.group_channels)), weights, self.stride).flatten(1, 2)
