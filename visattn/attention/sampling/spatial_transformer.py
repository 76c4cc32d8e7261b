"""Jaderberg, Simonyan, Zisserman, Kavukcuoglu: Spatial Transformer Networks (NIPS 2015)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.base import Attention
from visattn.attention.core import plain, uncast
from visattn.attention.sampling.grids import folding as folding_of
from visattn.attention.sampling.grids import identity
from visattn.attention.sampling.localisers import ConnectedLocaliser, ConvolutionalLocaliser, pair, tiling
from visattn.attention.sampling.thin_plate import ThinPlate, lattice
from visattn.attention.sampling.transforms import Affine, Isotropic, Projective, Similarity, Transform
from visattn.attention.sampling.warp import Padding, oversampling, sample

Size = int | tuple[int, int]
Fill = float | Sequence[float] | None
Localisation = Literal["convolutional", "connected"] | nn.Module


class SpatialTransformer(Attention):
    r"""Say by a small network where to sample a map, and sample it there.

    .. math:: \theta = \theta_0 + W f(U) + b, \quad
        V_{ci} = \sum_{n, m} U_{cnm} \max(0, 1 - |x_i - m|) \max(0, 1 - |y_i - n|), \quad
        (x_i, y_i) = T_\theta(q_i)

    for the pixels :math:`q_i` of the output. The network :math:`f` is the localiser; :math:`W` starts at zero and
    :math:`\theta_0` are the parameters at which nothing moves, so that a fresh module returns its input bit for bit.
    The grids are its weights. An output smaller than the input is sampled more finely and averaged.

    Differs from the paper: its localisers look at the input, halved for convolutions; ours at an average of ``view``
    pixels, from maps of any size.

    Args:
        channels: Channels :math:`c` of the map.
        transform: The family of :math:`T`, one of ``visattn.attention.sampling.transforms`` or a thin plate, or two,
            composed; None: affine maps. A module with another one cannot be saved alone.
        localiser: ``"convolutional"`` or ``"connected"``, as the paper has them for digits; or any network from the map
            to vectors that says their width as ``num_features``, such as a timm model without classifier.
        view: Height and width, in pixels, of what those two look at.
        output_size: Height and width of the output; None: those of the input.
        heads: How many warps there are side by side; their outputs are joined along the channels. Several start as
            crops that tile the map.
        steps: How often the localiser looks, each time at what the warp gives so far. Warps are composed, and the input
            is always sampled only once.
        jitter: Standard deviation of :math:`b` at the start, in units of half the map.
        padding: What lies outside: ``"zeros"``, or the pixel nearest at the ``"border"``.
        fill: What lies outside instead of zero, for all channels or each: black, in an image that was normalised.

    Raises:
        ValueError: If an option is out of its range, several steps are not closed under composition or there are
            several heads, or a localiser does not say how wide its vectors are.

    Example:
        >>> from visattn.attention.sampling.transforms import Affine, Composed
        >>> plate = ThinPlate(lattice(4, 4))
        >>> SpatialTransformer(3, transform=Composed(Affine(), plate))(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """

    paper = "arXiv:1506.02025"
    place = "input"
    locations = True
    start: Tensor

    def __init__(
        self,
        channels: int,
        *,
        transform: Transform | None = None,
        localiser: Localisation = "convolutional",
        view: Size = 32,
        output_size: Size | None = None,
        heads: int = 1,
        steps: int = 1,
        jitter: float = 0.0,
        padding: Padding = "zeros",
        fill: Fill = None,
    ):
        super().__init__()
        if min(heads, steps) < 1:
            raise ValueError(f"heads and steps must be at least 1, got {heads} and {steps}")
        if steps > 1 and heads > 1:
            raise ValueError(f"steps must be 1 with several heads, got {steps} and {heads}")
        if jitter < 0:
            raise ValueError(f"jitter must not be negative, got {jitter}")
        if padding not in ("zeros", "border"):
            raise ValueError(f"padding must be zeros or border, got {padding!r}")
        if isinstance(fill, Sequence) and len(fill) not in (1, channels):
            raise ValueError(f"fill must have one value for each of {channels} channels, got {len(fill)}")
        if padding == "border" and fill is not None:
            raise ValueError(f"fill must be None where padding is 'border', got {fill}")
        self.transform = Affine() if transform is None else transform
        if steps > 1:  # raises where they are not closed
            self.transform.compose(self.transform.identity[None], self.transform.identity[None])
        self.output_size = None if output_size is None else pair(output_size, "output_size")
        self.heads, self.steps, self.jitter, self.padding, self.fill = heads, steps, jitter, padding, fill
        self.localiser = self._localiser(channels, localiser, pair(view, "view"))
        features: Any = self.localiser.num_features
        self.head = nn.Linear(features, heads * self.transform.number)
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.head.bias, std=jitter)
        self.register_buffer("start", self._start(), persistent=False)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, heads={self.heads}, steps={self.steps}, padding={self.padding!r}"

    @staticmethod
    def _localiser(channels: int, localiser: Localisation, view: tuple[int, int]) -> nn.Module:
        if isinstance(localiser, nn.Module):
            if not isinstance(getattr(localiser, "num_features", None), int):
                name = type(localiser).__name__
                raise ValueError(f"localiser must say the width of its vectors as num_features, got a {name} without")
            return localiser
        kinds = {"convolutional": ConvolutionalLocaliser, "connected": ConnectedLocaliser}
        if localiser not in kinds:
            raise ValueError(f"localiser must be convolutional, connected or a network, got {localiser!r}")
        return kinds[localiser](channels, view)

    def _start(self) -> Float[Tensor, "k p"]:
        """The parameters of each head before the localiser has learned anything."""
        if self.heads == 1:
            return self.transform.identity[None]
        scale, places = tiling(self.heads)
        scale = getattr(self.transform, "scale", None) or scale
        inside = max(0.0, 1 - scale)
        return torch.stack([self.transform.crop(scale, *(max(-inside, min(inside, t)) for t in at)) for at in places])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpatialTransformer":
        super()._apply(fn, recurse)
        wide = torch.promote_types(self.start.dtype, torch.float32)
        self.start = self._start().to(self.start.device, wide)  # what a narrow type, or a meta device, does not hold
        return self

    @property
    def identity_at_init(self) -> bool:
        still = getattr(self.transform, "scale", None) in (None, 1)  # else it starts as a crop
        return still and self.heads == 1 and self.jitter == 0 and self.output_size is None

    def moved(self, offsets: Float[Tensor, "b k p"]) -> Float[Tensor, "b k p"]:
        """Return parameters by how far they are from those at the start."""
        return self.start + offsets

    def step(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k p"]:
        features = self.localiser(x)
        with uncast(x.device):  # coordinates need more digits than bfloat16 has
            wide = torch.promote_types(features.dtype, torch.float32)
            offsets = F.linear(features.to(wide), self.head.weight.to(wide), self.head.bias.to(wide))
            return self.moved(offsets.unflatten(1, (self.heads, -1)))

    def locate(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k p"]:
        """Return the parameters of the warps."""
        parameters = self.step(x)
        for _ in range(self.steps - 1):
            before = parameters[:, 0]
            seen = sample(x, self.transform(before, x.shape[2:]), padding=self.padding, fill=self._filling(x))
            parameters = self.transform.compose(before, self.step(seen)[:, 0])[:, None]
        return parameters

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2 2"]:
        parameters = self.locate(x)
        height, width = x.shape[2:] if self.output_size is None else self.output_size
        down, across = self._pool(x)
        return self.transform(parameters.flatten(0, 1), (height * down, width * across)).unflatten(0, (-1, self.heads))

    def read(
        self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k h2 w2 2"]
    ) -> Float[Tensor, "b c2 h3 w3"]:
        y = sample(x, weights.flatten(1, 2), padding=self.padding, fill=self._filling(x), pool=self._pool(x))
        if self.heads > 1:
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(1, 2)
        return y if self.output_size else still_exact(y, x, weights[:, 0])

    def _pool(self, x: Tensor) -> tuple[int, int]:
        """How many points, down and across, are averaged for a pixel of an output smaller than what it shows."""
        if self.output_size is None:
            return 1, 1
        scale = getattr(self.transform, "scale", None) or 1  # of crops, where it is fixed
        return oversampling((math.ceil(x.shape[2] * scale), math.ceil(x.shape[3] * scale)), self.output_size)

    def _filling(self, x: Tensor) -> float | Tensor | None:
        return x.new_tensor(self.fill) if isinstance(self.fill, Sequence) else self.fill


def still_exact(
    y: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], grid: Float[Tensor, "b h w 2"]
) -> Float[Tensor, "b c h w"]:
    """Return samples in which pixels that did not move are what they were, without the rounding of interpolation.

    The gradient stays that of the samples.
    """
    still = (grid == identity((x.shape[2], x.shape[3]), dtype=grid.dtype, device=grid.device)).all(-1)[:, None]
    if plain(y):
        return torch.where(still, x.detach() + (y - y.detach()), y)
    return StillExact.apply(y, x, still)


class StillExact(torch.autograd.Function):
    """Some values put in place of others that mean the same; the gradient is that of the others."""

    @staticmethod
    def forward(ctx, y, x, still):
        return torch.where(still, x, y)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


class IsotropicTransformer(SpatialTransformer):
    r"""Sample a crop: scale and shift, the paper's transform for attention.

    .. math:: V(q) = U(s\, q + t), \quad (s, t_x, t_y) = \theta_0 + W f(U) + b

    See :class:`SpatialTransformer` for what all of its kind have in common.

    Args:
        channels: Channels :math:`c` of the map.
        scale: Fixed :math:`s`, such as 0.5 for crops of half the height and width; None: it is predicted, too.
        localiser: ``"convolutional"``, ``"connected"``, or any network with ``num_features``.
        view: Height and width, in pixels, of what the first two look at.
        output_size: Height and width of the output; None: those of the input.
        heads: How many crops there are side by side, joined along the channels.
        steps: How often the localiser looks, each time at what the warp gives so far.
        jitter: Standard deviation of :math:`b` at the start, in units of half the map.
        padding: What lies outside: ``"zeros"``, or the pixel nearest at the ``"border"``.
        fill: What lies outside instead of zero, for all channels or each.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> IsotropicTransformer(3, scale=0.5, heads=4)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 12, 32, 32])
    """

    def __init__(
        self,
        channels: int,
        *,
        scale: float | None = None,
        localiser: Localisation = "convolutional",
        view: Size = 32,
        output_size: Size | None = None,
        heads: int = 1,
        steps: int = 1,
        jitter: float = 0.0,
        padding: Padding = "zeros",
        fill: Fill = None,
    ):
        super().__init__(
            channels,
            transform=Isotropic(scale),
            localiser=localiser,
            view=view,
            output_size=output_size,
            heads=heads,
            steps=steps,
            jitter=jitter,
            padding=padding,
            fill=fill,
        )


class _MatrixTransformer(SpatialTransformer):
    """A spatial transformer of one kind of matrix, which has no options of its own."""

    kind: ClassVar[type[Transform]]

    def __init__(
        self,
        channels: int,
        *,
        localiser: Localisation = "convolutional",
        view: Size = 32,
        output_size: Size | None = None,
        heads: int = 1,
        steps: int = 1,
        jitter: float = 0.0,
        padding: Padding = "zeros",
        fill: Fill = None,
    ):
        super().__init__(
            channels,
            transform=self.kind(),
            localiser=localiser,
            view=view,
            output_size=output_size,
            heads=heads,
            steps=steps,
            jitter=jitter,
            padding=padding,
            fill=fill,
        )


class SimilarityTransformer(_MatrixTransformer):
    r"""Rotate, scale and shift a map.

    .. math:: V(q) = U\!\left(\begin{pmatrix} a & -b \\ b & a \end{pmatrix} q + t\right), \quad
        (a, b, t_x, t_y) = \theta_0 + W f(U) + b

    See :class:`SpatialTransformer` for what all of its kind have in common.

    Args:
        channels: Channels :math:`c` of the map.
        localiser: ``"convolutional"``, ``"connected"``, or any network with ``num_features``.
        view: Height and width, in pixels, of what the first two look at.
        output_size: Height and width of the output; None: those of the input.
        heads: How many warps there are side by side, joined along the channels.
        steps: How often the localiser looks, each time at what the warp gives so far.
        jitter: Standard deviation of the predictions' bias at the start, in units of half the map.
        padding: What lies outside: ``"zeros"``, or the pixel nearest at the ``"border"``.
        fill: What lies outside instead of zero, for all channels or each.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> SimilarityTransformer(3)(torch.randn(2, 3, 32, 48)).shape
        torch.Size([2, 3, 32, 48])
    """

    kind = Similarity


class AffineTransformer(_MatrixTransformer):
    r"""Rotate, scale, shear and shift a map.

    .. math:: V(q) = U(A_\theta\, (q, 1)^\top), \quad A_\theta \in \mathbb{R}^{2 \times 3}

    See :class:`SpatialTransformer` for what all of its kind have in common.

    Args:
        channels: Channels :math:`c` of the map.
        localiser: ``"convolutional"``, ``"connected"``, or any network with ``num_features``.
        view: Height and width, in pixels, of what the first two look at.
        output_size: Height and width of the output; None: those of the input.
        heads: How many warps there are side by side, joined along the channels.
        steps: How often the localiser looks, each time at what the warp gives so far.
        jitter: Standard deviation of the predictions' bias at the start, in units of half the map.
        padding: What lies outside: ``"zeros"``, or the pixel nearest at the ``"border"``.
        fill: What lies outside instead of zero, for all channels or each.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> import timm, visattn
        >>> model = visattn.insert(timm.create_model("resnet18"), AffineTransformer)
        >>> sorted(model.visattn)
        ['conv1__AffineTransformer']
    """

    kind = Affine


class ProjectiveTransformer(_MatrixTransformer):
    r"""View a map as a plane from another side.

    .. math:: V(q) = U\!\left(\frac{(h_1^\top \tilde q,\; h_2^\top \tilde q)}{h_3^\top \tilde q}\right), \quad
        \tilde q = (q, 1)^\top, \; h_{33} = 1

    See :class:`SpatialTransformer` for what all of its kind have in common.

    Args:
        channels: Channels :math:`c` of the map.
        localiser: ``"convolutional"``, ``"connected"``, or any network with ``num_features``.
        view: Height and width, in pixels, of what the first two look at.
        output_size: Height and width of the output; None: those of the input.
        heads: How many warps there are side by side, joined along the channels.
        steps: How often the localiser looks, each time at what the warp gives so far.
        jitter: Standard deviation of the predictions' bias at the start, in units of half the map.
        padding: What lies outside: ``"zeros"``, or the pixel nearest at the ``"border"``.
        fill: What lies outside instead of zero, for all channels or each.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> ProjectiveTransformer(1, localiser="connected", view=28)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """

    kind = Projective


class ThinPlateTransformer(SpatialTransformer):
    r"""Bend a map as a thin plate (:class:`~visattn.attention.sampling.thin_plate.ThinPlate`).

    .. math:: V(q) = U\!\Big(a + A q + \sum_i w_i\, |q - c_i|^2 \log |q - c_i|\Big), \quad
        T(c_i) = c_i + (W f(U) + b)_i

    The control points :math:`c_i` lie on a lattice; what is predicted is where each of them comes from. Bounded, that
    is :math:`\tanh(\operatorname{artanh}(c_i) + (W f(U) + b)_i)`, inside the map.

    See :class:`SpatialTransformer` for what all of its kind have in common.

    Args:
        channels: Channels :math:`c` of the map.
        points: Control points down and across.
        span: How far from the centre the outermost lie; 1 is the edge of the map.
        regularisation: How much the plate resists; 0: it goes through the predicted points exactly.
        bounded: Whether points come from within the map only.
        folding: Weight of the penalty on grids that fold over (:func:`~visattn.attention.sampling.grids.folding`).
        localiser: ``"convolutional"``, ``"connected"``, or any network with ``num_features``.
        view: Height and width, in pixels, of what the first two look at.
        output_size: Height and width of the output; None: those of the input.
        heads: How many warps there are side by side, joined along the channels.
        steps: How often the localiser looks, each time at what the warp gives so far.
        jitter: Standard deviation of :math:`b` at the start, in units of half the map.
        padding: What lies outside: ``"zeros"``, or the pixel nearest at the ``"border"``.
        fill: What lies outside instead of zero, for all channels or each.

    Raises:
        ValueError: If an option is out of its range, or points on the edge are bounded.

    Example:
        >>> ThinPlateTransformer(1, points=(3, 5))(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        *,
        points: tuple[int, int] = (4, 4),
        span: float = 0.9,
        regularisation: float = 0.0,
        bounded: bool = False,
        folding: float = 0.0,
        localiser: Localisation = "convolutional",
        view: Size = 32,
        output_size: Size | None = None,
        heads: int = 1,
        steps: int = 1,
        jitter: float = 0.0,
        padding: Padding = "zeros",
        fill: Fill = None,
    ):
        if bounded and not span < 1:
            raise ValueError(f"span must be less than 1 where points are bounded, got {span}")
        if folding < 0:
            raise ValueError(f"folding must not be negative, got {folding}")
        super().__init__(
            channels,
            transform=ThinPlate(lattice(*points, span=span), regularisation=regularisation),
            localiser=localiser,
            view=view,
            output_size=output_size,
            heads=heads,
            steps=steps,
            jitter=jitter,
            padding=padding,
            fill=fill,
        )
        self.bounded, self.folding = bounded, folding

    def moved(self, offsets: Tensor) -> Tensor:
        if not self.bounded:
            return super().moved(offsets)
        inner = self.start.atanh()
        return self.start + (torch.tanh(inner + offsets) - torch.tanh(inner))  # nothing moves, to the last bit, at zero

    def penalty(self, weights: Float[Tensor, "b k h w 2"]) -> Float[Tensor, ""]:
        """Return how much the grids fold over, on average."""
        if not self.folding:
            return weights.new_zeros(())
        return self.folding * folding_of(weights.flatten(0, 1)).mean()
