"""Attention over positions, or over channels and positions together."""

from visattn.attention.spatial.attention_branch import AttentionBranch
from visattn.attention.spatial.bam import BAM
from visattn.attention.spatial.cbam import CBAM, ChannelGate, SpatialGate
from visattn.attention.spatial.coordinate import CoordinateAttention
from visattn.attention.spatial.efficient_local import EfficientLocalAttention
from visattn.attention.spatial.efficient_multi_scale import EfficientMultiScaleAttention
from visattn.attention.spatial.global_attention_mechanism import GlobalAttentionMechanism
from visattn.attention.spatial.large_kernel import LargeKernelAttention
from visattn.attention.spatial.parallel_net import ParallelNetAttention
from visattn.attention.spatial.polarized import PolarizedSelfAttention
from visattn.attention.spatial.residual_attention import ResidualAttention
from visattn.attention.spatial.shuffle import ShuffleAttention
from visattn.attention.spatial.simam import SimAM
from visattn.attention.spatial.spatial_channel_squeeze_excitation import SpatialChannelSqueezeExcitation
from visattn.attention.spatial.spatial_group_enhance import SpatialGroupEnhance
from visattn.attention.spatial.split_spatial_shift import SplitSpatialShiftAttention
from visattn.attention.spatial.strip_pooling import MixedPooling, StripPooling
from visattn.attention.spatial.triplet import TripletAttention

__all__ = [
    "BAM",
    "CBAM",
    "AttentionBranch",
    "ChannelGate",
    "CoordinateAttention",
    "EfficientLocalAttention",
    "EfficientMultiScaleAttention",
    "GlobalAttentionMechanism",
    "LargeKernelAttention",
    "MixedPooling",
    "ParallelNetAttention",
    "PolarizedSelfAttention",
    "ResidualAttention",
    "ShuffleAttention",
    "SimAM",
    "SpatialChannelSqueezeExcitation",
    "SpatialGate",
    "SpatialGroupEnhance",
    "SplitSpatialShiftAttention",
    "StripPooling",
    "TripletAttention",
]
