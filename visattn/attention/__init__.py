"""Attention modules: pure ``nn.Module`` classes, one paper a file. ``__all__`` is the index."""

from visattn.attention.base import Attention
from visattn.attention.channel.efficient_channel import EfficientChannelAttention
from visattn.attention.channel.squeeze_excitation import SqueezeExcitation
from visattn.attention.pairwise.non_local import NonLocal
from visattn.attention.pairwise.sagan import SelfAttention2d
from visattn.attention.spatial.bam import BAM
from visattn.attention.spatial.cbam import CBAM, ChannelGate, SpatialGate

__all__ = [
    "BAM",
    "CBAM",
    "Attention",
    "ChannelGate",
    "EfficientChannelAttention",
    "NonLocal",
    "SelfAttention2d",
    "SpatialGate",
    "SqueezeExcitation",
]
