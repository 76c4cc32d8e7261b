import itertools
import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import AttentionAugmentedConvolution, insert


def keys(c: int) -> int:
    return 2 * max(c // 5 // 2, 20)


def values(c: int) -> int:
    return 2 * (c // 10 // 2)


def macs(c: int, h: int, w: int) -> int:
    """As in the paper, but for (h + w) in place of (2h + 2w - 2): a distance meets the queries at which it occurs."""
    project = c * (2 * keys(c) + values(c)) + values(c) ** 2
    return h * w * (9 * c * (c - values(c)) + project + h * w * (keys(c) + values(c)) + (h + w) * keys(c))


CASES = [
    Case(
        AttentionAugmentedConvolution,
        {"size": (5, 7), "heads": 2},
        lambda c: 9 * c * (c - values(c)) + c * (2 * keys(c) + values(c)) + values(c) ** 2 + 11 * keys(c),
        (39_388, 567_398),
        macs=macs,
        sums_to_one=-1,
        small=8,
    )
]


def lively(**options: object) -> AttentionAugmentedConvolution:
    options = {"heads": 2, "value_ratio": 0.5} | options
    module = AttentionAugmentedConvolution(8, size=(3, 5), **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def paper(module: AttentionAugmentedConvolution, x: Tensor) -> Tensor:
    """Sections 3.1 to 3.3 of the paper, in loops."""
    (h, w), d, e = x.shape[2:], module.key.out_channels // 2, module.value.out_channels // 2
    q, k, v, o = (layer.weight[:, :, 0, 0] for layer in (module.query, module.key, module.value, module.out))
    rows, columns, reach = module.affinity.rows, module.affinity.columns, module.convolution.padding[0]
    at = list(itertools.product(range(h), range(w)))
    y = x.new_zeros(x.shape[0], module.convolution.out_channels + 2 * e, h, w)
    for b, (i, j) in itertools.product(range(x.shape[0]), at):
        for m, n in itertools.product(range(-reach, reach + 1), repeat=2):
            if 0 <= i + m < h and 0 <= j + n < w:
                y[b, : -2 * e, i, j] += module.convolution.weight[:, :, m + reach, n + reach] @ x[b, :, i + m, j + n]
        heads = []
        for a in range(2):
            keys, width = slice(a * d, a * d + d), slice(a * e, a * e + e)
            query, s = q[keys] @ x[b, :, i, j] / math.sqrt(d), {}
            for m, n in at:
                relative = rows[m - i + h - 1] + columns[n - j + w - 1]
                s[m, n] = math.exp(query @ (k[keys] @ x[b, :, m, n]) + query @ relative)
            heads.append(sum(s[m, n] / sum(s.values()) * (v[width] @ x[b, :, m, n]) for m, n in at))
        y[b, -2 * e :, i, j] = o @ torch.cat(heads)
    return y


@pytest.mark.parametrize(("out_channels", "kernel_size"), [(None, 3), (12, 1), (None, 5)])
@torch.no_grad()
def test_equals_the_paper_in_loops(out_channels, kernel_size):
    module, x = lively(out_channels=out_channels, kernel_size=kernel_size), torch.randn(2, 8, 3, 5).double()
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_values_that_are_everywhere_the_same_are_read_everywhere_the_same():
    module, x = lively(), torch.randn(2, 8, 3, 5).double()
    x[:, 0] = 1
    with torch.no_grad():
        module.value.weight[:, 1:] = 0
    read = module(x)[:, 4:]
    torch.testing.assert_close(read, read[..., :1, :1].expand_as(read), rtol=0, atol=1e-12)
    heads = module.value(x).flatten(2).mT  # which a reshape without a transpose mixes
    assert heads.reshape(2, 4, 3, 5).std((2, 3)).max() > 0.1


def test_attention_moves_with_nothing_but_the_convolution_with_the_map():
    module, x = lively(), torch.zeros(1, 8, 3, 5).double()
    x[..., 1, 1] = torch.randn(8)
    moved = x.roll(1, 3)
    torch.testing.assert_close(module(moved)[:, :4, :, 1:], module(x)[:, :4, :, :-1], rtol=0, atol=1e-12)
    assert not torch.allclose(module(moved)[:, 4:, :, 1:], module(x)[:, 4:, :, :-1], rtol=0, atol=1e-6)


def test_splits_the_channels_as_it_is_told():
    module = AttentionAugmentedConvolution(512, size=(7, 7), out_channels=1024, key_ratio=0.25, value_ratio=0.25)
    assert (module.query.out_channels, module.value.out_channels, module.convolution.out_channels) == (256, 256, 768)
    module = AttentionAugmentedConvolution(64, size=(7, 7))
    assert (module.query.out_channels, module.value.out_channels) == (8 * 20, 8)


def test_stride_is_that_of_the_convolution_and_a_mean_of_what_was_read():
    module, plain, x = lively(stride=2), lively(), torch.randn(2, 8, 3, 5).double()
    plain.load_state_dict(module.state_dict())
    y, full = module(x), plain(x)
    assert y.shape == (2, 8, 2, 3)
    torch.testing.assert_close(y[:, :4], full[:, :4, ::2, ::2], rtol=0, atol=1e-12)
    torch.testing.assert_close(y[:, 4:], F.avg_pool2d(full[:, 4:], 2, ceil_mode=True), rtol=0, atol=1e-12)


def test_takes_the_place_of_the_convolutions_of_the_later_stages():
    model = insert(timm.create_model("resnet50"), AttentionAugmentedConvolution, input_size=64).eval()
    assert len(model.visattn) == 13
    assert isinstance(model.layer1[0].conv2, nn.Conv2d)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"size must be the \(height, width\) of the feature map, got None"):
        AttentionAugmentedConvolution(64)
    for name in ("heads", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            AttentionAugmentedConvolution(64, size=(5, 7), **{name: 0})
    for kernel_size in (0, 4):
        with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
            AttentionAugmentedConvolution(64, size=(5, 7), kernel_size=kernel_size)
    for channels, ratio in ((64, 1.0), (64, 0.0), (8, 0.1)):
        with pytest.raises(ValueError, match=f"value_ratio must leave some of out_channels={channels} .*got {ratio}"):
            AttentionAugmentedConvolution(channels, size=(5, 7), value_ratio=ratio)
    with pytest.raises(ValueError, match=r"size must be \(3, 5\) as constructed, got \(5, 3\)"):
        lively()(torch.randn(1, 8, 5, 3).double())
