import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import FrequencyChannelAttention, SqueezeExcitation
from visattn.attention.channel import core
from visattn.attention.channel.frequency_channel import ALONG_HEIGHT, ALONG_WIDTH, shares

CASES = [
    Case(
        FrequencyChannelAttention,
        {},
        lambda c: c * c // 8,
        (512, 8192),
        macs=lambda c, h, w: c * h * w + c * c // 8,
    ),
    Case(
        FrequencyChannelAttention,
        {"grid": (7, 14), "frequencies": 4},
        lambda c: c * c // 8,
        (512, 8192),
        macs=lambda c, h, w: c * h * w + c * c // 8 + 4 * (7 * h + 14 * w),  # the last: to average the waves
    ),
]


def wave(frequency: int, at: int, length: int) -> float:
    value = math.cos(math.pi * frequency * (at + 0.5) / length) / math.sqrt(length)
    return value * math.sqrt(2) if frequency else value


def paper(module: FrequencyChannelAttention, x: Tensor) -> Tensor:
    """Section 3 of the paper, in loops; the frequencies of a larger map as in the released code."""
    y, (channels, height, width) = torch.empty_like(x), x.shape[1:]
    pairs = list(zip(*module.frequencies.tolist(), strict=True))
    first, second = module.squeeze.weight, module.excite.weight
    for b in range(x.shape[0]):
        f = []
        for c in range(channels):
            u, v = pairs[c // (channels // len(pairs))]
            u, v = u * max(1, height // 7), v * max(1, width // 7)
            at = [(i, j) for i in range(height) for j in range(width)]
            f.append(sum(x[b, c, i, j] * wave(u, i, height) * wave(v, j, width) for i, j in at))
        hidden = (first @ torch.stack(f)).clamp(min=0)
        y[b] = x[b] / (1 + torch.exp(-(second @ hidden)))[:, None, None]
    return y


@pytest.mark.parametrize("size", [(7, 7), (7, 14), (16, 9), (3, 5)], ids=str)
@pytest.mark.parametrize("frequencies", [1, 4, None])
def test_equals_the_paper_in_loops(size, frequencies):
    module = FrequencyChannelAttention(16, reduction=2, frequencies=frequencies).double()
    x = torch.randn(1, 16, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 14), (12, 9), (4, 5)], ids=str)
def test_averages_other_maps_into_its_grid(size):
    module = FrequencyChannelAttention(16, reduction=2, grid=(7, 14)).double()
    x = torch.randn(2, 16, *size, dtype=torch.double)
    own = FrequencyChannelAttention(16, reduction=2).double()
    own.load_state_dict(module.state_dict())
    pooled = nn.functional.adaptive_avg_pool2d(x, (7, 14))
    torch.testing.assert_close(module.attend(x), own.attend(pooled), rtol=0, atol=1e-12)
    assert torch.allclose(module.attend(x), own.attend(x)) == (size == (7, 14))


@pytest.mark.parametrize(("cells", "length"), [(7, 7), (7, 14), (14, 7), (5, 8), (1, 6), (6, 1)])
def test_shares_of_a_cell_are_those_of_adaptive_pooling(cells, length):
    x = torch.randn(length)
    torch.testing.assert_close(shares(cells, length, x) @ x, nn.functional.adaptive_avg_pool1d(x[None], cells)[0])


def test_waves_of_all_frequencies_are_orthonormal():
    module = FrequencyChannelAttention(32, frequencies=32)
    pairs = set(zip(ALONG_HEIGHT, ALONG_WIDTH, strict=True))
    assert len(pairs) == 32
    for size in ((7, 7), (14, 7), (56, 28), (64, 61)):
        waves = module._waves(torch.empty(1, 32, *size))[:, 0]
        torch.testing.assert_close(waves @ waves.T, torch.eye(32), rtol=0, atol=1e-5)


def test_the_first_frequency_alone_is_squeeze_and_excitation_of_a_multiple_of_the_mean():
    module, x = FrequencyChannelAttention(64, frequencies=1), torch.randn(2, 64, 7, 14)
    other = SqueezeExcitation(64, bias=False)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        other.squeeze.weight.mul_(math.sqrt(7 * 14))
    torch.testing.assert_close(module(x), other(x))


def test_sees_where_things_are():
    module, x = FrequencyChannelAttention(64), torch.randn(2, 64, 7, 7)
    shuffled = x.flatten(2)[..., torch.randperm(49)].view_as(x)
    assert not torch.allclose(module.attend(shuffled), module.attend(x))
    assert not torch.allclose(module.attend(x.mT), module.attend(x))  # u is along the height


def test_a_wave_of_a_channel_s_own_frequency_is_all_it_sees():
    module = FrequencyChannelAttention(16)
    for c, (u, v) in enumerate(zip(ALONG_HEIGHT[:16], ALONG_WIDTH[:16], strict=True)):
        pattern = torch.tensor([[wave(u, i, 7) * wave(v, j, 7) for j in range(7)] for i in range(7)])
        seen = []
        module.squeeze.register_forward_pre_hook(lambda layer, given, seen=seen: seen.append(given[0]))
        module.attend(pattern.expand(1, 16, 7, 7))
        torch.testing.assert_close(seen[0][0], torch.eye(16)[c], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("channels", "count"), [(64, 16), (256, 16), (24, 8), (20, 4), (7, 1)])
def test_uses_sixteen_frequencies_or_as_many_as_divide_the_channels(channels, count):
    assert FrequencyChannelAttention(channels, reduction=1).frequencies.shape == (2, count)


def test_keeps_its_frequencies_out_of_the_weights_and_exact_in_halves():
    module = FrequencyChannelAttention(64)
    assert set(module.state_dict()) == {"squeeze.weight", "excite.weight"}
    assert module.half().frequencies.dtype == torch.int64


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        FrequencyChannelAttention(64, reduction=reduction)


@pytest.mark.parametrize("frequencies", [0, 3, 33, 64])
def test_refuses_frequencies_that_do_not_divide_the_channels(frequencies):
    with pytest.raises(ValueError, match=f"between 1 and 32 and divide channels=64, got {frequencies}"):
        FrequencyChannelAttention(64, frequencies=frequencies)


def test_refuses_an_empty_grid():
    with pytest.raises(ValueError, match=r"grid must be positive, got \(0, 7\)"):
        FrequencyChannelAttention(64, grid=(0, 7))


# The sums compute their own gradient; plain operations say what it should be.


def gradients(module: FrequencyChannelAttention, x: Tensor) -> list[Tensor]:
    y = module(x)
    return list(torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_gradients_equal_those_of_plain_operations(layout, monkeypatch):
    module, x = FrequencyChannelAttention(64).double(), torch.randn(3, 64, 5, 7, dtype=torch.double)
    layouts = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "expanded": x[:, :, :, :1].expand_as(x),
    }
    x = layouts[layout].requires_grad_()
    ours = gradients(module, x)
    monkeypatch.setattr(core, "plain", lambda x: True)
    for mine, expected in zip(ours, gradients(module, x), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_gradients_can_be_differentiated_again():
    module = FrequencyChannelAttention(4, reduction=2).double()
    x = torch.randn(2, 4, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


def test_works_under_the_transforms_of_torch_func(unchecked):
    module, x = FrequencyChannelAttention(64).double(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(lambda image: module(image[None])[0])(x), module(x))


def test_learns_from_a_map_without_a_gradient_and_from_none():
    module = FrequencyChannelAttention(64)
    gradient = torch.autograd.grad(module(torch.randn(2, 64, 5, 7)).sum(), module.squeeze.weight)[0]
    assert gradient.abs().max() > 0
    assert module(torch.randn(0, 64, 5, 7)).shape == (0, 64, 5, 7)
