"""Attention that makes vectors of a map, in place of a global pool."""

from visattn.attention.pooling.attention_pool import AttentionPool
from visattn.attention.pooling.class_attention import ClassAttention
from visattn.attention.pooling.generalized_mean import GeneralizedMeanPool
from visattn.attention.pooling.hierarchical import HierarchicalAttentionPool
from visattn.attention.pooling.maximum import MaxPool
from visattn.attention.pooling.mean import MeanPool
from visattn.attention.pooling.multiple_instance import GatedMultipleInstancePool
from visattn.attention.pooling.pay_attention import PayAttention
from visattn.attention.pooling.structured import StructuredSelfAttentivePool

__all__ = [
    "AttentionPool",
    "ClassAttention",
    "GatedMultipleInstancePool",
    "GeneralizedMeanPool",
    "HierarchicalAttentionPool",
    "MaxPool",
    "MeanPool",
    "PayAttention",
    "StructuredSelfAttentivePool",
]
