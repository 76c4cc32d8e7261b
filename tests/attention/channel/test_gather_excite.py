import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import GatherExcite, SqueezeExcitation

CASES = [
    Case(
        GatherExcite,
        {"extent": 2},
        lambda c: 11 * c,
        (704, 2816),
        macs=lambda c, h, w: 9 * c * math.ceil(h / 2) * math.ceil(w / 2),
        norm_over="positions",
    ),
    Case(
        GatherExcite,
        {"gather": "mean", "extent": 4, "reduction": 16},
        lambda c: c * c // 8,
        (512, 8192),
        macs=lambda c, h, w: c * c // 8 * math.ceil(h / 4) * math.ceil(w / 4),
    ),
    Case(
        GatherExcite,
        {"reduction": 16, "size": (5, 7)},
        lambda c: 37 * c + c * c // 8,
        (2880, 17_664),
        macs=lambda c, h, w: c * h * w + c * c // 8,
        norm_over="samples",
    ),
]


def lively(channels: int = 6, **options) -> GatherExcite:
    """In double precision and eval, with nothing zero and norms that have seen something."""
    module = GatherExcite(channels, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for name, buffer in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module


def window(channel: Tensor, p: int, q: int, reach: int) -> list[tuple[int, int, Tensor]]:
    """The values within reach of a position, and where they lie from it."""
    height, width = channel.shape
    return [
        (i, j, channel[p + i, q + j])
        for i in range(-reach, reach + 1)
        for j in range(-reach, reach + 1)
        if 0 <= p + i < height and 0 <= q + j < width
    ]


def gather(module: GatherExcite, x: Tensor) -> Tensor:
    """Section 2 and 3 of the paper for one image, in loops: what is gathered, at its coarse size."""
    (channels, height, width), extent, layers = x.shape, module.extent, list(module.layers)
    if not layers and extent is None:
        return torch.stack([sum(v for row in channel for v in row) / channel.numel() for channel in x])[:, None, None]
    if not layers:
        coarse = x.new_empty(channels, math.ceil(height / extent), math.ceil(width / extent))
        for c in range(channels):
            for p in range(coarse.shape[1]):
                for q in range(coarse.shape[2]):
                    seen = [v for _, _, v in window(x[c], p * extent, q * extent, extent - 1)]
                    coarse[c, p, q] = sum(seen) / len(seen)
        return coarse
    while layers:
        conv, norm = layers.pop(0), layers.pop(0)
        taps = conv.weight[:, 0]
        if extent is None:
            z = torch.stack([(taps[c] * x[c]).sum() for c in range(channels)])[:, None, None]
        else:
            z = x.new_empty(channels, math.ceil(x.shape[1] / 2), math.ceil(x.shape[2] / 2))
            for c in range(channels):
                for p in range(z.shape[1]):
                    for q in range(z.shape[2]):
                        z[c, p, q] = sum(taps[c, 1 + i, 1 + j] * v for i, j, v in window(x[c], 2 * p, 2 * q, 1))
        for c in range(channels):
            z[c] = (z[c] - norm.running_mean[c]) / torch.sqrt(norm.running_var[c] + 1e-5)
            z[c] = z[c] * norm.weight[c] + norm.bias[c]
        x = z
        if layers:
            layers.pop(0)
            x = x.clamp(min=0)
    return x


def paper(module: GatherExcite, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        z = gather(module, x[b])
        if len(module.excite):
            first, second = module.excite[0].weight[:, :, 0, 0], module.excite[2].weight[:, :, 0, 0]
            z = torch.einsum("oi,ihw->ohw", second, torch.einsum("oi,ihw->ohw", first, z).clamp(min=0))
        for p in range(x.shape[2]):
            for q in range(x.shape[3]):
                at = z[:, p * z.shape[1] // x.shape[2], q * z.shape[2] // x.shape[3]]
                y[b, :, p, q] = x[b, :, p, q] / (1 + torch.exp(-at))
    return y


@pytest.mark.parametrize("reduction", [None, 2])
@pytest.mark.parametrize("gather", ["mean", "layers"])
@pytest.mark.parametrize("extent", [2, 4, 8, None])
def test_equals_the_paper_in_loops(extent, gather, reduction):
    module = lively(extent=extent, gather=gather, reduction=reduction, size=(5, 9))
    x = torch.randn(2, 6, 5, 9, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_of_a_flat_map_means_are_flat_up_to_the_border():
    x = torch.full((1, 64, 7, 9), 0.7)
    for extent in (2, 4, 8, None):
        weights = GatherExcite(64, extent=extent, gather="mean").attend(x)
        torch.testing.assert_close(weights, torch.full_like(x, 0.7).sigmoid())
    counted = nn.functional.avg_pool2d(x, 3, 2, 1)  # with zeros beyond the border, as in many ports
    assert (counted - 0.7).abs().max() > 0.1


def test_only_what_is_gathered_from_all_of_the_map_does_not_see_where_things_are():
    x = torch.randn(2, 64, 8, 8, dtype=torch.double)
    shuffled = x.flatten(2)[..., torch.randperm(64)].view_as(x)
    for options, blind in (({}, True), ({"extent": 4}, False)):
        module = lively(64, gather="mean", **options)
        assert torch.allclose(module.attend(shuffled), module.attend(x)) == blind
    module = lively(64, size=(8, 8))
    assert not torch.allclose(module.attend(shuffled), module.attend(x))


@pytest.mark.parametrize("gather", ["mean", "layers"])
def test_moves_with_the_map_by_whole_neighbourhoods(gather):
    module, x = lively(extent=2, gather=gather), torch.zeros(1, 6, 16, 16, dtype=torch.double)
    x[:, :, 4:8, 4:8] = torch.randn(1, 6, 4, 4, dtype=torch.double)
    by_two, by_one = (module(x.roll((n, n), (2, 3))) - module(x).roll((n, n), (2, 3)) for n in (2, 1))
    assert by_two.abs().max() < 1e-12
    assert by_one.abs().max() > 1e-3


def test_the_mean_of_the_whole_map_with_two_layers_is_squeeze_and_excitation():
    module, x = GatherExcite(64, gather="mean", reduction=16), torch.randn(2, 64, 5, 7)
    other = SqueezeExcitation(64, bias=False)
    with torch.no_grad():
        other.squeeze.weight.copy_(module.excite[0].weight[:, :, 0, 0])
        other.excite.weight.copy_(module.excite[2].weight[:, :, 0, 0])
    torch.testing.assert_close(module(x), other(x))


def test_means_learn_nothing():
    assert not list(GatherExcite(64, extent=8, gather="mean").parameters())


@pytest.mark.parametrize(("extent", "count"), [(2, 704), (4, 1408), (8, 2112), (None, 64 * 56 * 56 + 128)])
def test_has_the_parameters_of_its_layers(extent, count):
    module = GatherExcite(64, extent=extent, size=(56, 56))
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("extent", [-2, 0, 1, 3])
def test_refuses_an_extent_that_is_no_power_of_two(extent):
    with pytest.raises(ValueError, match=f"extent must be a power of two above one, or None, got {extent}"):
        GatherExcite(64, extent=extent)


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, or be None, got {reduction}"):
        GatherExcite(64, extent=2, reduction=reduction)


def test_refuses_an_unknown_way_to_gather(unchecked):
    with pytest.raises(ValueError, match="gather must be 'mean' or 'layers', got 'max'"):
        GatherExcite(64, gather="max")


def test_says_that_it_needs_a_size_and_which():
    with pytest.raises(ValueError, match=r"size must be the \(height, width\) of the feature map, got None"):
        GatherExcite(64)
    with pytest.raises(ValueError, match=r"size must be \(5, 7\), as constructed, got \(7, 5\)"):
        GatherExcite(64, size=(5, 7))(torch.randn(2, 64, 7, 5))
