import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import ShuffleAttention

CASES = [
    Case(
        ShuffleAttention,
        {"groups": groups},
        lambda c, groups=groups: 3 * c // groups,
        golden,
        macs=lambda c, h, w: 0,  # the scales of channels are no matrix products
    )
    for groups, golden in ((8, (24, 96)), (1, (192, 768)))
]


def lively(channels: int = 12, groups: int = 3) -> ShuffleAttention:
    module = ShuffleAttention(channels, groups=groups).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def paper(module: ShuffleAttention, x: Tensor) -> Tensor:
    """The paper's equations, in loops."""
    channels, groups = x.shape[1], module.groups
    half, y = channels // (2 * groups), torch.empty_like(x)
    for b in range(x.shape[0]):
        found = []
        for c in range(channels):
            k, values = c % half, [v for row in x[b, c] for v in row]
            mean = sum(values) / len(values)
            if c // half % 2 == 0:
                gate = logistic(module.channel_weight[k] * mean + module.channel_bias[k])
                found.append(x[b, c] * gate)
            else:
                variance = sum((v - mean) ** 2 for v in values) / len(values)
                normal = (x[b, c] - mean) / torch.sqrt(variance + 1e-5) * module.norm.weight[k] + module.norm.bias[k]
                found.append(x[b, c] * logistic(module.spatial_weight[k] * normal + module.spatial_bias[k]))
        for c in range(channels // 2):
            y[b, 2 * c], y[b, 2 * c + 1] = found[c], found[c + channels // 2]
    return y


def logistic(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_equals_the_paper_in_loops(groups):
    module, x = lively(groups=groups), torch.randn(2, 12, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 8])
def test_shuffles_as_torch_does_what_is_weighed_evenly(groups):
    module, x = ShuffleAttention(64, groups=groups), torch.randn(2, 64, 5, 7)
    gate = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(module(x), nn.ChannelShuffle(2)(x) * gate)


def test_groups_are_independent():
    module, x = lively(64, 8), torch.randn(1, 64, 5, 7, dtype=torch.double)
    moved = x.clone()
    moved[:, 16:24] += 1 + torch.rand(8, 5, 7)
    changed = (module(moved) != module(x)).flatten(2).any(2)[0].nonzero().flatten().tolist()
    assert changed == list(range(32, 48, 2))  # the third of four groups in the first half, dealt out in turns


def test_groups_share_their_parameters_but_channels_do_not():
    module, x = lively(64, 8), torch.randn(2, 64, 5, 7, dtype=torch.double)
    weights, swapped = module.attend(x), module.attend(x.unflatten(1, (8, 8)).flip(1).flatten(1, 2))
    for before, after in zip(weights, swapped, strict=True):
        torch.testing.assert_close(after, before.unflatten(1, (8, 4)).flip(1).flatten(1, 2))
    within = module.attend(x.unflatten(1, (16, 4)).flip(2).flatten(1, 2))
    for before, after in zip(weights, within, strict=True):
        assert not torch.allclose(after, before.unflatten(1, (8, 4)).flip(2).flatten(1, 2))


def test_follows_positions_wherever_they_go():
    module, x, order = lively(64, 8), torch.randn(2, 64, 5, 7, dtype=torch.double), torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x).flatten(2)[..., order].view_as(x))


@pytest.mark.parametrize("groups", [3, 64])
def test_refuses_channels_that_do_not_make_whole_halves(groups):
    with pytest.raises(ValueError, match=rf"channels must be a multiple of 2 \* groups={2 * groups}, got 64"):
        ShuffleAttention(64, groups=groups)


def test_refuses_groups_that_are_not_positive():
    with pytest.raises(ValueError, match="groups must be positive, got 0"):
        ShuffleAttention(64, groups=0)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (256, 64), (24, 4), (2, 1)])
def test_takes_as_many_groups_as_divide_the_channels_if_it_is_free_to(channels, groups):
    assert ShuffleAttention(channels).groups == groups
