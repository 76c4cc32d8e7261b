"""Oktay et al.: Attention U-Net: Learning Where to Look for the Pancreas (2018)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention


def resize(x: Float[Tensor, "b c h w"], like: Float[Tensor, "b d p q"]) -> Float[Tensor, "b c p q"]:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class AttentionGate(Attention):
    r"""Let through what a coarser map asks for: weigh the positions of a skip connection by a gating map.

    .. math:: y = x \odot \operatorname{resize}_x\bigl(
        \sigma(\psi^\top \mathrm{ReLU}(W_x\, x + W_g\, g + b_g) + b_\psi)\bigr)

    Our skip, gating and score are :math:`W_x, W_g, \psi`. The two maps may differ in size by any factor.

    ============ =============================================== ================= ====================================
    ``form``     :math:`W_x`                                     scores            :math:`y`
    ============ =============================================== ================= ====================================
    paper        of :math:`x`, resized to :math:`g`              on the grid of g  as above
    released     2 × 2 with stride 2; an odd border sees zeros   where that leads  followed by a 1 × 1 convolution and a
                                                                                   batch norm
    ============ =============================================== ================= ====================================

    Args:
        channels: Channels of the skip connection :math:`x`.
        gating_channels: Channels of the gating map :math:`g`; None: ``channels``.
        reduction: Ratio by which what is scored is narrower than ``channels``.
        form: Whether to build what the paper writes or what its released code does.

    Raises:
        ValueError: If ``form`` is unknown or ``reduction`` does not lie between 1 and ``channels``.

    Example:
        >>> AttentionGate(64, gating_channels=128)(torch.randn(2, 64, 16, 16), torch.randn(2, 128, 8, 8)).shape
        torch.Size([2, 64, 16, 16])
    """

    paper = "arXiv:1804.03999"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        gating_channels: int | None = None,
        reduction: int = 2,
        form: Literal["paper", "released"] = "paper",
    ):
        super().__init__()
        if form not in ("paper", "released"):
            raise ValueError(f"form must be paper or released, got {form!r}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        self.form = form
        width, step = channels // reduction, 1 if form == "paper" else 2
        self.skip = nn.Conv2d(channels, width, step, stride=step, bias=False)
        self.gating = nn.Conv2d(gating_channels or channels, width, 1)
        self.score = nn.Conv2d(width, 1, 1)
        if form == "released":
            self.out = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def attend(self, x: Float[Tensor, "b c h w"], g: Float[Tensor, "b e p q"]) -> Float[Tensor, "b 1 h w"]:
        gating = self.gating(g)
        if self.form == "paper":
            skip = self.skip(resize(x, g))
        else:
            skip = self.skip(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
            gating = resize(gating, skip)
        return resize(self.score((skip + gating).relu()).sigmoid(), x)

    def read(
        self, x: Float[Tensor, "b c h w"], g: Float[Tensor, "b e p q"], *, weights: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, "b c h w"]:
        y = x * weights
        return y if self.form == "paper" else self.out(y).to(x.dtype)
