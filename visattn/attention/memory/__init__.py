"""A query reads a memory: regions or words."""

from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.addressable import AddressableMemory
from visattn.attention.memory.area import AreaMemoryAttention
from visattn.attention.memory.attention_on_attention import AttentionOnAttention
from visattn.attention.memory.convolutional_summary import ConvolutionalSummary
from visattn.attention.memory.cosine import CosineAttention
from visattn.attention.memory.coverage import CoverageAttention
from visattn.attention.memory.hard import HardAttention
from visattn.attention.memory.hierarchical import HierarchicalAttention
from visattn.attention.memory.local import LocalAttention
from visattn.attention.memory.location_sensitive import LocationSensitiveAttention
from visattn.attention.memory.multi_head import MultiHeadAttention
from visattn.attention.memory.multiplicative import LocationAttention, MultiplicativeAttention
from visattn.attention.memory.readers import AttentiveReader, ImpatientReader
from visattn.attention.memory.sentinel import SentinelAttention
from visattn.attention.memory.smoothed import SmoothedAttention
from visattn.attention.memory.variable import VariableAttention

__all__ = [
    "AdditiveAttention",
    "AddressableMemory",
    "AreaMemoryAttention",
    "AttentionOnAttention",
    "AttentiveReader",
    "ConvolutionalSummary",
    "CosineAttention",
    "CoverageAttention",
    "HardAttention",
    "HierarchicalAttention",
    "ImpatientReader",
    "LocalAttention",
    "LocationAttention",
    "LocationSensitiveAttention",
    "MultiHeadAttention",
    "MultiplicativeAttention",
    "SentinelAttention",
    "SmoothedAttention",
    "VariableAttention",
]
