import math

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import chain, lively, logistic, mean, normalise
from visattn import ContextualTransformer, insert


def between(c: int) -> int:
    """Features of the layer inside the fusion."""
    return max(c // 2, 32)


CASES = [  # the paper also counts the 9 c multiply-adds of every position that read the values
    Case(
        ContextualTransformer,
        {},
        lambda c: 77 * c * c // 16 + 99 * c // 8 + 3 * between(c) * (c + 1),
        (26_744, 417_248),
        macs=lambda c, h, w: h * w * 77 * c * c // 16 + 3 * c * between(c),
        sums_to_one=[None, 1],
        norm_over="samples",
        small=8,
    ),
]


def reduce(x: Tensor, stride: int) -> Tensor:
    """The mean of 3 × 3 pixels, zeros beyond the border among them."""
    (channels, height, width), y = x.shape, []
    rows, columns = range(0, height, stride), range(0, width, stride)
    for p in rows:
        for q in columns:
            near = x[:, max(p - 1, 0) : p + 2, max(q - 1, 0) : q + 2]
            y.append(near.flatten(1).sum(1) / 9)
    return torch.stack(y, 1).view(channels, len(rows), len(columns))


def paper(module: ContextualTransformer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Section 3.2 of the paper in loops, with the layers of the released code: both weights and the result."""
    if isinstance(module.reduce, nn.AvgPool2d):
        x = reduce(x, module.reduce.stride)
    static, value = chain(module.key, x), chain(module.value, x)
    (channels, height, width), side = static.shape, module.kernel_size
    *layers, norm = module.kernel
    raw = chain(nn.Sequential(*layers), torch.cat([x, static]))
    kernel, taps = torch.empty_like(raw), side**2
    for g in range(channels // 8):
        group = raw[g * taps : (g + 1) * taps]
        middle = sum(group.flatten()) / group.numel()
        spread = sum((v - middle) ** 2 for v in group.flatten()) / group.numel()
        for tap in range(g * taps, (g + 1) * taps):
            kernel[tap] = (raw[tap] - middle) / math.sqrt(spread + norm.eps) * norm.weight[tap] + norm.bias[tap]
    read = torch.zeros_like(static)
    for c in range(channels):
        for p in range(height):
            for q in range(width):
                for i in range(side):
                    for j in range(side):
                        row, column = p + i - side // 2, q + j - side // 2
                        if 0 <= row < height and 0 <= column < width:
                            weight = kernel[c % (channels // 8) * taps + i * side + j, p, q]
                            read[c, p, q] += weight * value[c, row, column]
    read = normalise(module.norm, read)
    dynamic = read * logistic(read)
    logits = chain(module.fuse, mean(dynamic + static))
    context, y = x.new_empty(2, channels), torch.empty_like(static)
    for c in range(channels):
        one, two = math.exp(logits[2 * c]), math.exp(logits[2 * c + 1])
        context[0, c], context[1, c] = one / (one + two), two / (one + two)
        y[c] = context[0, c] * dynamic[c] + context[1, c] * static[c]
    return kernel.view(-1, side, side, height, width), context, y


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"out_channels": 8, "kernel_size": 5, "cardinality": 2}])
@torch.no_grad()
def test_equals_the_paper_in_loops(options):
    module, x = lively(ContextualTransformer(16, **options)), torch.randn(1, 16, 3, 5, dtype=torch.double)
    kernel, context, y = paper(module, x[0])
    weights = module.attend(x)
    torch.testing.assert_close(weights.kernel[0], kernel, rtol=0, atol=1e-11)
    torch.testing.assert_close(weights.context[0, ..., 0, 0], context, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x)[0], y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("channels", "count"), [(64, 34_808), (256, 541_664)])
def test_has_the_parameters_of_wider_kernels_and_more_groups(channels, count):
    kernels = 25 * channels**2 // 8 + channels**2 + channels**2 + 25 * channels**2 // 16
    rest = 75 * channels // 8 + 9 * channels + 3 * between(channels) * (channels + 1)
    module = ContextualTransformer(channels, kernel_size=5, cardinality=8)
    assert sum(p.numel() for p in module.parameters()) == kernels + rest == count


def test_makes_cotnet_50_of_resnet_50():
    model = insert(timm.create_model("resnet50"), ContextualTransformer)
    count = sum(p.numel() for p in model.parameters())
    assert count == 22_229_968
    assert round(count / 1e6, 1) == 22.2  # as published; theirs has no norm after the module


def test_kernels_have_any_sign_and_sum_and_the_contexts_share_one():
    module, x = lively(ContextualTransformer(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    kernel, context = module.attend(x)
    assert kernel.shape == (2, 8, 3, 3, 5, 7)
    assert kernel.min() < 0
    assert kernel.sum((2, 3)).std() > 0.1
    torch.testing.assert_close(context.sum(1), torch.ones(2, 64, 1, 1, dtype=torch.double))


def test_reads_neighbours_with_kernels_that_are_given_not_the_whole_map():
    module, x = lively(ContextualTransformer(64)), torch.randn(1, 64, 7, 9, dtype=torch.double)
    weights, moved = module.attend(x), x.clone()
    moved[..., 3, 4] += 1
    changed = (module.read(moved, weights=weights) - module.read(x, weights=weights)).abs().amax(1)[0] > 1e-12
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[2:5, 3:6] = True
    assert torch.equal(changed, expected)


def test_a_kernel_of_its_middle_reads_the_values_as_they_are():
    module, x = lively(ContextualTransformer(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    kernel, context = module.attend(x)
    kernel, context = torch.zeros_like(kernel), torch.stack([torch.ones_like(context[:, 0])] * 2, 1)
    kernel[:, :, 1, 1] = 1
    context[:, 1] = 0
    expected = nn.functional.silu(module.norm(module.value(x)))
    given = type(module.attend(x))(kernel, context)
    torch.testing.assert_close(module.read(x, weights=given), expected, rtol=0, atol=1e-12)


def test_one_kernel_serves_a_channel_of_every_eighth():
    module, x = lively(ContextualTransformer(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    weights = module.attend(x)
    changed = weights.kernel.clone()
    changed[:, 3] += 1
    y = module.read(x, weights=weights._replace(kernel=changed))
    moved = (y - module.read(x, weights=weights)).abs().amax((0, 2, 3)) > 1e-12
    assert moved.nonzero().flatten().tolist() == [3, 11, 19, 27, 35, 43, 51, 59]


def test_follows_the_map_away_from_its_borders_but_not_a_permutation():
    module, x = lively(ContextualTransformer(16)), torch.zeros(1, 16, 14, 15, dtype=torch.double)
    x[:, :, 4:9, 5:9] = torch.randn(16, 5, 4, dtype=torch.double)
    y, moved = module(x), module(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved[..., 3:12, 4:13], y[..., 2:11, 2:11], rtol=0, atol=1e-11)
    order = torch.randperm(14 * 15)
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert not torch.allclose(module(shuffled), y.flatten(2)[..., order].view_as(x))


def test_takes_the_shape_of_the_convolution_it_replaces():
    x = torch.randn(2, 64, 9, 7)
    module, convolution = (
        ContextualTransformer(64, out_channels=128, stride=2),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
    )
    assert module(x).shape == convolution(x).shape


def test_training_on_one_image_says_what_the_norm_lacks():
    module, x = ContextualTransformer(64), torch.randn(1, 64, 5, 7)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(x)
    assert module.eval()(x).shape == x.shape


def test_refuses_channels_that_kernels_cannot_share():
    with pytest.raises(ValueError, match="out_channels must be a multiple of 8, got 60"):
        ContextualTransformer(60)


@pytest.mark.parametrize("kernel_size", [0, 4])
def test_refuses_a_kernel_without_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
        ContextualTransformer(64, kernel_size=kernel_size)


@pytest.mark.parametrize("cardinality", [0, 3])
def test_refuses_groups_that_do_not_divide(cardinality):
    rule = f"cardinality must divide channels=64 and out_channels=64, got {cardinality}"
    with pytest.raises(ValueError, match=rule):
        ContextualTransformer(64, cardinality=cardinality)
