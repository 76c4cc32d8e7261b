"""Decoders: they say what is in a picture, word by word. ``__all__`` is the index."""

from visattn.models.decoders.core import Decoder, Said
from visattn.models.decoders.ensemble import Ensemble
from visattn.models.decoders.luong import LuongDecoder
from visattn.models.decoders.search import Sentences, beam, sample
from visattn.models.decoders.show_attend_and_tell import ShowAttendAndTell
from visattn.models.decoders.up_down import UpDownDecoder

__all__ = [
    "Decoder",
    "Ensemble",
    "LuongDecoder",
    "Said",
    "Sentences",
    "ShowAttendAndTell",
    "UpDownDecoder",
    "beam",
    "sample",
]
