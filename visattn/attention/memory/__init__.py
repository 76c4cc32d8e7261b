"""A query reads a memory: regions or words."""

from visattn.attention.memory.additive import AdditiveAttention

__all__ = [
    "AdditiveAttention",
]
