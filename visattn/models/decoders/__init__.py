"""Decoders: they say what is in a picture, word by word. ``__all__`` is the index."""

from visattn.models.decoders.core import Decoder, Said
from visattn.models.decoders.show_attend_and_tell import ShowAttendAndTell

__all__ = ["Decoder", "Said", "ShowAttendAndTell"]
