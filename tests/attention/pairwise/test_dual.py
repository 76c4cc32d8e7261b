import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import ChannelAttention, PositionAttention

CASES = [
    Case(
        PositionAttention,
        {},
        lambda c: 5 * c * c // 4 + 5 * c // 4 + 1,
        (5201, 82_241),
        macs=lambda c, h, w: 5 * c * c * h * w // 4 + 9 * c * (h * w) ** 2 // 8,
        sums_to_one=-1,
    ),
    *(
        Case(ChannelAttention, options, lambda c: 1, (1, 1), macs=lambda c, h, w: 2 * c * c * h * w, sums_to_one=1)
        for options in ({}, {"form": "paper"})
    ),
]
either_form = pytest.mark.parametrize("form", ["paper", "released"])


def lively(module: PositionAttention | ChannelAttention) -> PositionAttention | ChannelAttention:
    """In double precision, with nothing zero."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def shuffle(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(2)[..., order].view_as(x)


def paper_position(module: PositionAttention, x: Tensor) -> Tensor:
    """Section 3.2 of the paper, in loops."""
    x, (height, width) = x.flatten(2), x.shape[2:]
    y = torch.empty_like(x)
    (b, b_bias), (c, c_bias), (d, d_bias) = (
        (layer.weight[:, :, 0], layer.bias) for layer in (module.query, module.key, module.value)
    )
    for n in range(x.shape[0]):
        for j in range(height * width):
            ours = b @ x[n, :, j] + b_bias
            s = [torch.exp(ours @ (c @ x[n, :, i] + c_bias)) for i in range(height * width)]
            read = sum(e / sum(s) * (d @ x[n, :, i] + d_bias) for i, e in enumerate(s))
            y[n, :, j] = module.gamma * read + x[n, :, j]
    return y.unflatten(2, (height, width))


def paper_channel(module: ChannelAttention, x: Tensor, form: str) -> Tensor:
    """Section 3.3 of the paper, or its released code, in loops."""
    y = torch.empty_like(x)
    channels = range(x.shape[1])
    for n in range(x.shape[0]):
        for j in channels:
            products = [(x[n, j] * x[n, i]).sum() for i in channels]
            energies = products if form == "paper" else [max(products) - product for product in products]
            e = [torch.exp(energy) for energy in energies]
            y[n, j] = module.beta * sum(e[i] / sum(e) * x[n, i] for i in channels) + x[n, j]
    return y


@pytest.mark.parametrize("reduction", [1, 4])
def test_position_equals_the_paper_in_loops(reduction):
    module, x = lively(PositionAttention(8, reduction=reduction)), torch.randn(2, 8, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper_position(module, x), rtol=0, atol=1e-10)


@either_form
def test_channel_equals_the_paper_in_loops(form):
    module, x = lively(ChannelAttention(6, form=form)), torch.randn(2, 6, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper_channel(module, x, form), rtol=0, atol=1e-10)


def test_position_reads_one_from_values_of_one_as_the_wrong_axis_does_not():
    module, x = lively(PositionAttention(8)), torch.randn(2, 8, 4, 6, dtype=torch.double)
    with torch.no_grad():
        module.value.weight.zero_()
        module.value.bias.fill_(1)
    torch.testing.assert_close(module(x), x + module.gamma, rtol=0, atol=1e-12)
    assert (module.attend(x).sum(1) - 1).abs().max() > 0.1


def test_neither_sees_where_things_are_but_position_sees_the_order_of_channels():
    x, order, channels = torch.randn(2, 8, 4, 6, dtype=torch.double), torch.randperm(24), torch.randperm(8)
    position, channel = lively(PositionAttention(8)), lively(ChannelAttention(8))
    for module in (position, channel):
        torch.testing.assert_close(module(shuffle(x, order)), shuffle(module(x), order), rtol=0, atol=1e-11)
    torch.testing.assert_close(channel.attend(shuffle(x, order)), channel.attend(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(channel(x[:, channels]), channel(x)[:, channels], rtol=0, atol=1e-12)
    assert (position(x[:, channels]) - position(x)[:, channels]).abs().max() > 0.1


def test_released_channel_weights_are_the_softmax_of_minus_the_products():
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    products = x.flatten(2) @ x.flatten(2).mT
    released = ChannelAttention(8).attend(x)[..., 0, 0].mT
    torch.testing.assert_close(released, (-products).softmax(2), rtol=0, atol=1e-12)
    torch.testing.assert_close(released, (products.amax(2, keepdim=True) - products).softmax(2), rtol=0, atol=1e-12)
    assert (released - products.softmax(2)).abs().max() > 0.5


def test_with_the_plus_of_the_paper_a_channel_reads_from_itself_and_with_the_minus_it_does_not():
    x = torch.randn(2, 8, 16, 16)
    for form, itself in (("paper", 1.0), ("released", 0.0)):
        weights = ChannelAttention(8, form=form).attend(x)[..., 0, 0]
        torch.testing.assert_close(weights.diagonal(dim1=1, dim2=2), torch.full((2, 8), itself), rtol=0, atol=1e-6)


def test_channel_weights_are_no_denormal_numbers_which_are_slow():
    weights = ChannelAttention(64).attend(torch.randn(2, 64, 16, 16))
    assert not weights[weights != 0].min() < 1e-31
    assert (weights == 0).any()


def test_only_the_gain_has_a_gradient_at_init():
    module = PositionAttention(64)
    module(torch.randn(2, 64, 5, 7)).square().sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad.any()] == ["gamma"]


def test_products_of_channels_that_overflow_float16_do_not_overflow_here():
    x = 300 * torch.ones(1, 4, 8, 8, dtype=torch.half)
    torch.testing.assert_close(ChannelAttention(4).attend(x), torch.full((1, 4, 4, 1, 1), 0.25, dtype=torch.half))


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        PositionAttention(64, reduction=reduction)


def test_refuses_an_unknown_form(unchecked):
    with pytest.raises(ValueError, match="form must be paper or released, got 'plus'"):
        ChannelAttention(64, form="plus")
