from functools import partial

import pytest
import torch
from timm.layers.coord_attn import EfficientLocalAttn
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import EfficientLocalAttention

CASES = [
    Case(EfficientLocalAttention, {}, lambda c: 7 * c + 2 * c, (576, 2304), macs=lambda c, h, w: 7 * c * (h + w)),
    Case(
        EfficientLocalAttention,
        {"shared": False, "kernel_size": 5, "group_width": 8},
        lambda c: 2 * (5 * 8 * c + 2 * c),
        (5376, 21_504),
        macs=lambda c, h, w: 5 * 8 * c * (h + w),
    ),
]

either = pytest.mark.parametrize("shared", [True, False])


def lively(channels: int = 8, **options) -> EfficientLocalAttention:
    module = EfficientLocalAttention(channels, **options).double()
    for strip in module.strips:
        nn.init.uniform_(strip[1].weight, 0.5, 1.5)
        nn.init.normal_(strip[1].bias)
    return module


def gate(strip: nn.Sequential, z: list[list[Tensor]], group_width: int) -> list[list[Tensor]]:
    """Convolution, group norm and logistic function of one strip, a list of positions for each channel."""
    conv, norm = strip
    channels, length, reach = len(z), len(z[0]), conv.kernel_size[0] // 2
    values = []
    for c in range(channels):
        first = c // group_width * group_width
        values.append(
            [
                sum(
                    conv.weight[c, i, reach + d] * z[first + i][p + d]
                    for i in range(group_width)
                    for d in range(-reach, reach + 1)
                    if 0 <= p + d < length
                )
                for p in range(length)
            ]
        )
    size = channels // norm.num_groups
    for g in range(norm.num_groups):
        members = range(g * size, (g + 1) * size)
        mean = sum(v for c in members for v in values[c]) / (size * length)
        variance = sum((v - mean) ** 2 for c in members for v in values[c]) / (size * length)
        for c in members:
            values[c] = [
                1 / (1 + torch.exp(-((v - mean) / torch.sqrt(variance + 1e-5) * norm.weight[c] + norm.bias[c])))
                for v in values[c]
            ]
    return values


def paper(module: EfficientLocalAttention, x: Tensor, group_width: int) -> Tensor:
    """The paper's equations, in loops."""
    y = torch.empty_like(x)
    batch, channels, height, width = x.shape
    for b in range(batch):
        rows = [[sum(x[b, c, p]) / width for p in range(height)] for c in range(channels)]
        columns = [[sum(x[b, c, :, q]) / height for q in range(width)] for c in range(channels)]
        rows, columns = gate(module.strips[0], rows, group_width), gate(module.strips[-1], columns, group_width)
        for c in range(channels):
            for p in range(height):
                for q in range(width):
                    y[b, c, p, q] = x[b, c, p, q] * rows[c][p] * columns[c][q]
    return y


@either
@pytest.mark.parametrize(("kernel_size", "group_width", "norm_groups"), [(7, 1, 4), (3, 4, 1)])
def test_equals_the_paper_in_loops(shared, kernel_size, group_width, norm_groups):
    module = lively(kernel_size=kernel_size, group_width=group_width, norm_groups=norm_groups, shared=shared)
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x, group_width), rtol=0, atol=1e-12)


@either
def test_follows_a_transposed_map_only_if_rows_and_columns_share_their_layers(shared):
    module, x = lively(64, shared=shared), torch.randn(2, 64, 5, 7, dtype=torch.double)
    assert torch.allclose(module(x.mT), module(x).mT) == shared


def test_sees_the_order_of_rows_unless_the_kernel_is_one():
    x, order = torch.randn(2, 64, 5, 7, dtype=torch.double), [2, 0, 4, 1, 3]
    for kernel_size in (1, 7):
        module = lively(64, kernel_size=kernel_size)
        assert torch.allclose(module(x[:, :, order]), module(x)[:, :, order]) == (kernel_size == 1)


def test_the_weights_of_a_channel_have_rank_one():
    module, x = lively(64), torch.rand(2, 64, 5, 7, dtype=torch.double) + 1
    largest, second, *_ = torch.linalg.svdvals(module(x) / x).unbind(-1)
    assert (second < 1e-12 * largest).all()


def test_equals_timm_without_its_activation_after_copying_weights():
    ours, x = lively(64, shared=False).float(), torch.randn(2, 64, 5, 7)
    theirs = EfficientLocalAttn(64, act_layer=nn.Identity, norm_layer=partial(nn.GroupNorm, 16))
    with torch.no_grad():
        theirs.conv_h.weight.copy_(ours.strips[0][0].weight[..., None])
        theirs.conv_w.weight.copy_(ours.strips[1][0].weight[:, :, None])
    theirs.norm_h.load_state_dict(ours.strips[0][1].state_dict())
    theirs.norm_w.load_state_dict(ours.strips[1][1].state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kernel_size", [-1, 4])
def test_refuses_a_kernel_without_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
        EfficientLocalAttention(64, kernel_size=kernel_size)


@pytest.mark.parametrize("option", ["group_width", "norm_groups"])
@pytest.mark.parametrize("value", [0, 48])
def test_refuses_groups_that_do_not_divide_the_channels(option, value):
    with pytest.raises(ValueError, match=f"{option} must divide channels=64, got {value}"):
        EfficientLocalAttention(64, **{option: value})


@pytest.mark.parametrize(("channels", "groups"), [(64, 16), (24, 8), (7, 1)])
def test_takes_as_many_groups_as_divide_the_channels_if_it_is_free_to(channels, groups):
    assert EfficientLocalAttention(channels).strips[0][1].num_groups == groups
