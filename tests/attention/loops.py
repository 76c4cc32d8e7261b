"""What papers write as layers, as loops over one image: the oracle of modules that are built of convolutions."""

import math

import torch
from torch import Tensor, nn


def lively(module: nn.Module) -> nn.Module:
    """The module in double precision and in eval, with norms that have seen something."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.normal_(layer.running_mean)
    return module.double().eval()


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    (_, height, width), (rows, columns) = x.shape, layer.kernel_size
    out = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, d, k, s in zip(
            (height, width), layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    y, inputs = x.new_zeros(layer.out_channels, *out), layer.in_channels // layer.groups
    for o in range(layer.out_channels):
        first = o // (layer.out_channels // layer.groups) * inputs
        for p in range(out[0]):
            for q in range(out[1]):
                for i in range(rows):
                    for j in range(columns):
                        row = p * layer.stride[0] - layer.padding[0] + i * layer.dilation[0]
                        column = q * layer.stride[1] - layer.padding[1] + j * layer.dilation[1]
                        if 0 <= row < height and 0 <= column < width:
                            y[o, p, q] += layer.weight[o, :, i, j] @ x[first : first + inputs, row, column]
        if layer.bias is not None:
            y[o] += layer.bias[o]
    return y


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm as it is in eval; channels come first."""
    y = torch.empty_like(x)
    for c in range(len(x)):
        y[c] = (x[c] - norm.running_mean[c]) / math.sqrt(norm.running_var[c] + norm.eps) * norm.weight[c] + norm.bias[c]
    return y


def dense(layer: nn.Linear, x: Tensor) -> Tensor:
    y = torch.stack([sum(layer.weight[o, i] * x[i] for i in range(len(x))) for o in range(layer.out_features)])
    return y if layer.bias is None else y + layer.bias


def chain(layers: nn.Sequential, x: Tensor) -> Tensor:
    """One layer after the other: convolutions, linear layers, batch norms and ReLUs."""
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            x = chain(layer, x)
        elif isinstance(layer, nn.Conv2d):
            x = convolve(layer, x)
        elif isinstance(layer, nn.Linear):
            x = dense(layer, x)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            x = normalise(layer, x)
        else:
            assert isinstance(layer, nn.ReLU)
            x = x * (x > 0)
    return x


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def mean(x: Tensor) -> Tensor:
    """Of every channel."""
    return torch.stack([sum(v for row in channel for v in row) / channel.numel() for channel in x])


def interpolate(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, with pixels as areas: corners are not aligned."""

    def taps(place: int, size: int, length: int) -> list[tuple[int, float]]:
        at = max((place + 0.5) * length / size - 0.5, 0)
        low = min(int(at), length - 1)
        return [(low, 1 - (at - low)), (min(low + 1, length - 1), at - low)]

    y = x.new_zeros(len(x), height, width)
    for p in range(height):
        for q in range(width):
            for i, a in taps(p, height, x.shape[1]):
                for j, b in taps(q, width, x.shape[2]):
                    y[:, p, q] += a * b * x[:, i, j]
    return y
