import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import DynamicConvolution


def parameters(channels: int, groups: int = 1) -> int:
    width = channels // 4 + 1
    return 4 * (9 * channels**2 // groups + channels) + channels * width + width * 4 + 4


def macs(channels: int, height: int, width: int, groups: int = 1) -> int:
    """The convolution, the mixing of kernels and biases, and the two layers."""
    inner = channels // 4 + 1
    kernel = 9 * channels**2 // groups
    return height * width * kernel + 4 * (kernel + channels) + (channels + 4) * inner


CASES = [
    Case(DynamicConvolution, {}, parameters, (148_872, 2_377_224), macs, sums_to_one=1, small=4),
    Case(
        DynamicConvolution,
        {"groups": 16, "temperature": 1.0},
        lambda c: parameters(c, 16),
        (10_632, 165_384),
        lambda c, h, w: macs(c, h, w, 16),
        sums_to_one=1,
    ),
]


def lively(channels: int = 8, **options) -> DynamicConvolution:
    module = DynamicConvolution(channels, **{"temperature": 2.0, **options}).double()
    nn.init.normal_(module.choose.weight, std=3)
    return module


def paper(module: DynamicConvolution, x: Tensor, stride: int, groups: int) -> Tensor:
    """Section 3 of the paper, in loops."""
    outputs = []
    for image in x:
        z = torch.stack([channel.sum() / channel.numel() for channel in image])
        hidden = [max(row @ z, 0) for row in module.squeeze.weight]
        logits = [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in module.choose.weight]
        e = [math.exp((s + b) / module.temperature) for s, b in zip(logits, module.choose.bias, strict=True)]
        pi = [each / sum(e) for each in e]
        weight = sum(p * kernel for p, kernel in zip(pi, module.kernels.weight, strict=True))
        bias = sum(p * each for p, each in zip(pi, module.kernels.bias, strict=True))
        outputs.append(F.conv2d(image[None], weight, bias, stride, weight.shape[-1] // 2, 1, groups)[0])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("options", "stride", "groups"),
    [
        ({}, 1, 1),
        ({"stride": 2, "out_channels": 12, "groups": 2}, 2, 2),
        ({"groups": 8, "kernel_size": 5}, 1, 8),
        ({"kernels": 1, "kernel_size": 1}, 1, 1),
    ],
)
def test_equals_the_paper_in_loops(options, stride, groups):
    module, x = lively(**options), torch.randn(3, 8, 5, 7, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, stride, groups), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("stride", "size"), [(1, (3, 4)), (2, (5, 7)), (1, (1, 1))])
def test_equals_the_paper_where_the_kernels_outweigh_the_map(stride, size):
    module, x = lively(32, stride=stride, out_channels=8), torch.randn(3, 32, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, stride, 1), rtol=0, atol=1e-10)
        assert not torch.allclose(module(x), module(x).flip(0))


def test_weights_of_one_kernel_alone_are_its_convolution():
    module, x = lively(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    for k in range(4):
        weights = F.one_hot(torch.tensor([k, k]), 4).double()[..., None, None, None]
        alone = F.conv2d(x, module.kernels.weight[k], module.kernels.bias[k], padding=1)
        torch.testing.assert_close(module.read(x, weights=weights), alone, rtol=0, atol=1e-12)


def test_mixing_kernels_is_mixing_their_maps():
    module, x = lively(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    weights = module.attend(x)
    maps = [F.conv2d(x, w, b, padding=1) for w, b in zip(module.kernels.weight, module.kernels.bias, strict=True)]
    mixed = sum(weights[:, k] * each for k, each in enumerate(maps))
    torch.testing.assert_close(module(x), mixed, rtol=0, atol=1e-12)


def test_a_high_temperature_is_the_mean_kernel():
    module, x = lively(temperature=1e9), torch.randn(2, 8, 5, 7, dtype=torch.double)
    mean = F.conv2d(x, module.kernels.weight.mean(0), module.kernels.bias.mean(0), padding=1)
    torch.testing.assert_close(module(x), mean, rtol=0, atol=1e-6)


def test_annealing_sharpens_the_choice_in_a_straight_line_and_is_saved():
    module, x = lively(temperature=30.0), torch.randn(2, 8, 5, 7, dtype=torch.double)
    assert module.temperature == 30
    highest = []
    for epoch, expected in ((0, 30), (1, 27.1), (5, 15.5), (10, 1), (40, 1)):
        module.anneal(epoch / 10)
        assert module.temperature.item() == pytest.approx(expected)
        highest.append(module.attend(x).amax(1).mean().item())
    assert highest[0] < highest[1] < highest[2] < highest[3] == highest[4]
    logits = module.choose(module.squeeze(x.mean((2, 3))).relu())
    torch.testing.assert_close(module.attend(x)[:, :, 0, 0, 0], logits.softmax(1))
    twin = lively(temperature=30.0)
    assert not torch.allclose(twin.attend(x), module.attend(x))
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


def test_a_compiled_module_follows_the_annealing(unchecked):
    module, x = lively(temperature=30.0), torch.randn(2, 8, 5, 7, dtype=torch.double)
    compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True)
    before = compiled(x)
    compiled.anneal(1)
    module.anneal(1)
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), module(x))


def test_the_choice_is_blind_to_places_and_the_output_is_not():
    module, x = lively(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    order = torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    assert not torch.allclose(module(shuffled), module(x).flatten(2)[..., order].view_as(x))
    inside = torch.zeros(2, 8, 9, 9, dtype=torch.double)
    inside[:, :, 3:6, 3:6] = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(module(inside.roll((1, 2), (2, 3))), module(inside).roll((1, 2), (2, 3)))


@pytest.mark.parametrize("option", ["kernels", "reduction"])
def test_refuses_an_option_that_is_not_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        DynamicConvolution(64, **{option: 0})


@pytest.mark.parametrize("kernel_size", [-1, 0, 4])
def test_refuses_a_kernel_without_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
        DynamicConvolution(64, kernel_size=kernel_size)


def test_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="groups must divide channels=64 and out_channels=48, got 64"):
        DynamicConvolution(64, out_channels=48, groups=64)


def test_refuses_a_temperature_below_one():
    with pytest.raises(ValueError, match=r"temperature must be at least 1, got 0\.5"):
        DynamicConvolution(64, temperature=0.5)


def test_refuses_to_anneal_backwards():
    with pytest.raises(ValueError, match=r"progress must not be negative, got -0\.1"):
        DynamicConvolution(64).anneal(-0.1)


@pytest.mark.parametrize(("bias", "groups"), [(True, 1), (False, 4)])
def test_adopts_a_convolution_and_gives_what_it_gives(bias, groups):
    convolution = nn.Conv2d(8, 12, 3, 2, 1, groups=groups, bias=bias).double()
    module = lively(out_channels=12, stride=2, groups=groups)
    x = torch.randn(2, 8, 5, 7, dtype=torch.double)
    assert not torch.allclose(module(x), convolution(x))
    assert module.adopt(convolution)
    torch.testing.assert_close(module(x), convolution(x))
    assert not module.adopt(nn.Conv2d(8, 12, 5))
