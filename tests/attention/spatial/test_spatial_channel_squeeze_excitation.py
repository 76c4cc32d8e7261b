import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import SpatialChannelSqueezeExcitation

CASES = [
    Case(
        SpatialChannelSqueezeExcitation,
        options,
        lambda c: c * c + c // 2 + 2 * c + 1,
        (4257, 66_177),
        macs=lambda c, h, w: c * c + c * h * w,
    )
    for options in ({}, {"combine": "sum"})
]

either_way = pytest.mark.parametrize("combine", ["max", "sum"])


def logistic(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def paper(module: SpatialChannelSqueezeExcitation, x: Tensor, combine: str) -> Tensor:
    """The paper's equations, in loops."""
    y = torch.empty_like(x)
    first, second, spatial = module.squeeze, module.excite, module.spatial
    batch, channels, height, width = x.shape
    for b in range(batch):
        z = [sum(v for row in channel for v in row) / channel.numel() for channel in x[b]]
        hidden = [
            sum((first.weight[o, i] * z[i] for i in range(channels)), first.bias[o]).clamp(min=0)
            for o in range(first.out_features)
        ]
        for c in range(channels):
            stress = logistic(sum((second.weight[c, i] * v for i, v in enumerate(hidden)), second.bias[c]))
            for p in range(height):
                for q in range(width):
                    score = sum((spatial.weight[0, i] * x[b, i, p, q] for i in range(channels)), spatial.bias[0])
                    pair = x[b, c, p, q] * stress, x[b, c, p, q] * logistic(score)
                    y[b, c, p, q] = max(pair) if combine == "max" else sum(pair)
    return y


@either_way
def test_equals_the_paper_in_loops(combine):
    module = SpatialChannelSqueezeExcitation(6, combine=combine).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x, combine), rtol=0, atol=1e-12)


@either_way
def test_does_not_see_where_things_are_but_does_see_which_channel_they_are_in(combine):
    module, x = SpatialChannelSqueezeExcitation(64, combine=combine), torch.randn(2, 64, 5, 7)
    order = torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x).flatten(2)[..., order].view_as(x))
    order = torch.randperm(64)
    assert not torch.allclose(module(x[:, order]), module(x)[:, order])


@either_way
def test_zero_weights_halve_the_map_or_leave_it(combine):
    module, x = SpatialChannelSqueezeExcitation(64, combine=combine), torch.randn(2, 64, 5, 7)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(x), x / 2 if combine == "max" else x)


def test_the_maximum_is_of_the_products_and_not_of_the_weights():
    module, x = SpatialChannelSqueezeExcitation(64), torch.randn(2, 64, 5, 7)
    y, (channel, spatial) = module(x), module.attend(x)
    torch.testing.assert_close(y, torch.where(x > 0, x * torch.maximum(channel, spatial), x * channel.minimum(spatial)))
    assert not torch.allclose(y, x * torch.maximum(channel, spatial))


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        SpatialChannelSqueezeExcitation(64, reduction=reduction)


def test_refuses_an_unknown_way_to_combine(unchecked):
    with pytest.raises(ValueError, match="combine must be 'max' or 'sum', got 'product'"):
        SpatialChannelSqueezeExcitation(64, combine="product")
