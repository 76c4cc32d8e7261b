"""The networks of spatial transformers: the paper's for digits, and any backbone of timm that reads warped images."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.sampling.localisers import pair
from visattn.attention.sampling.spatial_transformer import (
    AffineTransformer,
    Fill,
    IsotropicTransformer,
    ProjectiveTransformer,
    SimilarityTransformer,
    Size,
    SpatialTransformer,
    ThinPlateTransformer,
)
from visattn.attention.sampling.warp import Padding
from visattn.models.network import Classifier, Network, look, named

TRANSFORMERS: dict[str, type[SpatialTransformer]] = {
    "isotropic": IsotropicTransformer,
    "similarity": SimilarityTransformer,
    "affine": AffineTransformer,
    "projective": ProjectiveTransformer,
    "thin_plate": ThinPlateTransformer,
}
SMALL = ("convolutional", "connected")


class DigitClassifier(Classifier):
    r"""The paper's classifier of digits, with and without a spatial transformer before it (arXiv:1506.02025).

    Convolutional: 9×9, max pool, 7×7, max pool, one layer to the logits; fully connected: two hidden layers. All
    are rectified. A transformer is put before it by ``visattn.insert(network, AffineTransformer, input_size=(1, 28,
    28))``, or in a configuration by ``attention``.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the images.
        size: Height and width of the images.
        kind: ``"convolutional"`` or ``"connected"``.
        filters: Filters of the two convolutions, or units of the two hidden layers.
        pool: So many pixels down and across are averaged at first: the paper does so after its transformers, where
            images are larger than 28×28.

    Raises:
        ValueError: If images are too small for the convolutions, or ``kind`` is neither of the two.

    Example:
        >>> network = DigitClassifier(10)
        >>> network(torch.randn(2, 1, 28, 28)).shape, sum(p.numel() for p in network.parameters())
        (torch.Size([2, 10]), 399206)
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_chans: int = 1,
        size: tuple[int, int] = (28, 28),
        kind: Literal["convolutional", "connected"] = "convolutional",
        filters: tuple[int, int] = (64, 124),
        pool: int = 1,
    ):
        super().__init__()
        if kind not in ("convolutional", "connected"):
            raise ValueError(f"kind must be convolutional or connected, got {kind!r}")
        if min(pool, *filters) < 1:
            raise ValueError(f"filters and pool must be at least 1, got {filters} and {pool}")
        self.num_classes = num_classes
        first, second = filters
        pooled = [side // pool for side in size]
        layers: list[nn.Module] = [nn.AvgPool2d(pool)] if pool > 1 else []
        if kind == "connected":
            layers += [nn.Flatten(), nn.Linear(in_chans * pooled[0] * pooled[1], first), nn.ReLU()]
            layers += [nn.Linear(first, second), nn.ReLU(), nn.Linear(second, num_classes)]
        else:
            if min(pooled) < 21:
                raise ValueError(f"size must be at least {21 * pool} for its convolutions, got {size}")
            ends = [(((side - 8 + 1) // 2 - 6) + 1) // 2 for side in pooled]
            layers += [nn.Conv2d(in_chans, first, 9), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()]
            layers += [nn.Conv2d(first, second, 7), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()]
            layers += [nn.Flatten(), nn.Linear(second * ends[0] * ends[1], num_classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.layers(images)


class SpatialTransformerNetwork(Network):
    r"""Look at an image, and let a backbone classify warped views of it: the paper's network for birds.

    .. math:: \theta = \theta_0 + W_\theta f(U) + b, \quad V_k(q) = U(T_{\theta_k}(q)), \quad
        z = W\, [g(V_1); \dots; g(V_N)]

    One localiser :math:`f` says where all :math:`N` views are (arXiv:1506.02025,
    :class:`~visattn.attention.SpatialTransformer`), and one backbone :math:`g` reads them. With one view the classifier
    is the backbone's own: a fresh network without jitter and ``output_size`` then gives the logits of its backbone, bit
    for bit, unless ``scale`` makes the view a crop.

    A shared localiser is a map of the backbone itself (arXiv:2004.11678): it has few weights of its own, and learns
    with the classifier. So the backbone runs on the image and on what is seen of it, and its batch norms take
    statistics of both in training. Nothing can be inserted in a backbone that runs more than once, or on several
    views.

    Args:
        backbone: Name of a timm model, or the model itself, which becomes part of the network; such a network cannot be
            saved. It says as ``in_chans`` how many channels images have, if not 3.
        num_classes: Number of classes; None: as many as the backbone has.
        pretrained: Whether a backbone that is named starts with its trained weights; so does a localiser.
        backbone_args: Arguments of ``timm.create_model``, such as ``in_chans``, for a backbone that is named.
        transform: How images are warped: ``"isotropic"`` (scale and shift, as in the paper), ``"similarity"``,
            ``"affine"``, ``"projective"`` or ``"thin_plate"``.
        scale: Fixed scale of an isotropic one, such as the paper's 0.5; None: it is predicted, too.
        points: Control points, down and across, of a thin plate.
        localiser: What looks at the image: ``"shared"``, the backbone; ``"convolutional"`` or ``"connected"``, the
            paper's for digits; or the name of another timm model.
        stage: The level of the backbone, or of that model (of timm's ``forward_intermediates``), whose map tells the
            localiser where to look, counted as in a list.
        view: Height and width, in pixels, that images are averaged down to for the localiser; None: 32 for the paper's
            for digits, else none of it, which fits no backbone of a fixed size if images have another.
        heads: How many views there are. Several start as crops that tile the image.
        steps: How often the localiser looks, each time at what the warp gives so far.
        output_size: Height and width of the views; None: those of the image.
        jitter: Standard deviation of :math:`b` at the start, in units of half the image.
        padding: What lies outside: ``"zeros"``, or the pixel nearest at the ``"border"``.
        fill: What lies outside instead of zero, for all channels or each: black, in an image that was normalised.

    Raises:
        ValueError: If an option is out of its range or does not fit the transform, there is no such localiser, or it
            has no such level.

    Example:
        >>> network = SpatialTransformerNetwork("test_resnet", transform="isotropic", scale=0.5, heads=2)
        >>> network(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 1000])
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_classes: int | None = None,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        transform: Literal["isotropic", "similarity", "affine", "projective", "thin_plate"] = "affine",
        scale: float | None = None,
        points: tuple[int, int] = (4, 4),
        localiser: str = "shared",
        stage: int = -1,
        view: Size | None = None,
        heads: int = 1,
        steps: int = 1,
        output_size: Size | None = None,
        jitter: float = 0.0,
        padding: Padding = "zeros",
        fill: Fill = None,
    ):
        if transform not in TRANSFORMERS:
            raise ValueError(f"transform must be one of {', '.join(TRANSFORMERS)}, got {transform!r}")
        if scale is not None and transform != "isotropic":
            raise ValueError(f"scale must be None where transform is {transform!r}, got {scale}")
        super().__init__(backbone, num_classes, pretrained, backbone_args)
        channels = getattr(self.backbone, "in_chans", 3)
        found: Any = localiser
        if localiser not in SMALL:
            shared = localiser == "shared"
            options = {"pretrained": pretrained, "in_chans": channels}
            trunk = self.backbone if shared else named("localiser", localiser, ("shared", *SMALL), **options)
            found = MapLocaliser(trunk, stage=stage, view=None if view is None else pair(view, "view"), shared=shared)
        own: dict[str, dict[str, Any]] = {"isotropic": {"scale": scale}, "thin_plate": {"points": points}}
        self.transformer = TRANSFORMERS[transform](
            channels,
            **own.get(transform, {}),
            localiser=found,
            view=32 if view is None else view,
            output_size=output_size,
            heads=heads,
            steps=steps,
            jitter=jitter,
            padding=padding,
            fill=fill,
        )
        self.classifier = None
        if heads > 1:
            self.backbone.reset_classifier(0)
            self.classifier = nn.Linear(heads * self.backbone.head_hidden_size, self.num_classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        views = self.transformer(images)
        if self.classifier is None:
            return self.backbone(views)
        heads = self.transformer.heads
        views = views.unflatten(1, (heads, -1)).flatten(0, 1)
        vectors = self.backbone.forward_head(self.backbone.forward_features(views), pre_logits=True)
        return self.classifier(vectors.unflatten(0, (-1, heads)).flatten(1))


class MapLocaliser(nn.Module):
    """Turn the map of a network, on a grid of 7×7 so that things keep their place, into a vector.

    Args:
        trunk: The network.
        stage: The level whose map it is, counted as in a list.
        view: Height and width that images are averaged down to; None: as they are.
        shared: Whether the weights of the trunk are another's; else layers behind the level fall away.

    Raises:
        ValueError: If the trunk has no such level.
    """

    num_features = 128
    grid = 7

    def __init__(self, trunk: Any, *, stage: int, view: tuple[int, int] | None, shared: bool):
        super().__init__()
        seen = look(trunk)
        count = len(seen.maps)
        if not -count <= stage < count:
            raise ValueError(f"stage must be one of the {count} levels of {seen.name}, got {stage}")
        self.level, self.view = stage % count, view
        if shared:
            self.__dict__["trunk"] = trunk  # registered where its weights are
        else:
            trunk.prune_intermediate_layers([self.level], prune_norm=True)
            self.trunk = trunk
        self.narrow = nn.Conv2d(seen.maps[self.level].shape[1], self.num_features, 1)
        self.connected = nn.Linear(self.num_features * self.grid**2, self.num_features)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        if self.view is not None:
            images = F.adaptive_avg_pool2d(images, self.view)
        (x,) = self.trunk.forward_intermediates(images, indices=[self.level], intermediates_only=True, stop_early=True)
        x = F.adaptive_avg_pool2d(self.narrow(x).relu(), self.grid)
        return self.connected(x.flatten(1)).relu()
