import math

import pytest
import torch
from timm.models.volo import OutlookAttention as Theirs
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.pairwise.loops import lively
from visattn import OutlookAttention


def macs(c: int, h: int, w: int, window: int, stride: int, heads: int) -> int:
    """Two projections; in each window the layer that weighs, and what it reads."""
    windows = -(-h // stride) * -(-w // stride)
    return 2 * h * w * c * c + windows * (c * window**4 * heads + window**4 * c)


CASES = [
    Case(
        OutlookAttention,
        options,
        lambda c, window=window: c * c + (c + 1) * window**4 * (c // 32) + c * c + c,
        golden,
        lambda c, h, w, window=window, stride=stride: macs(c, h, w, window, stride, c // 32),
        small=32,
    )
    for options, window, stride, golden in (
        ({}, 3, 2, (18_786, 297_864)),
        ({"stride": 1}, 3, 1, (18_786, 297_864)),
    )
]


def paper(module: OutlookAttention, x: Tensor, window: int, stride: int) -> Tensor:
    """Algorithm 1 of the paper, in loops."""
    (b, c, h, w), heads, area, radius = x.shape, module.heads, window**2, window // 2
    width, project, mix = c // heads, module.value.weight[:, :, 0], module.out.weight[:, :, 0]
    read = torch.zeros_like(x)
    for sample in range(b):
        for i in range(0, h, stride):
            for j in range(0, w, stride):
                centre = x[sample, :, i : i + stride, j : j + stride].mean((1, 2))
                a = (module.outlook.weight @ centre + module.outlook.bias).view(heads, area, area) / math.sqrt(width)
                places = [(i + p, j + q) for p in range(-radius, radius + 1) for q in range(-radius, radius + 1)]
                inside = [0 <= p < h and 0 <= q < w for p, q in places]
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    for to, (p, q) in enumerate(places):
                        e = [math.exp(v) for v in a[head, to].tolist()]
                        for weight, (r, s), there in zip(e, places, inside, strict=True):
                            if inside[to] and there:
                                read[sample, part, p, q] += weight / sum(e) * (project[part] @ x[sample, :, r, s])
    return torch.einsum("oc,bchw->bohw", mix, read) + module.out.bias[:, None, None]


@pytest.mark.parametrize(("window", "stride", "size"), [(3, 2, (4, 5)), (3, 1, (3, 2)), (5, 3, (4, 5)), (3, 3, (1, 7))])
def test_equals_the_paper_in_loops(window, stride, size):
    module = lively(OutlookAttention(4, window=window, stride=stride, heads=2))
    x = torch.randn(1, 4, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, window, stride), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (3, 3), (5, 2)])
@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
def test_equals_timm(window, stride, size):
    theirs = Theirs(64, 2, window, window // 2, stride).double()
    ours = OutlookAttention(64, window=window, stride=stride).double()
    with torch.no_grad():
        ours.value.weight.copy_(theirs.v.weight[..., None])
        ours.out.weight.copy_(theirs.proj.weight[..., None])
        ours.out.bias.copy_(theirs.proj.bias)
    ours.outlook.load_state_dict(theirs.attn.state_dict())
    x = torch.randn(2, 64, *size, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x.movedim(1, -1)).movedim(-1, 1), rtol=0, atol=1e-12)


def test_has_the_parameters_of_the_released_module():
    assert sum(p.numel() for p in OutlookAttention(16, heads=2).parameters()) == 3282


def test_folding_does_not_divide_by_the_number_of_windows():
    module, ones = OutlookAttention(16, stride=1, heads=2).double(), torch.ones(1, 16, 5, 7, dtype=torch.double)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for layer in (module.value, module.out):
            layer.weight[:, :, 0].copy_(torch.eye(16))
    y = module(ones)[0]
    for (i, j), gain in (((2, 3), 9), ((0, 3), 5), ((0, 0), 25 / 9)):
        torch.testing.assert_close(y[:, i, j], torch.full((16,), gain, dtype=torch.double), rtol=0, atol=1e-12)
    total = module.attend(ones).sum(-1).view(2, 5, 7)
    torch.testing.assert_close(total, y[:2], rtol=0, atol=1e-12)


def test_the_weights_come_from_the_centre_alone():
    module, x = lively(OutlookAttention(16, stride=1, heads=2)), torch.randn(1, 16, 7, 9, dtype=torch.double)
    weights, centre = module.attend(x), 3 * 9 + 4
    x[:, :, 3, 4] += 1
    changed = (module.attend(x) != weights)[0].any(0)
    rows, columns = (side.view(7, 9) for side in (changed.any(1), changed.any(0)))
    inside = torch.zeros(7, 9, dtype=torch.bool)
    inside[2:5, 3:6] = True  # the pairs of that one window
    assert torch.equal(rows, inside)
    assert torch.equal(columns, inside)
    assert changed[centre].sum() == 9


def test_moves_with_the_map_by_its_stride_and_does_not_turn_with_it():
    module, x = lively(OutlookAttention(16, heads=2)), torch.randn(1, 16, 12, 14, dtype=torch.double)
    for step, same in ((2, True), (1, False)):
        moved = module(x.roll((step, step), (2, 3)))[:, :, 4:-4, 4:-4]
        still = module(x)[:, :, 4 - step : -4 - step, 4 - step : -4 - step]
        assert torch.allclose(moved, still, rtol=0, atol=1e-12) == same
    assert not torch.allclose(module(x.mT), module(x).mT)


def test_is_as_long_in_reach_as_two_windows():
    module, x = lively(OutlookAttention(16, stride=1, heads=2)), torch.randn(1, 16, 7, 9, dtype=torch.double)
    reach = (module.attend(x)[0, 0, 3 * 9 + 4] > 0).view(7, 9)
    inside = torch.zeros(7, 9, dtype=torch.bool)
    inside[1:6, 2:7] = True
    assert torch.equal(reach, inside)


def test_unfolds_with_the_stride_as_a_known_port_does_not():
    module, x = lively(OutlookAttention(16, heads=2)), torch.randn(1, 16, 6, 6, dtype=torch.double)
    value = module.value(x.flatten(2)).view_as(x)
    assert nn.Unfold(3, 1, 2)(value).shape != nn.Unfold(3, padding=1, stride=2)(value).shape  # (kernel, dilation, …)
    torch.testing.assert_close(module(x), module.read(x, weights=module.attend(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window must be odd, got 4"),
        ({"stride": 0}, "stride must lie between 1 and window=3, got 0"),
        ({"stride": 4}, "stride must lie between 1 and window=3, got 4"),
        ({"heads": 5}, "heads must divide channels=64, got 5"),
    ],
    ids=str,
)
def test_refuses_what_is_no_window(options, message):
    with pytest.raises(ValueError, match=message):
        OutlookAttention(64, **options)
