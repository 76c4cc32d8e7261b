import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import EfficientMultiScaleAttention

# Read word by word, the equation takes g (d² (h + w) + (9 d² + 2 d) h w) multiply-adds for g groups of d channels.
CASES = [
    Case(
        EfficientMultiScaleAttention,
        {"groups": g},
        lambda c, g=g: 10 * (c // g) ** 2 + 4 * c // g,
        golden,
        macs=lambda c, h, w, g=g: (c // g) ** 2 * (g * (h + w) + 9 * g + 9) + 10 * c * h * w,
        small=g,
    )
    for g, golden in ((8, (672, 10_368)), (32, (48, 672)))
]


def lively(channels: int = 64, groups: int = 8) -> EfficientMultiScaleAttention:
    module = EfficientMultiScaleAttention(channels, groups=groups).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def logistic(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def views(module: EfficientMultiScaleAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both views of one group of channels, in loops."""
    channels, height, width = x.shape
    layer, norm, conv = module.strips, module.norm, module.windows
    rows = [
        logistic(layer.weight[:, :, 0] @ torch.stack([sum(r) / width for r in x[:, p]]) + layer.bias)
        for p in range(height)
    ]
    columns = [
        logistic(layer.weight[:, :, 0] @ torch.stack([sum(c) / height for c in x[:, :, q]]) + layer.bias)
        for q in range(width)
    ]
    u, v = torch.empty_like(x), torch.empty_like(x)
    for c in range(channels):
        for p in range(height):
            for q in range(width):
                u[c, p, q] = x[c, p, q] * rows[p][c] * columns[q][c]
                v[c, p, q] = conv.bias[c]
                for dp in (-1, 0, 1):
                    for dq in (-1, 0, 1):
                        if 0 <= p + dp < height and 0 <= q + dq < width:
                            v[c, p, q] += conv.weight[c, :, dp + 1, dq + 1] @ x[:, p + dp, q + dq]
        mean = sum(value for row in u[c] for value in row) / (height * width)
        variance = sum((value - mean) ** 2 for row in u[c] for value in row) / (height * width)
        u[c] = (u[c] - mean) / torch.sqrt(variance + 1e-5) * norm.weight[c] + norm.bias[c]
    return u, v


def paper(module: EfficientMultiScaleAttention, x: Tensor) -> Tensor:
    """The paper's equation word by word, in loops."""
    y, size = torch.empty_like(x), x.shape[1] // module.groups
    for b in range(x.shape[0]):
        for g in range(module.groups):
            group = x[b, g * size : (g + 1) * size]
            u, v = views(module, group)
            of_v, of_u = (torch.exp(each.mean((1, 2))) for each in (u, v))
            of_v, of_u = of_v / sum(of_v), of_u / sum(of_u)
            logits = sum(of_v[c] * v[c] + of_u[c] * u[c] for c in range(size))
            y[b, g * size : (g + 1) * size] = group * logistic(logits)
    return y


@torch.no_grad()
@pytest.mark.parametrize("size", [(3, 4), (1, 3)])
def test_equals_the_paper_in_loops(size):
    module, x = lively(6, 2), torch.randn(2, 6, *size, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 2), (5, 7)])
def test_the_mean_of_the_windows_needs_no_window(size):
    module, x = lively(), torch.randn(3, 8, *size, dtype=torch.double)
    torch.testing.assert_close(module._mean_of_windows(x, x.mean(2)), module.windows(x).mean((2, 3)))


def test_the_mean_of_an_instance_norm_is_its_bias():
    module, x = lively(), torch.randn(3, 8, 5, 7, dtype=torch.double)
    torch.testing.assert_close(module.norm(x).mean((2, 3)), module.norm.bias.expand(3, 8))


def test_groups_share_their_parameters_but_channels_do_not():
    module, x = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    order = [5, 0, 3, 1, 7, 2, 4, 6]
    swapped = module.attend(x.unflatten(1, (8, 8))[:, order].flatten(1, 2))
    torch.testing.assert_close(swapped, module.attend(x)[:, order])
    assert not torch.allclose(module.attend(x.roll(3, 1)), module.attend(x))


def test_sees_the_order_of_rows_only_by_its_windows():
    module, x, order = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double), [2, 0, 4, 1, 3]
    assert not torch.allclose(module(x[:, :, order]), module(x)[:, :, order])
    with torch.no_grad():
        module.windows.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    torch.testing.assert_close(module(x[:, :, order]), module(x)[:, :, order])


@pytest.mark.parametrize("groups", [0, 48, 128])
def test_refuses_groups_that_do_not_divide_the_channels(groups):
    with pytest.raises(ValueError, match=f"groups must divide channels=64, got {groups}"):
        EfficientMultiScaleAttention(64, groups=groups)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (24, 8), (7, 1)])
def test_takes_as_many_groups_as_divide_the_channels_if_it_is_free_to(channels, groups):
    assert EfficientMultiScaleAttention(channels).groups == groups
