import itertools
import math

import pytest
import timm
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from visattn import BottleneckSelfAttention, insert, remove

CASES = [
    Case(
        BottleneckSelfAttention,
        {"size": (5, 7)} | options,
        lambda c: 3 * c * c + 22 * c // 4,
        (12_640, 198_016),
        # a vector of a distance meets the queries at which it occurs: (h + w) in place of the paper's (2h + 2w - 2)
        macs=lambda c, h, w: h * w * (3 * c * c + 2 * h * w * c + (h + w) * c),
        sums_to_one=-1,
        small=8,
    )
    for options in ({}, {"scale_positions": False})
]


def lively(**options: object) -> BottleneckSelfAttention:
    module = BottleneckSelfAttention(8, size=(3, 5), heads=2, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: BottleneckSelfAttention, x: Tensor, scale_positions: bool) -> Tensor:
    """Figure 4 of the paper, in loops."""
    out = module.value.out_channels
    y, (h, w), d = x.new_empty(x.shape[0], out, *x.shape[2:]), x.shape[2:], out // 2
    q, k, v = (layer.weight[:, :, 0, 0] for layer in (module.query, module.key, module.value))
    rows, columns = module.affinity.rows, module.affinity.columns
    at = list(itertools.product(range(h), range(w)))
    for b, a, (i, j) in itertools.product(range(x.shape[0]), range(2), at):
        head = slice(a * d, a * d + d)
        query, s = q[head] @ x[b, :, i, j], {}
        for m, n in at:
            content = query @ (k[head] @ x[b, :, m, n]) / math.sqrt(d)
            position = query @ (rows[m - i + h - 1] + columns[n - j + w - 1])
            s[m, n] = math.exp(content + (position / math.sqrt(d) if scale_positions else position))
        y[b, head, i, j] = sum(s[m, n] / sum(s.values()) * (v[head] @ x[b, :, m, n]) for m, n in at)
    return y


@pytest.mark.parametrize("scale_positions", [False, True])
@pytest.mark.parametrize("out_channels", [None, 12])
@torch.no_grad()
def test_equals_the_paper_in_loops(scale_positions, out_channels):
    module = lively(scale_positions=scale_positions, out_channels=out_channels)
    x = torch.randn(2, 8, 3, 5).double()
    torch.testing.assert_close(module(x), paper(module, x, scale_positions), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("scale_positions", [False, True])
def test_equals_timm_after_copying_weights(stride, scale_positions):
    options = {"stride": stride, "out_channels": 32, "scale_positions": scale_positions}
    ours = BottleneckSelfAttention(64, size=(6, 8), **options)
    theirs = BottleneckAttn(64, 32, feat_size=(6, 8), stride=stride, scale_pos_embed=scale_positions)
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)]))
        theirs.pos_embed.height_rel.copy_(ours.affinity.rows)
        theirs.pos_embed.width_rel.copy_(ours.affinity.columns)
    x = torch.randn(2, 64, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "count"), [(64, 13_152), (256, 200_064)])
def test_has_the_parameters_of_timm_at_14(channels, count):
    assert sum(p.numel() for p in BottleneckSelfAttention(channels, size=(14, 14)).parameters()) == count


def test_costs_what_the_paper_says_less_the_distances_that_do_not_occur():
    module = BottleneckSelfAttention(256, size=(14, 14))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.randn(1, 256, 14, 14))
    assert counter.get_total_flops() // 2 == 60_913_664 - 196 * (28 - 2) * 256


def test_without_distances_it_is_plain_attention_that_does_not_see_where_things_are():
    module, x, order = lively(), torch.randn(2, 8, 3, 5).double(), torch.randperm(15)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    assert not torch.allclose(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-3)
    for table in (module.affinity.rows, module.affinity.columns):
        nn.init.zeros_(table)
    torch.testing.assert_close(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-12)
    heads = [layer(x).flatten(2).unflatten(1, (2, 4)).mT for layer in (module.query, module.key, module.value)]
    plain = F.scaled_dot_product_attention(*heads).mT.reshape(x.shape)
    torch.testing.assert_close(module(x), plain, rtol=0, atol=1e-12)


def test_turns_with_the_map_where_the_tables_are_swapped():
    module, x = lively(), torch.randn(2, 8, 3, 5).double()
    turned = BottleneckSelfAttention(8, size=(5, 3), heads=2).double()
    names = {"affinity.rows": "affinity.columns", "affinity.columns": "affinity.rows"}
    turned.load_state_dict({names.get(name, name): value for name, value in module.state_dict().items()})
    torch.testing.assert_close(turned(x.mT), module(x).mT, rtol=0, atol=1e-12)


def test_stride_takes_means_that_end_at_the_border_as_a_convolution_does():
    module = lively(stride=2)
    plain, x = lively(), torch.randn(2, 8, 3, 5).double()
    plain.load_state_dict(module.state_dict())
    y, full = module(x), plain(x)
    assert y.shape == nn.Conv2d(8, 8, 3, 2, 1).double()(x).shape == (2, 8, 2, 3)
    torch.testing.assert_close(y[..., 0, 1], full[..., :2, 2:4].mean((2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(y[..., 1, 2], full[..., 2, 4], rtol=0, atol=1e-12)


def test_takes_the_place_of_the_last_convolutions_of_a_resnet():
    model = timm.create_model("resnet50").eval()
    keys = set(model.state_dict())
    insert(model, BottleneckSelfAttention, input_size=64)
    blocks = [block.conv2 for block in model.layer4]
    assert [type(layer).__name__ for layer in blocks] == ["BottleneckSelfAttention"] * 3
    assert [(layer.size, layer.stride) for layer in blocks] == [((4, 4), 2), ((2, 2), 1), ((2, 2), 1)]
    assert isinstance(model.layer3[-1].conv2, nn.Conv2d)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert set(remove(model).state_dict()) == keys


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"size must be the \(height, width\) of the feature map, got None"):
        BottleneckSelfAttention(64)
    with pytest.raises(ValueError, match="heads must divide out_channels=64, got 7"):
        BottleneckSelfAttention(64, size=(5, 7), heads=7)
    with pytest.raises(ValueError, match="heads must divide out_channels=6, got 4"):
        BottleneckSelfAttention(64, size=(5, 7), out_channels=6)
    with pytest.raises(ValueError, match="stride must be positive, got 0"):
        BottleneckSelfAttention(64, size=(5, 7), stride=0)
    with pytest.raises(ValueError, match=r"size must be \(3, 5\) as constructed, got \(5, 3\)"):
        lively()(torch.randn(1, 8, 5, 3).double())
