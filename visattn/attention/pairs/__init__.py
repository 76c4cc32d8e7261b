"""Attention between two feature maps: what they have in common, or what one asks of the other."""

from visattn.attention.pairs.abcnn import MatchingAttention, MatchingPool
from visattn.attention.pairs.attention_gate import AttentionGate
from visattn.attention.pairs.cross_attention import CrossAttention2d

__all__ = ["AttentionGate", "CrossAttention2d", "MatchingAttention", "MatchingPool"]
