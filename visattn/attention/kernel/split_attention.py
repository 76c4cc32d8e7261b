"""Zhang, Wu, Zhang, Zhu, Lin, Zhang, Sun, He, Mueller, Manmatha, Li, Smola: ResNeSt (CVPR workshops 2022)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax
from visattn.attention.kernel.core import mix


class SplitAttention(Attention):
    r"""Convolve parts of a map apart and let every channel choose between the results, by what all of them found.

    .. math:: y = \sum_r a_r \odot u_r, \quad [u_1; \dots; u_R] = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}(x))),
        \quad a = \operatorname{softmax}_r\bigl(W_r\, \mathrm{ReLU}(\mathrm{BN}(V\, \mathrm{mean}_{hw}\textstyle\sum_r
        u_r))\bigr)

    The convolution is a 3×3 in :math:`K R` groups, :math:`V` and :math:`W` have :math:`K`; with :math:`R = 1` the
    softmax is a sigmoid. The order of the channels is that of the released code.

    Args:
        channels: Channels of the feature map.
        out_channels: Channels :math:`c` to return; None: ``channels``.
        stride: Ratio by which the map shrinks.
        radix: Number :math:`R` of maps to choose from.
        cardinality: Number :math:`K` of groups that choose apart.
        reduction: Ratio by which the layer between :math:`V` and :math:`W` is narrower than :math:`R` times
            ``channels``; it has at least 32 features.
        downsample: What shrinks the map: a 3×3 mean ``"after"`` the choice as in the paper, ``"before"`` the
            convolution as in its fast models, or the ``"convolution"`` itself.

    Raises:
        ValueError: If ``cardinality * radix`` does not divide ``channels``, ``cardinality`` does not divide
            ``out_channels`` and the features between, ``downsample`` is none of the three, or another option is not
            positive; in training, if the batch is one image: what lies between is normalised over the batch.

    Example:
        >>> SplitAttention(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:2004.08955"
    place = "convolutions"
    replaces = "convolution"

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        radix: int = 2,
        cardinality: int = 1,
        reduction: int = 4,
        downsample: Literal["after", "before", "convolution"] = "after",
    ):
        super().__init__()
        if downsample not in ("after", "before", "convolution"):
            raise ValueError(f"downsample must be 'after', 'before' or 'convolution', got {downsample!r}")
        for name, value in {"radix": radix, "cardinality": cardinality, "reduction": reduction}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        out_channels = channels if out_channels is None else out_channels
        width = max(channels * radix // reduction, 32)
        if channels % (cardinality * radix) or out_channels % cardinality or width % cardinality:
            raise ValueError(
                f"cardinality times radix={radix} must divide channels={channels}, and cardinality must divide "
                f"out_channels={out_channels} and the {width} features between, got {cardinality}"
            )
        self.radix, self.cardinality = radix, cardinality
        shrink = nn.AvgPool2d(3, stride, 1) if stride > 1 and downsample != "convolution" else nn.Identity()
        self.before, self.after = (shrink if downsample == side else nn.Identity() for side in ("before", "after"))
        self.split = nn.Sequential(
            nn.Conv2d(
                channels,
                radix * out_channels,
                3,
                stride if downsample == "convolution" else 1,
                1,
                groups=cardinality * radix,
                bias=False,
            ),
            nn.BatchNorm2d(radix * out_channels),
            nn.ReLU(inplace=True),
        )
        self.squeeze = nn.Sequential(
            nn.Conv2d(out_channels, width, 1, groups=cardinality), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.select = nn.Conv2d(width, radix * out_channels, 1, groups=cardinality)

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k d 1 1"]:
        return self._choose(self._split(x))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k d 1 1"]) -> Float[Tensor, "b d h2 w2"]:
        return self._merge(self._split(x), weights).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        splits = self._split(x)
        return self._merge(splits, self._choose(splits)).to(x.dtype)

    def _split(self, x: Tensor) -> Float[Tensor, "b rd h w"]:
        return self.split(self.before(x))

    def _choose(self, splits: Tensor) -> Float[Tensor, "b k d 1 1"]:
        means = splits.mean((2, 3), keepdim=True).unflatten(1, (self.radix, -1)).sum(1)
        logits = self.select(self.squeeze(means)).unflatten(1, (self.cardinality, self.radix, -1)).transpose(1, 2)
        return (logits.sigmoid() if self.radix == 1 else softmax(logits, 1)).flatten(2, 3).to(splits.dtype)

    def _merge(self, splits: Tensor, weights: Tensor) -> Float[Tensor, "b d h2 w2"]:
        return self.after(mix(splits.unflatten(1, (self.radix, -1)).unbind(1), weights))
