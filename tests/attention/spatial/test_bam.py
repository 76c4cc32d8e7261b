import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import BAM

CASES = [
    Case(
        BAM,
        options,
        lambda c: 3 * c * c // 16 + 18 * (c // 16) ** 2 + 13 * c // 16 + c + 1,
        (1173, 17_361),
        macs=lambda c, h, w: c * c // 8 + h * w * (c * c // 16 + 18 * (c // 16) ** 2 + c // 16),
        norm_over="samples",
    )
    for options in ({}, {"combine": "product"}, {"dilation": 1})
]


def normalise(norm: nn.Module, channel: int, value: Tensor) -> Tensor:
    """Batch norm of one value as it is in eval, and a ReLU."""
    scale = norm.weight[channel] / torch.sqrt(norm.running_var[channel] + norm.eps)
    return ((value - norm.running_mean[channel]) * scale + norm.bias[channel]).clamp(min=0)


def dense(layer: nn.Module, z: Tensor) -> list[Tensor]:
    weight = layer.weight.flatten(1)
    return [sum((weight[o, i] * z[i] for i in range(len(z))), layer.bias[o]) for o in range(weight.shape[0])]


def dilated(layer: nn.Conv2d, z: Tensor, dilation: int) -> Tensor:
    width, height, length = z.shape
    y = torch.empty_like(z)
    for o in range(width):
        for p in range(height):
            for q in range(length):
                y[o, p, q] = layer.bias[o]
                for i in range(width):
                    for dp in (-1, 0, 1):
                        for dq in (-1, 0, 1):
                            r, s = p + dilation * dp, q + dilation * dq
                            if 0 <= r < height and 0 <= s < length:
                                y[o, p, q] += layer.weight[o, i, dp + 1, dq + 1] * z[i, r, s]
    return y


def each_position(x: Tensor, function) -> Tensor:
    columns = [[function(x[:, p, q]) for q in range(x.shape[2])] for p in range(x.shape[1])]
    return torch.stack([torch.stack([torch.stack(list(column)) for column in row], -1) for row in columns], -2)


def paper(module: BAM, x: Tensor, dilation: int, combine: str) -> Tensor:
    """Section 3 of the paper, in loops."""
    y = torch.empty_like(x)
    narrow, norm, _, widen = module.channel
    first, norm1, _, second, norm2, _, third, norm3, _, last = module.spatial
    for b in range(x.shape[0]):
        mean = torch.stack([sum(v for row in channel for v in row) / channel.numel() for channel in x[b]])
        channel = dense(widen, [normalise(norm, i, v) for i, v in enumerate(dense(narrow, mean))])
        z = each_position(x[b], lambda v: [normalise(norm1, i, u) for i, u in enumerate(dense(first, v))])
        for conv, following in ((second, norm2), (third, norm3)):
            z = dilated(conv, z, dilation)
            z = each_position(z, lambda v, following=following: [normalise(following, i, u) for i, u in enumerate(v)])
        spatial = each_position(z, lambda v: dense(last, v))[0]
        for c in range(x.shape[1]):
            logits = channel[c] + spatial if combine == "sum" else channel[c] * spatial
            y[b, c] = x[b, c] * (1 + 1 / (1 + torch.exp(-logits)))
    return y


def lively(module: BAM) -> BAM:
    """The module in eval, with norms that have seen something."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (layer.weight.data, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.bias.data, layer.running_mean):
                nn.init.normal_(tensor)
    return module.eval()


@pytest.mark.parametrize("combine", ["sum", "product"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_equals_the_paper_in_loops(combine, dilation):
    module = lively(BAM(6, reduction=3, dilation=dilation, combine=combine)).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x, dilation, combine), rtol=0, atol=1e-12)


def test_dilation_is_four_as_in_the_paper():
    module, x = lively(BAM(64)), torch.randn(1, 64, 24, 24)
    moved = x.clone()
    moved[..., 12, 12] += 1
    weights, after = module.spatial(x)[0, 0], module.spatial(moved)[0, 0]
    rows = (weights != after).any(1).nonzero().flatten().tolist()
    assert rows == [4, 8, 12, 16, 20]


def test_channel_branch_does_not_see_where_things_are_but_the_whole_does():
    module, x, order = lively(BAM(64)), torch.randn(2, 64, 5, 7), torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module.channel(shuffled.mean((2, 3))), module.channel(x.mean((2, 3))))
    assert not torch.allclose(module.attend(shuffled), module.attend(x).flatten(2)[..., order].view_as(x))


def test_follows_the_map_around_a_torus():
    module, x = lively(BAM(64)), torch.randn(2, 64, 9, 11)
    for layer in module.spatial:
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.padding_mode = "circular"
            layer._reversed_padding_repeated_twice = [4, 4, 4, 4]
    torch.testing.assert_close(module(x.roll((2, 3), (2, 3))), module(x).roll((2, 3), (2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_zero_weights_make_one_and_a_half_of_the_map(combine):
    module, x = BAM(64, combine=combine).eval(), torch.randn(2, 64, 5, 7)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(module(x), 1.5 * x, rtol=0, atol=1e-6)


def test_only_ever_stresses():
    module, x = lively(BAM(64)), torch.rand(2, 64, 5, 7) + 1
    ratio = module(x) / x
    assert ((ratio > 1) & (ratio < 2)).all()


@pytest.mark.parametrize(("channels", "count"), [(64, 1173), (256, 17361), (512, 68513), (1024, 272193)])
def test_has_the_parameters_of_the_released_code(channels, count):
    width = channels // 16
    channel = 2 * channels * width + width + channels + 2 * width
    spatial = channels * width + width + 2 * width + 2 * (9 * width**2 + width + 2 * width) + width + 1
    assert sum(p.numel() for p in BAM(channels).parameters()) == channel + spatial == count


def test_training_on_one_image_says_what_the_norm_lacks():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BAM(64)(torch.randn(1, 64, 5, 7))
    assert BAM(64).eval()(torch.randn(1, 64, 1, 1)).shape == (1, 64, 1, 1)


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        BAM(64, reduction=reduction)


def test_refuses_a_dilation_that_is_not_positive():
    with pytest.raises(ValueError, match="dilation must be positive, got 0"):
        BAM(64, dilation=0)


def test_refuses_an_unknown_way_to_combine(unchecked):
    with pytest.raises(ValueError, match="combine must be 'sum' or 'product', got 'max'"):
        BAM(64, combine="max")
