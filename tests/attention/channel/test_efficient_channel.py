import pytest
import torch
from timm.layers import CecaModule, EcaModule

from tests.attention.case import Case
from visattn import EfficientChannelAttention

CASES = [
    Case(
        EfficientChannelAttention,
        {},
        lambda c: c.bit_length() // 2 | 1,
        (3, 5),
        macs=lambda c, h, w: c * (c.bit_length() // 2 | 1),
    ),
    Case(EfficientChannelAttention, {"kernel_size": 7}, lambda c: 7, (7, 7), macs=lambda c, h, w: 7 * c),
    Case(
        EfficientChannelAttention,
        {"padding": "circular"},
        lambda c: c.bit_length() // 2 | 1,
        (3, 5),
        macs=lambda c, h, w: 3 * c,
    ),
]


def paper(module: EfficientChannelAttention, x: torch.Tensor) -> torch.Tensor:
    """Section 3 of the paper, in loops."""
    y, taps = torch.empty_like(x), module.conv.weight[0, 0]
    channels, reach = x.shape[1], len(taps) // 2
    for b in range(x.shape[0]):
        z = [sum(v for row in channel for v in row) / channel.numel() for channel in x[b]]
        for c in range(channels):
            around = [(i, c + i) for i in range(-reach, reach + 1)]
            if module.conv.padding_mode == "circular":
                around = [(i, at % channels) for i, at in around]
            s = sum(taps[reach + i] * z[at] for i, at in around if 0 <= at < channels)
            y[b, c] = x[b, c] / (1 + torch.exp(-s))
    return y


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 17])
def test_equals_the_paper_in_loops(kernel_size, padding):
    module = EfficientChannelAttention(8, kernel_size=kernel_size, padding=padding).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_gate_does_not_see_where_things_are_but_does_see_the_order_of_channels():
    module, x = EfficientChannelAttention(64), torch.randn(2, 64, 5, 7)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    order = torch.randperm(64)
    assert not torch.allclose(module.attend(x[:, order]), module.attend(x)[:, order])


def test_with_a_kernel_of_one_every_channel_stands_alone():
    module, x, order = EfficientChannelAttention(64, kernel_size=1), torch.randn(2, 64, 5, 7), torch.randperm(64)
    torch.testing.assert_close(module.attend(x[:, order]), module.attend(x)[:, order])


def test_only_neighbours_within_the_kernel_move_a_weight():
    module, x = EfficientChannelAttention(64, kernel_size=5), torch.randn(1, 64, 5, 7)
    moved = x.clone()
    moved[:, 20] += 1
    changed = (module.attend(moved) != module.attend(x)).flatten().nonzero().flatten()
    assert changed.tolist() == [18, 19, 20, 21, 22]


KERNELS = {16: 3, 32: 3, 64: 3, 96: 3, 128: 5, 192: 5, 256: 5, 384: 5, 512: 5, 768: 5, 1024: 5, 2048: 7}


@pytest.mark.parametrize(("channels", "kernel_size"), KERNELS.items())
def test_the_kernel_follows_the_rule_and_is_all_there_is_to_learn(channels, kernel_size):
    assert sum(p.numel() for p in EfficientChannelAttention(channels).parameters()) == kernel_size


def test_zero_kernel_halves_the_map():
    module, x = EfficientChannelAttention(64), torch.randn(2, 64, 5, 7)
    torch.nn.init.zeros_(module.conv.weight)
    assert torch.equal(module(x), x / 2)


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_only_around_a_ring_do_the_weights_follow_the_channels(padding):
    module, x = EfficientChannelAttention(64, padding=padding), torch.randn(2, 64, 5, 7)
    followed = torch.allclose(module.attend(x.roll(9, 1)), module.attend(x).roll(9, 1))
    assert followed == (padding == "circular")


@pytest.mark.parametrize(("padding", "cls"), [("zeros", EcaModule), ("circular", CecaModule)])
@pytest.mark.parametrize("channels", [64, 256])
def test_equals_timm_after_copying_weights(channels, padding, cls):
    ours, theirs = EfficientChannelAttention(channels, padding=padding), cls(channels)
    x = torch.randn(2, channels, 5, 7)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kernel_size", [-1, 0, 4])
def test_refuses_a_kernel_without_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
        EfficientChannelAttention(64, kernel_size=kernel_size)


def test_refuses_to_go_around_a_ring_more_than_once():
    with pytest.raises(ValueError, match="kernel_size must be at most 9 around 4 channels, got 11"):
        EfficientChannelAttention(4, kernel_size=11, padding="circular")
    assert EfficientChannelAttention(4, kernel_size=11)(torch.randn(1, 4, 2, 3)).shape == (1, 4, 2, 3)


def test_refuses_an_unknown_padding(unchecked):
    with pytest.raises(ValueError, match="padding must be 'zeros' or 'circular', got 'reflect'"):
        EfficientChannelAttention(64, padding="reflect")
