"""Decoders: they say what is in a picture, word by word. ``__all__`` is the index."""

from visattn.models.decoders.adaptive import AdaptiveDecoder
from visattn.models.decoders.bidirectional import BidirectionalDecoder
from visattn.models.decoders.convolutional import ConvolutionalDecoder
from visattn.models.decoders.core import Decoder, Said
from visattn.models.decoders.dilated import DilatedDecoder
from visattn.models.decoders.ensemble import Ensemble
from visattn.models.decoders.feed_forward import FeedForwardDecoder
from visattn.models.decoders.luong import LuongDecoder
from visattn.models.decoders.pooled import PooledDecoder
from visattn.models.decoders.search import Sentences, beam, sample
from visattn.models.decoders.show_attend_and_tell import ShowAttendAndTell
from visattn.models.decoders.transformer import TransformerDecoder
from visattn.models.decoders.up_down import UpDownDecoder

__all__ = [
    "AdaptiveDecoder",
    "BidirectionalDecoder",
    "ConvolutionalDecoder",
    "Decoder",
    "DilatedDecoder",
    "Ensemble",
    "FeedForwardDecoder",
    "LuongDecoder",
    "PooledDecoder",
    "Said",
    "Sentences",
    "ShowAttendAndTell",
    "TransformerDecoder",
    "UpDownDecoder",
    "beam",
    "sample",
]
