import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import chain, lively, logistic
from visattn import GlobalAttentionMechanism

CASES = [
    Case(
        GlobalAttentionMechanism,
        options,
        lambda c, r=r: 100 * c * (c // r) + 4 * (c // r) + 4 * c,
        golden,
        macs=lambda c, h, w, r=r: 100 * c * (c // r) * h * w,
        norm_over="positions",
        small=small,
    )
    for options, r, golden, small in (
        ({}, 16, (25_872, 410_688), 16),
        ({"reduction": 4}, 4, (102_720, 1_639_680), 4),
    )
]


def paper(module: GlobalAttentionMechanism, x: Tensor) -> Tensor:
    """Section 3 of the paper in loops: the perceptron at one position after the other, then the convolutions."""
    first, _, second = module.channel
    scaled = torch.empty_like(x)
    for p in range(x.shape[1]):
        for q in range(x.shape[2]):
            hidden = (first.weight[:, :, 0, 0] @ x[:, p, q] + first.bias).clamp(min=0)
            scaled[:, p, q] = x[:, p, q] * logistic(second.weight[:, :, 0, 0] @ hidden + second.bias)
    return scaled * logistic(chain(module.spatial, scaled))


@torch.no_grad()
def test_equals_the_paper_in_loops():
    module, x = lively(GlobalAttentionMechanism(4, reduction=2)), torch.randn(2, 4, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), torch.stack([paper(module, image) for image in x]), rtol=0, atol=1e-12)


def test_zero_weights_make_a_quarter_of_the_map():
    module, x = GlobalAttentionMechanism(64), torch.randn(2, 64, 5, 7)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(x), x / 4)


def test_channels_are_weighed_at_each_position_alone_and_positions_by_those_around():
    module, x = lively(GlobalAttentionMechanism(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    order = torch.randperm(35)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    before, after = module.attend(x), module.attend(shuffle(x))
    torch.testing.assert_close(after.channel, shuffle(before.channel), rtol=0, atol=1e-12)
    assert not torch.allclose(after.spatial, shuffle(before.spatial))


def test_the_second_weights_see_thirteen_pixels_of_what_the_first_left():
    module, x = lively(GlobalAttentionMechanism(16)), torch.randn(1, 16, 17, 19, dtype=torch.double)
    module.spatial[1].bias.data += 100  # the ReLU passes everything
    moved = x.clone()
    moved[..., 8, 9] += 1
    changed = (module.attend(moved).spatial != module.attend(x).spatial).any(1)[0]
    assert changed.any(1).nonzero().flatten().tolist() == list(range(2, 15))
    assert changed.any(0).nonzero().flatten().tolist() == list(range(3, 16))


def test_follows_the_map_around_a_torus():
    module, x = lively(GlobalAttentionMechanism(16)), torch.randn(2, 16, 9, 11, dtype=torch.double)
    for layer in (module.spatial[0], module.spatial[3]):
        layer.padding_mode = "circular"
        layer._reversed_padding_repeated_twice = [3, 3, 3, 3]
    torch.testing.assert_close(module(x.roll((2, 3), (2, 3))), module(x).roll((2, 3), (2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        GlobalAttentionMechanism(64, reduction=reduction)
