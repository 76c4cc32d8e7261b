"""Say what is in a picture: any backbone of timm looks, and a decoder tells word by word, looking where it wants."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from visattn.models.decoders.core import Decoder, Said
from visattn.models.decoders.search import Sentences, beam
from visattn.models.decoders.show_attend_and_tell import ShowAttendAndTell
from visattn.models.network import at_least_one
from visattn.models.regions import RegionNetwork


class Captioner(RegionNetwork):
    r"""Say what is in a picture, and where each word was read.

    The positions of the backbone's last map, as many as there are, are the regions that the decoder looks at; they are
    never resized. With a ``width`` they are first narrowed by :math:`\operatorname{ReLU}(W \operatorname{LN}(v))`; they
    may then look at each other, by ``layers`` transformer blocks that know rows and columns.

    Args:
        vocabulary: How many words there are.
        end: The word that ends a sentence.
        unknown: The word that stands for all that are not known, which is read, but never said; None: there is none.
        backbone: Name of a timm model, or the model itself, which is then taken as it is; such a captioner is not
            saved.
        pretrained: Whether a backbone that is named starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, for a backbone that is named.
        decoder: What tells, called with the number of words and the features of a region.
        width: Features of a region; None: as many as the backbone has.
        placed: Whether regions are told their rows and columns, by sines and cosines that are added to them.
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
        unknown: int | None = None,
        backbone: str | nn.Module = "mobilenetv2_100",
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        decoder: Callable[[int, int], Decoder] = ShowAttendAndTell,
        width: int | None = None,
        placed: bool = False,
        layers: int = 0,
        heads: int = 8,
        dropout: float = 0.0,
    ):
        super().__init__(
            backbone,
            pretrained=pretrained,
            backbone_args=backbone_args,
            width=width,
            placed=placed,
            layers=layers,
            heads=heads,
            dropout=dropout,
        )
        at_least_one(vocabulary=vocabulary)
        if not 0 <= end < vocabulary:
            raise ValueError(f"end must be one of {vocabulary} words, got {end}")
        if unknown is not None and (unknown == end or not 0 <= unknown < vocabulary):
            raise ValueError(f"unknown must be one of {vocabulary} words but end={end}, got {unknown}")
        self.end = end
        self.never = () if unknown is None else (unknown,)
        self.decoder = decoder(vocabulary, self.width)

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
        return beam(self.decoder, prepared, **{"end": self.end, "never": self.never} | options)
