"""Say what is in a picture: any backbone of timm looks, and a decoder tells word by word, looking where it wants."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from visattn.attention.base import Built
from visattn.attention.pairwise.transformer_block import TransformerBlock2d
from visattn.models.decoders.core import Decoder, Said
from visattn.models.decoders.search import Sentences, beam
from visattn.models.decoders.show_attend_and_tell import ShowAttendAndTell
from visattn.models.network import at_least_one, named
from visattn.surgery import sites


class Regions(NamedTuple):
    """What a decoder looks at."""

    memory: Float[Tensor, "b l d"]
    """A vector for each region."""
    size: tuple[int, int]
    """Height and width of the map whose positions, row by row, the regions are."""


class Captioner(Built):
    r"""Say what is in a picture, and where each word was read.

    The positions of the backbone's last map, as many as there are, are the regions that the decoder looks at; they are
    never resized. With a ``width`` they are first narrowed by :math:`\operatorname{ReLU}(W \operatorname{LN}(v))`; they
    may then look at each other, by ``layers`` transformer blocks that know rows and columns.

    Args:
        vocabulary: How many words there are.
        end: The word that ends a sentence.
        backbone: Name of a timm model, or the model itself, which is then taken as it is; such a captioner is not
            saved.
        pretrained: Whether a backbone that is named starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, for a backbone that is named.
        decoder: What tells, called with the number of words and the features of a region.
        width: Features of a region; None: as many as the backbone has.
        layers: How many transformer blocks the regions go through.
        heads: How many heads their attention has.
        dropout: Probability to drop a number of a region.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> captioner = Captioner(100, backbone="resnet10t", width=64).eval()
        >>> said = captioner.caption(torch.randn(2, 3, 96, 96), width=3, longest=5)
        >>> said.words.shape[:2], said.maps.shape[3]
        (torch.Size([2, 3]), 9)
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        end: int = 0,
        backbone: str | nn.Module = "mobilenetv2_100",
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        decoder: Callable[[int, int], Decoder] = ShowAttendAndTell,
        width: int | None = None,
        layers: int = 0,
        heads: int = 8,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        at_least_one(vocabulary=vocabulary, heads=heads, **{} if width is None else {"width": width})
        if not 0 <= end < vocabulary:
            raise ValueError(f"end must be one of {vocabulary} words, got {end}")
        if layers < 0:
            raise ValueError(f"layers must not be negative, got {layers}")
        if not isinstance(backbone, str) and (pretrained or backbone_args):
            raise ValueError("pretrained and backbone_args are for a backbone that is named, got a model")
        model: Any = backbone
        if isinstance(backbone, str):
            options = {"num_classes": 0} | (backbone_args or {})
            model = named("backbone", backbone, pretrained=pretrained, **options)
        self.end = end
        self.backbone = model
        (self.site,) = sites(model, at="head")
        features = self.site.channels
        self.narrow: nn.Module = nn.Identity()
        if width is not None:
            self.narrow = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.ReLU())
            features = width
        blocks = [TransformerBlock2d(features, heads=heads, positions="sinusoidal") for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(features) if layers else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.decoder = decoder(vocabulary, features)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e rows columns"]:
        """Return the last map of the backbone: what a frozen one need not compute twice."""
        return self.site.to_map(self.backbone.forward_features(images))

    def regions(self, features: Float[Tensor, "b e rows columns"]) -> Regions:
        """Return what the decoder looks at, of a map of the backbone."""
        x = self.narrow(features.movedim(1, -1)).movedim(-1, 1)
        x = self.dropout(self.norm(self.blocks(x).flatten(2).mT))
        return Regions(x, (features.shape[2], features.shape[3]))

    def prepare(self, images: Float[Tensor, "b c h w"]) -> Any:
        """Make images ready to be told of."""
        return self.ready(self.features(images))

    def ready(self, features: Float[Tensor, "b e rows columns"]) -> Any:
        """Make maps of the backbone ready to be told of."""
        memory, size = self.regions(features)
        return self.decoder.prepare(memory, None, size)

    def forward(self, images: Float[Tensor, "b c h w"], words: Int[Tensor, "b r t"]) -> Float[Tensor, "b r s v"]:
        """Return the logits of the words of captions, each from those before: of t words come t + 1."""
        return self.decoder.write(self.told(images, words).features)

    def told(self, images: Float[Tensor, "b c h w"], words: Int[Tensor, "b r t"]) -> Said:
        """Return what the decoder makes of captions, and where it looked."""
        return self.decoder(self.prepare(images), words)

    def caption(self, images: Float[Tensor, "b c h w"], **options: Any) -> Sentences:
        """Say what is in images, by :func:`~visattn.models.decoders.beam`, which has the options."""
        return self.say(self.prepare(images), **options)

    def say(self, prepared: Any, **options: Any) -> Sentences:
        """Say what is in images that were made ready; see :meth:`caption`."""
        return beam(self.decoder, prepared, end=self.end, **options)
