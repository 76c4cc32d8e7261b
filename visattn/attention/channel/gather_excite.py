"""Hu, Shen, Albanie, Sun, Vedaldi: Gather-Excite: Exploiting Feature Context in CNNs (NeurIPS 2018)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.channel.core import scale


class GatherExcite(Attention):
    r"""Weigh every channel at every position by what is gathered of it from a neighbourhood, or from the whole map.

    .. math:: y = x \odot \sigma\bigl(\mathrm{up}(f(\xi(x)))\bigr)

    ===================== ========== ============= =====================================================
    in the paper          ``gather`` ``reduction`` how :math:`\xi` gathers
    ===================== ========== ============= =====================================================
    GE-:math:`\theta^-`   mean       None          means of :math:`2e - 1` by :math:`2e - 1` positions
    GE-:math:`\theta`     layers     None          :math:`\log_2 e` depthwise convolutions, each with a
                                                   batch norm, ReLU between
    GE-:math:`\theta^+`   layers     16            the same
    ===================== ========== ============= =====================================================

    With :math:`e` as the whole map, it is one mean, or one convolution as large as the map. :math:`f` is the identity
    or, with a ``reduction``, two layers without biases, ReLU between. Means at the border are of the positions that
    exist; what was gathered is resized to the map by nearest neighbours.

    Args:
        channels: Channels of the feature map.
        extent: Distance :math:`e` in positions between neighbourhoods, a power of two; None: the whole map.
        gather: Whether to gather by means or by learned layers.
        reduction: Ratio by which the layer inside :math:`f` is narrower than ``channels``; None: no :math:`f`.
        size: Height and width of the feature map. Needed, and the only one it takes, where layers gather all of it.

    Raises:
        ValueError: If ``extent`` is not a power of two above one, ``gather`` is neither of the two, ``reduction`` does
            not lie between 1 and ``channels``, or ``size`` is needed and missing or not that of the map; in training,
            if a batch norm sees one value a channel.

    Example:
        >>> GatherExcite(64, extent=4)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1810.12348"
    place = "residual"
    neutral = 1.0

    def __init__(
        self,
        channels: int,
        *,
        extent: int | None = None,
        gather: Literal["mean", "layers"] = "layers",
        reduction: int | None = None,
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if extent is not None and (extent < 2 or extent & (extent - 1)):
            raise ValueError(f"extent must be a power of two above one, or None, got {extent}")
        if gather not in ("mean", "layers"):
            raise ValueError(f"gather must be 'mean' or 'layers', got {gather!r}")
        if reduction is not None and not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, or be None, got {reduction}")
        self.extent = extent
        self.size: tuple[int, int] | None = None
        self.layers = nn.Sequential()
        if gather == "layers" and extent is None:
            if size is None:
                raise ValueError("size must be the (height, width) of the feature map, got None")
            self.size = (size[0], size[1])
            self.layers.append(nn.Conv2d(channels, channels, self.size, groups=channels, bias=False))
            self.layers.append(nn.BatchNorm2d(channels))
        elif gather == "layers":
            assert extent is not None
            for step in range(extent.bit_length() - 1):
                if step:
                    self.layers.append(nn.ReLU())
                self.layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False))
                self.layers.append(nn.BatchNorm2d(channels))
        self.excite = nn.Sequential()
        if reduction is not None:
            width = channels // reduction
            self.excite = nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False), nn.ReLU(), nn.Conv2d(width, channels, 1, bias=False)
            )

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self._gate(x).expand_as(x)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x * weights

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        gate = self._gate(x)
        return scale(x, gate) if self.extent is None else x * gate

    def _gate(self, x: Tensor) -> Tensor:
        """Return the weights, those of the whole map unrepeated."""
        gate = self.excite(self._gather(x)).sigmoid()
        return gate if self.extent is None else F.interpolate(gate, x.shape[2:])

    def _gather(self, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            raise ValueError(f"size must be {self.size}, as constructed, got {tuple(x.shape[2:])}")
        if self.layers:
            return self.layers(x)
        if self.extent is None:
            return x.mean((2, 3), keepdim=True)
        return F.avg_pool2d(x, 2 * self.extent - 1, self.extent, self.extent - 1, count_include_pad=False)
