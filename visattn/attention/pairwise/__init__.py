"""Attention between positions: every position reads every other."""

from visattn.attention.pairwise.area import AreaAttention
from visattn.attention.pairwise.attention_augmented import AttentionAugmentedConvolution
from visattn.attention.pairwise.axial import AxialAttention
from visattn.attention.pairwise.bottleneck import BottleneckSelfAttention
from visattn.attention.pairwise.criss_cross import CrissCrossAttention
from visattn.attention.pairwise.dilated import DilatedSelfAttention
from visattn.attention.pairwise.double import DoubleAttention
from visattn.attention.pairwise.dual import ChannelAttention, PositionAttention
from visattn.attention.pairwise.efficient import EfficientAttention
from visattn.attention.pairwise.external import ExternalAttention
from visattn.attention.pairwise.generalized import GeneralizedAttention
from visattn.attention.pairwise.halo import HaloAttention
from visattn.attention.pairwise.lambda_attention import LambdaAttention
from visattn.attention.pairwise.local import LocalSelfAttention
from visattn.attention.pairwise.multi_head import MultiHeadSelfAttention2d
from visattn.attention.pairwise.non_local import NonLocal
from visattn.attention.pairwise.outlook import OutlookAttention
from visattn.attention.pairwise.sagan import SelfAttention2d
from visattn.attention.pairwise.stand_alone import StandAloneSelfAttention
from visattn.attention.pairwise.strided import StridedSelfAttention
from visattn.attention.pairwise.transformer_block import TransformerBlock2d

__all__ = [
    "AreaAttention",
    "AttentionAugmentedConvolution",
    "AxialAttention",
    "BottleneckSelfAttention",
    "ChannelAttention",
    "CrissCrossAttention",
    "DilatedSelfAttention",
    "DoubleAttention",
    "EfficientAttention",
    "ExternalAttention",
    "GeneralizedAttention",
    "HaloAttention",
    "LambdaAttention",
    "LocalSelfAttention",
    "MultiHeadSelfAttention2d",
    "NonLocal",
    "OutlookAttention",
    "PositionAttention",
    "SelfAttention2d",
    "StandAloneSelfAttention",
    "StridedSelfAttention",
    "TransformerBlock2d",
]
