import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import DeformableConvolution

CASES = [  # the papers count the 9c² of the convolution itself as well, which torch does not
    Case(
        DeformableConvolution,
        options,
        lambda c, moved=moved: 9 * c * c + moved * (9 * c + 1),
        golden,
        lambda c, h, w, moved=moved: h * w * 9 * c * moved,
        small=4,
    )
    for options, moved, golden in (({}, 18, (47_250, 631_314)), ({"modulated": True}, 27, (52_443, 652_059)))
]


def lively(channels: int = 8, **options) -> DeformableConvolution:
    module = DeformableConvolution(channels, **options).double()
    nn.init.normal_(module.move.weight, std=0.3)
    nn.init.normal_(module.move.bias)
    return module


def paper(module: DeformableConvolution, x: Tensor, stride: int = 1, dilation: int = 1, groups: int = 1) -> Tensor:
    """Equations 2 to 4 of the first paper and 1 of the second, in loops."""

    def sampled(image: Tensor, p: float, q: float) -> Tensor:
        near = ((u, v) for u in range(image.shape[0]) for v in range(image.shape[1]))
        return sum(max(0, 1 - abs(p - u)) * max(0, 1 - abs(q - v)) * image[u, v] for u, v in near)

    weight, apart = module.conv.weight, module.offset_groups
    k = weight.shape[2]
    margin = dilation * (k // 2)
    moved = F.conv2d(x, module.move.weight, module.move.bias, stride, margin, dilation)
    y = x.new_zeros(len(x), len(weight), *moved.shape[2:])
    for b in range(len(x)):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                patch = x.new_zeros(x.shape[1], k, k)
                for c in range(x.shape[1]):
                    for u in range(k):
                        for v in range(k):
                            tap = (c // (x.shape[1] // apart) * k + u) * k + v
                            down, right = moved[b, 2 * tap : 2 * tap + 2, i, j].tolist()
                            at = i * stride + u * dilation - margin + down, j * stride + v * dilation - margin + right
                            patch[c, u, v] = sampled(x[b, c], *at)
                            if module.modulated:
                                patch[c, u, v] /= 1 + math.exp(-moved[b, 2 * apart * k * k + tap, i, j])
                for d in range(len(weight)):
                    group = d // (len(weight) // groups)
                    wide = weight.shape[1]
                    y[b, d, i, j] = (weight[d] * patch[group * wide : (group + 1) * wide]).sum()
    return y


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "groups": 2, "out_channels": 6}, {"offset_groups": 2, "dilation": 2}, {"kernel_size": 1}],
    ids=str,
)
def test_equals_the_paper_in_loops(options, modulated):
    module, x = lively(4, modulated=modulated, **options), torch.randn(2, 4, 3, 4, dtype=torch.double)
    expected = {name: options[name] for name in ("stride", "dilation", "groups") if name in options}
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, **expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "out_channels": 32}, {"groups": 64}, {"dilation": 2, "kernel_size": 5}, {"offset_groups": 4}],
    ids=str,
)
def test_a_fresh_one_is_the_plain_convolution_and_half_of_it_with_masks(options):
    x = torch.randn(2, 64, 5, 7, dtype=torch.double)
    plain, masked = (DeformableConvolution(64, modulated=modulated, **options).double() for modulated in (False, True))
    torch.testing.assert_close(plain(x), plain.conv(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(masked(x), masked.conv(x) / 2, rtol=0, atol=1e-12)


def test_whole_offsets_shift_the_map():
    module, x = DeformableConvolution(8).double(), torch.randn(2, 8, 6, 7, dtype=torch.double)
    with torch.no_grad():
        module.move.bias.view(9, 2)[:] = torch.tensor([1, -2])
    shifted = torch.zeros_like(x)
    shifted[:, :, :5, 2:] = x[:, :, 1:, :-2]
    inside = (..., slice(1, 4), slice(3, 5))  # where no tap leaves either map
    torch.testing.assert_close(module(x)[inside], module.conv(shifted)[inside], rtol=0, atol=1e-12)
    assert not torch.allclose(module(x), module.conv(x))


def test_a_mask_of_zero_silences_its_tap():
    module, x = DeformableConvolution(8, modulated=True).double(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    with torch.no_grad():
        module.move.bias[18:].view(3, 3)[0] = -1e9
        module.move.bias[18:].view(3, 3)[1:] = 1e9
    kernel = module.conv.weight.clone()
    kernel[:, :, 0] = 0
    torch.testing.assert_close(module(x), F.conv2d(x, kernel, padding=1), rtol=0, atol=1e-12)


def test_says_where_it_looks_in_rows_and_columns():
    module, x = DeformableConvolution(8).double(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    with torch.no_grad():
        module.move.bias.view(3, 3, 2)[0, 2] = torch.tensor([3, 4])  # the upper right tap, down and to the right
    offset, mask = module.attend(x)
    assert offset.shape == (2, 1, 3, 3, 2, 5, 7)
    assert (offset[:, 0, 0, 2, 0] == 3).all()
    assert (offset[:, 0, 0, 2, 1] == 4).all()
    assert offset.count_nonzero() == 2 * 2 * 35
    assert torch.equal(mask, torch.ones(2, 1, 3, 3, 5, 7, dtype=torch.double))


def test_moves_with_the_map_but_a_transposed_map_is_another():
    module, x = lively(), torch.zeros(2, 8, 16, 16, dtype=torch.double)
    nn.init.normal_(module.move.weight, std=0.05)
    nn.init.zeros_(module.move.bias)
    x[:, :, 7:9, 7:9] = torch.randn(2, 8, 2, 2)
    assert module.attend(x).offset.abs().max() < 4  # no tap near the border
    torch.testing.assert_close(module(x.roll((1, 2), (2, 3))), module(x).roll((1, 2), (2, 3)), rtol=0, atol=1e-11)
    assert not torch.allclose(module(x.mT), module(x).mT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_are_not_rounded_to_a_low_precision(dtype):
    module, x = DeformableConvolution(8, kernel_size=1).to(dtype), torch.zeros(1, 8, 1, 1000, dtype=dtype)
    with torch.no_grad():
        module.move.bias[1] = 0.25
        module.conv.weight.fill_(0.125)
    x[..., 901] = 1
    assert module(x)[0, 0, 0, 900] == 0.25  # in half precision there is no 900.25
    assert module(x)[0, 0, 0, 901] == 0.75


def test_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="groups must divide channels=64 and out_channels=48, got 64"):
        DeformableConvolution(64, out_channels=48, groups=64)
    with pytest.raises(ValueError, match="offset_groups must divide channels=64, got 3"):
        DeformableConvolution(64, offset_groups=3)


def test_refuses_a_kernel_without_a_middle():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got 2"):
        DeformableConvolution(64, kernel_size=2)


def test_refuses_a_dilation_of_zero():
    with pytest.raises(ValueError, match="dilation must be positive, got 0"):
        DeformableConvolution(64, dilation=0)


def test_adopts_a_convolution_and_gives_what_it_gives():
    convolution = nn.Conv2d(8, 12, 3, 2, 2, dilation=2, groups=4, bias=False)
    module = DeformableConvolution(8, out_channels=12, stride=2, groups=4, dilation=2)
    x = torch.randn(2, 8, 5, 7)
    assert not torch.allclose(module(x), convolution(x))
    assert module.adopt(convolution)
    torch.testing.assert_close(module(x), convolution(x))
    assert not module.adopt(nn.Conv2d(8, 12, 3, groups=4))
    assert not module.adopt(nn.Conv2d(8, 12, 5, groups=4, bias=False))
