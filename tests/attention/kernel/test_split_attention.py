import pytest
import torch
from timm.layers import SplitAttn
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import SplitAttention


def parameters(channels: int, radix: int, cardinality: int) -> int:
    width = max(channels * radix // 4, 32)
    convolution = 9 * channels**2 // cardinality + 2 * radix * channels
    squeeze, select = channels * width // cardinality + 3 * width, (width // cardinality + 1) * radix * channels
    return convolution + squeeze + select


def macs(channels: int, height: int, width: int, radix: int, cardinality: int) -> int:
    inner = max(channels * radix // 4, 32)
    return (9 * height * width * channels**2 + (1 + radix) * inner * channels) // cardinality


CASES = [
    Case(
        SplitAttention,
        options,
        lambda c, radix=radix, cardinality=cardinality: parameters(c, radix, cardinality),
        golden,
        lambda c, h, w, radix=radix, cardinality=cardinality: macs(c, h, w, radix, cardinality),
        sums_to_one=1,
        norm_over="samples",
        small=4,
    )
    for options, radix, cardinality, golden in (
        ({}, 2, 1, (43_488, 690_048)),
        ({"cardinality": 2}, 2, 2, (21_984, 345_984)),
    )
]


def lively(channels: int = 16, **options) -> SplitAttention:
    """In double precision and evaluation, with norms that do something."""
    module = SplitAttention(channels, **options).double().eval()
    for norm in (module.split[1], module.squeeze[1]):
        for tensor in (norm.weight, norm.bias, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    for layer in (module.split[0], module.squeeze[0], module.select):
        nn.init.normal_(layer.weight)
    return module


def paper(module: SplitAttention, x: Tensor, radix: int, cardinality: int) -> Tensor:
    """Section 3 of the paper, in loops; the splits lie one after the other, the groups inside each."""

    def normed(norm, values, c):
        scale = norm.weight[c] / (norm.running_var[c] + norm.eps) ** 0.5
        return (values - norm.running_mean[c]) * scale + norm.bias[c]

    def apart(layer, vector):  # a layer of its own for every group
        parts, rows = vector.chunk(cardinality), layer.weight[:, :, 0, 0].chunk(cardinality)
        return torch.cat([row @ part for row, part in zip(rows, parts, strict=True)]) + layer.bias

    outputs = []
    for image in x:
        every = F.conv2d(image[None], module.split[0].weight, None, 1, 1, 1, radix * cardinality)[0]
        every = [normed(module.split[1], u, c).clamp(min=0) for c, u in enumerate(every)]
        channels = len(every) // radix
        maps = [every[r * channels : (r + 1) * channels] for r in range(radix)]
        s = torch.stack([sum(u[c].sum() / u[c].numel() for u in maps) for c in range(channels)])
        z = apart(module.squeeze[0], s)
        z = torch.stack([normed(module.squeeze[1], value, d).clamp(min=0) for d, value in enumerate(z)])
        logits, wide = apart(module.select, z), channels // cardinality
        y = []
        for c in range(channels):
            group, inside = divmod(c, wide)
            e = [torch.exp(logits[(group * radix + r) * wide + inside]) for r in range(radix)]
            total = sum(e) if radix > 1 else 1 + e[0]
            y.append(sum(e[r] / total * maps[r][c] for r in range(radix)))
        outputs.append(torch.stack(y))
    return torch.stack(outputs)


@pytest.mark.parametrize(("radix", "cardinality"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4), (4, 2)])
def test_equals_the_paper_in_loops(radix, cardinality):
    module = lively(radix=radix, cardinality=cardinality)
    x = torch.randn(2, 16, 5, 7, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, radix, cardinality), rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("radix", "cardinality", "stride"), [(2, 1, 1), (1, 1, 1), (2, 4, 1), (4, 2, 2)])
def test_equals_timm_after_copying_weights(radix, cardinality, stride, training):
    ours = SplitAttention(64, radix=radix, cardinality=cardinality, stride=stride, downsample="convolution")
    theirs = SplitAttn(64, stride=stride, radix=radix, groups=cardinality, norm_layer=nn.BatchNorm2d)
    theirs.load_state_dict(
        dict(zip(theirs.state_dict(), (value.clone() for value in ours.state_dict().values()), strict=True))
    )
    x = torch.randn(2, 64, 6, 9)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


def test_the_softmax_is_over_the_splits_of_each_group():
    module, x = lively(cardinality=2), torch.randn(2, 16, 5, 7, dtype=torch.double)
    weights = module.attend(x)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    logits = []
    module.select.register_forward_hook(lambda _, given, returned: logits.append(returned))
    module.attend(x)
    wrong = logits[0].unflatten(1, (2, -1)).softmax(1)[..., None]  # as if the splits came first
    assert not torch.allclose(wrong.flatten(), weights.flatten())


def test_a_single_split_is_a_gated_convolution():
    module, x = lively(radix=1), torch.randn(2, 16, 5, 7, dtype=torch.double)
    torch.testing.assert_close(module(x), module.split(x) * module.attend(x)[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "shrunk"), [((6, 8), (3, 4)), ((5, 7), (3, 4)), ((1, 1), (1, 1))])
def test_shrinks_where_it_is_told(size, shrunk):
    modules = {side: lively(stride=2, downsample=side) for side in ("after", "before", "convolution")}
    plain, x = lively(), torch.randn(2, 16, *size, dtype=torch.double)
    for module in modules.values():
        module.load_state_dict(plain.state_dict())
        assert module(x).shape == (2, 16, *shrunk)
    torch.testing.assert_close(modules["after"](x), F.avg_pool2d(plain(x), 3, 2, 1))
    torch.testing.assert_close(modules["before"](x), plain(F.avg_pool2d(x, 3, 2, 1)))
    weights = plain.attend(x)
    torch.testing.assert_close(
        modules["convolution"].read(x, weights=weights), plain.read(x, weights=weights)[..., ::2, ::2]
    )


def test_the_choice_moves_with_the_map_but_does_not_survive_a_shuffle():
    module, x = lively(), torch.zeros(2, 16, 9, 9, dtype=torch.double)
    x[:, :, 3:5, 3:5] = torch.randn(2, 16, 2, 2)
    torch.testing.assert_close(module(x.roll(2, 3)), module(x).roll(2, 3), rtol=0, atol=1e-11)
    x = torch.randn_like(x)
    shuffled = x.flatten(2)[..., torch.randperm(81)].view_as(x)
    assert not torch.allclose(module.attend(shuffled), module.attend(x))


@pytest.mark.parametrize("option", ["radix", "cardinality", "reduction"])
def test_refuses_an_option_that_is_not_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        SplitAttention(64, **{option: 0})


@pytest.mark.parametrize(("cardinality", "out_channels"), [(64, 64), (3, 64), (4, 62)])
def test_refuses_a_cardinality_that_does_not_divide(cardinality, out_channels):
    message = rf"cardinality times radix=2 must divide channels=64, .*={out_channels} and the 32 .*, got {cardinality}"
    with pytest.raises(ValueError, match=message):
        SplitAttention(64, out_channels=out_channels, cardinality=cardinality)


def test_refuses_an_unknown_way_to_shrink(unchecked):
    with pytest.raises(ValueError, match="downsample must be 'after', 'before' or 'convolution', got 'inside'"):
        SplitAttention(64, downsample="inside")
