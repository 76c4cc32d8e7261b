"""Guo, Lu, Liu, Cheng, Hu: Visual Attention Network (Computational Visual Media 2023)."""

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention


class LargeKernelAttention(Attention):
    r"""Weigh every channel at every position by a wide neighbourhood, seen through three cheap convolutions.

    .. math:: y = x + W_2 (u \odot A(u)), \quad u = \mathrm{GELU}(W_1 x), \quad
        A = W_0 * \mathrm{dw}_{\lceil k/d \rceil,\, d} * \mathrm{dw}_{2d - 1}

    :math:`\mathrm{dw}_{n,\,d}` is a depthwise convolution of :math:`n \times n` taps, :math:`d` apart. Together they
    see every pixel of a field at least :math:`k` wide. The weights have no sigmoid: they take either sign and any size.

    Args:
        channels: Channels of the feature map.
        kernel_size: Width :math:`k` of the convolution that is taken apart.
        dilation: Distance :math:`d` in pixels between the taps of the second convolution.
        project: Whether :math:`W_1`, :math:`W_2` and the sum around them belong to it, as in the paper's networks;
            without them it is :math:`y = x \odot A(x)`.

    Raises:
        ValueError: If ``dilation`` is not positive, or ``kernel_size`` does not need an odd number of taps.

    Example:
        >>> LargeKernelAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2202.09741"
    place = "blocks"

    def __init__(self, channels: int, *, kernel_size: int = 21, dilation: int = 3, project: bool = True):
        super().__init__()
        if dilation < 1:
            raise ValueError(f"dilation must be positive, got {dilation}")
        taps = -(-kernel_size // dilation)
        if taps < 1 or taps % 2 == 0:
            raise ValueError(
                f"kernel_size must need an odd number of taps at dilation={dilation}, got {kernel_size} with {taps}"
            )
        self.project = project
        self.enter = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU()) if project else nn.Identity()
        self.local = nn.Conv2d(channels, channels, 2 * dilation - 1, padding=dilation - 1, groups=channels)
        self.distant = nn.Conv2d(
            channels, channels, taps, padding=dilation * (taps // 2), dilation=dilation, groups=channels
        )
        self.mix = nn.Conv2d(channels, channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1) if project else nn.Identity()

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self._look(self.enter(x))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self._write(x, self.enter(x) * weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        entered = self.enter(x)
        return self._write(x, entered * self._look(entered))

    def _look(self, entered: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.mix(self.distant(self.local(entered)))

    def _write(self, x: Float[Tensor, "b c h w"], weighed: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.leave(weighed).to(x.dtype)
        return x + y if self.project else y
