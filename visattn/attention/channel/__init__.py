"""Attention over channels: one weight a channel."""

from visattn.attention.channel.effective_squeeze_excitation import EffectiveSqueezeExcitation
from visattn.attention.channel.efficient_channel import EfficientChannelAttention
from visattn.attention.channel.frequency_channel import FrequencyChannelAttention
from visattn.attention.channel.gated_channel_transform import GatedChannelTransform
from visattn.attention.channel.gather_excite import GatherExcite
from visattn.attention.channel.gaussian_context_transform import GaussianContextTransform
from visattn.attention.channel.global_context import GlobalContext, SimplifiedNonLocal
from visattn.attention.channel.linear_context_transform import LinearContextTransform
from visattn.attention.channel.second_order_channel import SecondOrderChannelAttention
from visattn.attention.channel.squeeze_excitation import SqueezeExcitation
from visattn.attention.channel.style_recalibration import StyleRecalibration

__all__ = [
    "EffectiveSqueezeExcitation",
    "EfficientChannelAttention",
    "FrequencyChannelAttention",
    "GatedChannelTransform",
    "GatherExcite",
    "GaussianContextTransform",
    "GlobalContext",
    "LinearContextTransform",
    "SecondOrderChannelAttention",
    "SimplifiedNonLocal",
    "SqueezeExcitation",
    "StyleRecalibration",
]
