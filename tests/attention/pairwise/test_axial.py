import itertools
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import AxialAttention, insert
from visattn.attention.pairwise.axial import Axis

CASES = [
    Case(
        AxialAttention,
        {"size": (5, 7)},
        lambda c: 2 * (2 * c * c + 8 * c + 6 * 8) + 2 * c // 8 * 22,
        (17_856, 267_744),
        macs=lambda c, h, w: h * w * (4 * c * c + (h + w) * 7 * c // 2),
        sums_to_one=[-1, -1],
        norm_over="positions",
    )
]


def lively(**options: object) -> AxialAttention:
    """In eval mode and double precision, with nothing zero and no statistics those of a fresh norm."""
    module = AxialAttention(8, size=(3, 5), heads=2, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module


def normed(norm: nn.Module, channel: int, value: Tensor | float) -> Tensor:
    shift = norm.running_mean[channel]
    scale = norm.weight[channel] / (norm.running_var[channel] + norm.eps) ** 0.5
    return (value - shift) * scale + norm.bias[channel]


def line(axis: Axis, x: Tensor, heads: int = 2) -> Tensor:
    """Equation 4 of the paper for one line (c, l) of positions, in loops, with the norms of its code."""
    length, out = x.shape[1], axis.project.out_channels // 2
    d, e = out // heads // 2, out // heads
    y = x.new_empty(out, length)
    qkv = torch.stack([axis.project.weight[:, :, 0] @ x[:, p] for p in range(length)], 1)
    qkv = torch.stack([normed(axis.norm, c, qkv[c]) for c in range(2 * out)])
    for g, o in itertools.product(range(heads), range(length)):
        q, k, v = qkv[2 * e * g : 2 * e * (g + 1)].split((d, d, e))
        near = [axis.positions[p - o + length - 1].split((d, d, e)) for p in range(length)]
        s = [
            math.exp(
                normed(axis.logit_norm, g, q[:, o] @ k[:, p])
                + normed(axis.logit_norm, heads + g, q[:, o] @ near[p][0])
                + normed(axis.logit_norm, 2 * heads + g, k[:, p] @ near[p][1])
            )
            for p in range(length)
        ]
        for c in range(e):
            content = sum(s[p] / sum(s) * v[c, p] for p in range(length))
            position = sum(s[p] / sum(s) * near[p][2][c] for p in range(length))
            first = 2 * (g * e + c)
            y[g * e + c, o] = normed(axis.out_norm, first, content) + normed(axis.out_norm, first + 1, position)
    return y


@pytest.mark.parametrize("out_channels", [None, 12])
@torch.no_grad()
def test_equals_the_paper_in_loops(out_channels):
    module, x = lively(out_channels=out_channels), torch.randn(2, 8, 3, 5).double()
    for b in range(2):
        columns = torch.stack([line(module.height, x[b, :, :, j]) for j in range(5)], 2)
        y = torch.stack([line(module.width, columns[:, i]) for i in range(3)], 1)
        torch.testing.assert_close(module(x)[b], y, rtol=0, atol=1e-11)


def test_one_axis_has_the_parameters_of_the_released_code():
    assert sum(p.numel() for p in Axis(64, 64, 14, 8).parameters()) == 9_184
    assert sum(p.numel() for p in AxialAttention(64, size=(14, 14)).parameters()) == 2 * 9_184


def test_every_column_and_then_every_row_stands_alone():
    module, x = lively(), torch.randn(1, 8, 3, 5).double()
    moved = x.clone()
    moved[..., 1, 2] += 1
    height, width = (
        (after - before).abs().amax((0, 1)).unflatten(0, (3, 5)) > 1e-9
        for after, before in zip(module.attend(moved), module.attend(x), strict=True)
    )
    assert height[:, 2].any()
    height[:, 2] = False
    assert not height.any()
    assert width.any((1, 2)).all()  # of the column in all rows, and so all rows


def test_weights_are_zero_off_the_axis_and_reach_all_of_it():
    height, width = (
        w.unflatten(2, (3, 5)).unflatten(4, (3, 5)) for w in lively().attend(torch.randn(2, 8, 3, 5).double())
    )
    for (i, j), (m, n) in itertools.product(itertools.product(range(3), range(5)), repeat=2):
        assert (height[:, :, i, j, m, n] > 0).all() == (j == n)
        assert (width[:, :, i, j, m, n] > 0).all() == (i == m)


def test_two_steps_reach_every_position_from_every_other():
    height, width = lively().attend(torch.randn(1, 8, 3, 5).double())
    assert (width @ height > 0).all()


def test_turning_the_map_swaps_the_axes_but_not_their_order():
    module, x = lively(), torch.randn(2, 8, 3, 5).double()
    turned = AxialAttention(8, size=(5, 3), heads=2).double().eval()
    turned.height, turned.width = module.width, module.height
    assert not torch.allclose(turned(x.mT).mT, module(x), atol=1e-3)
    once = AxialAttention(8, size=(3, 5), heads=2).double().eval()
    once.height, once.width = module.height, module.width
    assert torch.equal(once(x), module(x))


def test_normalises_three_parts_of_the_logits_and_two_of_the_result_in_training():
    module, x = lively().train(), torch.randn(4, 8, 3, 5).double()
    seen = []
    for norm in (module.width.logit_norm, module.width.out_norm):
        norm.register_forward_hook(lambda norm, args, output: seen.append((norm, *args, output)))
    module(x)
    for norm, *maps in seen:
        before, after = (each.movedim(1, 0).flatten(1) for each in maps)
        variance = before.var(1, correction=0)
        torch.testing.assert_close(after.mean(1), norm.bias, rtol=0, atol=1e-9)
        torch.testing.assert_close(after.var(1, correction=0), norm.weight**2 * variance / (variance + norm.eps))
    assert [maps[0].shape[1] for _, *maps in seen] == [3 * 2, 2 * 8]


def test_stride_takes_means_at_the_end():
    module, plain, x = lively(stride=2), lively(), torch.randn(2, 8, 3, 5).double()
    plain.load_state_dict(module.state_dict())
    pooled = nn.functional.avg_pool2d(plain(x), 2, ceil_mode=True)
    assert pooled.shape == (2, 8, 2, 3)
    assert torch.equal(module(x), pooled)


def test_takes_the_place_of_every_convolution_of_the_blocks():
    model = insert(timm.create_model("resnet50"), AxialAttention, input_size=64).eval()
    assert len(model.visattn) == 16
    assert [model.layer2[0].conv2.size, model.layer2[1].conv2.size] == [(16, 16), (8, 8)]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"size must be the \(height, width\) of the feature map, got None"):
        AxialAttention(64)
    with pytest.raises(ValueError, match="heads must divide half of out_channels=24, got 8"):
        AxialAttention(64, size=(5, 7), out_channels=24)
    with pytest.raises(ValueError, match="heads must divide half of out_channels=64, got 0"):
        AxialAttention(64, size=(5, 7), heads=0)
    with pytest.raises(ValueError, match="stride must be positive, got 0"):
        AxialAttention(64, size=(5, 7), stride=0)
    with pytest.raises(ValueError, match=r"size must be \(3, 5\) as constructed, got \(5, 3\)"):
        lively()(torch.randn(1, 8, 5, 3).double())
