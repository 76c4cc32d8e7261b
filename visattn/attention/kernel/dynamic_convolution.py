"""Chen, Dai, Liu, Chen, Yuan, Liu: Dynamic Convolution: Attention over Convolution Kernels (CVPR 2020)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.core import softmax
from visattn.attention.kernel.core import Kernels


class DynamicConvolution(Attention):
    r"""Convolve every image with its own mixture of a few kernels.

    .. math:: y = \bigl(\textstyle\sum_k \pi_k W_k\bigr) * x + \sum_k \pi_k b_k,
        \quad \pi = \operatorname{softmax}_k\bigl(V\, \mathrm{ReLU}(U\, \mathrm{mean}_{hw}(x)) / \tau\bigr)

    A high temperature :math:`\tau` lets all kernels learn at first. The paper trains with 30, lowered in a straight
    line to 1 over the first 10 epochs: call :meth:`anneal` with ``epoch / 10`` as each of them begins, as the tasks do
    by themselves. Left at 30, the kernels are mixed nearly alike for ever. The temperature is saved with the weights.

    Between :math:`U`, without biases, and :math:`V` are :math:`\lfloor c / r \rfloor + 1` features, as in public code;
    the paper writes :math:`c / r`. Our squeeze and choose are :math:`U` and :math:`V`.

    Args:
        channels: Channels :math:`c` of the feature map.
        out_channels: Channels to return; None: ``channels``.
        stride: Stride of the kernels.
        groups: Groups of the kernels.
        kernel_size: Height and width of a kernel in pixels.
        kernels: How many kernels there are.
        reduction: Ratio :math:`r` by which the layer inside is narrower than ``channels``.
        temperature: Temperature :math:`\tau` at which training begins.

    Raises:
        ValueError: If ``kernel_size`` is even or not positive, ``groups`` does not divide both numbers of channels,
            ``kernels`` or ``reduction`` is not positive, or ``temperature`` is below 1.

    Example:
        >>> DynamicConvolution(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1912.03458"
    place = "convolutions"
    replaces = "convolution"

    temperature: Tensor

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        groups: int = 1,
        kernel_size: int = 3,
        kernels: int = 4,
        reduction: int = 4,
        temperature: float = 30.0,
    ):
        super().__init__()
        for name, value in {"kernels": kernels, "reduction": reduction}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        self.highest = temperature
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        width = channels // reduction + 1
        self.squeeze = nn.Linear(channels, width, bias=False)
        self.choose = nn.Linear(width, kernels)
        self.kernels = Kernels(
            kernels,
            channels,
            channels if out_channels is None else out_channels,
            kernel_size=kernel_size,
            stride=stride,
            groups=groups,
            bias=True,
        )

    @torch.no_grad()
    def adopt(self, convolution: nn.Conv2d) -> bool:
        """Start every kernel as that of the convolution this stands in for; False if there is no such kernel here."""
        if convolution.weight.shape != self.kernels.weight.shape[1:]:
            return False
        self.kernels.weight.copy_(convolution.weight.expand_as(self.kernels.weight))
        if self.kernels.bias is not None:
            self.kernels.bias.copy_(torch.zeros(()) if convolution.bias is None else convolution.bias)
        return True

    def anneal(self, progress: float) -> None:
        """Lower the temperature in a straight line: from the first one at progress 0 to 1 at progress 1 and beyond.

        Raises:
            ValueError: If ``progress`` is negative.
        """
        if progress < 0:
            raise ValueError(f"progress must not be negative, got {progress}")
        self.temperature.fill_(self.highest + (1 - self.highest) * min(progress, 1))

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k 1 1 1"]:
        logits = self.choose(self.squeeze(x.mean((2, 3))).relu())
        return softmax(logits / self.temperature, 1)[..., None, None, None].to(x.dtype)

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b k 1 1 1"]) -> Float[Tensor, "b d h2 w2"]:
        return self.kernels(x, weights.flatten(1))
