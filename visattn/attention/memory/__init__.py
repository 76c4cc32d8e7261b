"""A query reads a memory: regions or words."""

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.area import AreaMemoryAttention
from visattn.attention.memory.cosine import CosineAttention
from visattn.attention.memory.coverage import CoverageAttention
from visattn.attention.memory.local import LocalAttention
from visattn.attention.memory.location_sensitive import LocationSensitiveAttention
from visattn.attention.memory.multi_head import MultiHeadAttention
from visattn.attention.memory.multiplicative import LocationAttention, MultiplicativeAttention
from visattn.attention.memory.smoothed import SmoothedAttention

__all__ = [
    "AdditiveAttention",
    "AreaMemoryAttention",
    "CosineAttention",
    "CoverageAttention",
    "LocalAttention",
    "LocationAttention",
    "LocationSensitiveAttention",
    "MultiHeadAttention",
    "MultiplicativeAttention",
    "SmoothedAttention",
]
