"""Attention over kernels or branches, in place of a convolution."""

from visattn.attention.kernel.conditional_convolution import ConditionalConvolution
from visattn.attention.kernel.contextual_transformer import ContextualTransformer
from visattn.attention.kernel.deformable_convolution import DeformableConvolution
from visattn.attention.kernel.dynamic_convolution import DynamicConvolution
from visattn.attention.kernel.involution import Involution
from visattn.attention.kernel.pyramid_squeeze import PyramidSqueezeAttention
from visattn.attention.kernel.selective_kernel import SelectiveKernel
from visattn.attention.kernel.split_attention import SplitAttention

__all__ = [
    "ConditionalConvolution",
    "ContextualTransformer",
    "DeformableConvolution",
    "DynamicConvolution",
    "Involution",
    "PyramidSqueezeAttention",
    "SelectiveKernel",
    "SplitAttention",
]
