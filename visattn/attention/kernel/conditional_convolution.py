"""Yang, Bender, Le, Ngiam: CondConv, Conditionally Parameterized Convolutions (NeurIPS 2019)."""

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.kernel.core import Kernels


class ConditionalConvolution(Attention):
    r"""Convolve every image with its own sum of experts, each weighed apart from the others.

    .. math:: y = \bigl(\textstyle\sum_k \alpha_k W_k\bigr) * x, \quad \alpha = \sigma(R\, \mathrm{mean}_{hw}(x))

    The weights lie between 0 and 1; their sum is not one. Our route is the paper's :math:`R`.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels to return; None: ``channels``.
        stride: Stride of the experts.
        groups: Groups of the experts.
        kernel_size: Height and width of an expert in pixels.
        experts: How many experts there are.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive, ``groups`` does not divide both numbers of channels, or
            ``experts`` is not positive.

    Example:
        >>> ConditionalConvolution(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1904.04971"
    place = "convolutions"
    replaces = "convolution"

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        groups: int = 1,
        kernel_size: int = 3,
        experts: int = 8,
    ):
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts must be positive, got {experts}")
        self.route = nn.Linear(channels, experts)
        self.experts = Kernels(
            experts,
            channels,
            channels if out_channels is None else out_channels,
            kernel_size=kernel_size,
            stride=stride,
            groups=groups,
            bias=False,
        )

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k 1 1 1"]:
        return self.route(x.mean((2, 3))).sigmoid()[..., None, None, None]

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k 1 1 1"]) -> Float[Tensor, "b d h2 w2"]:
        return self.experts(x, weights.flatten(1))
