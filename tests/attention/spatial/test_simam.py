import pytest
import torch
from torch import Tensor

from tests.attention.case import Case
from visattn import SimAM

CASES = [Case(SimAM, options, lambda c: 0, (0, 0), macs=lambda c, h, w: 0) for options in ({}, {"regularisation": 0.1})]


def paper(x: Tensor, regularisation: float) -> Tensor:
    """The minimal energy of the paper, in loops."""
    y = torch.empty_like(x)
    batch, channels, height, width = x.shape
    for b in range(batch):
        for c in range(channels):
            mean = sum(v for row in x[b, c] for v in row) / (height * width)
            variance = sum((v - mean) ** 2 for row in x[b, c] for v in row) / (height * width - 1)
            for p in range(height):
                for q in range(width):
                    t = x[b, c, p, q]
                    energy = 4 * (variance + regularisation) / ((t - mean) ** 2 + 2 * variance + 2 * regularisation)
                    y[b, c, p, q] = t / (1 + torch.exp(-1 / energy))
    return y


@pytest.mark.parametrize("regularisation", [1e-4, 0.5])
def test_equals_the_paper_in_loops(regularisation):
    x = torch.randn(2, 4, 3, 5, dtype=torch.double) + 2
    module = SimAM(4, regularisation=regularisation)
    torch.testing.assert_close(module(x), paper(x, regularisation), rtol=0, atol=1e-12)


def test_a_flat_map_weighs_the_same_everywhere_and_so_does_one_position():
    expected = torch.tensor(0.5).sigmoid()
    for x in (torch.randn(2, 64, 1, 1).expand(2, 64, 5, 7), torch.randn(1, 64, 1, 1)):
        torch.testing.assert_close(SimAM(64).attend(x), expected.expand_as(x), rtol=0, atol=1e-6)


def test_nothing_weighs_less_than_the_mean():
    weights = SimAM(64).attend(torch.randn(2, 64, 5, 7))
    assert weights.min() >= torch.tensor(0.5).sigmoid()
    assert weights.max() < 1


def test_weights_follow_positions_and_channels_wherever_they_go():
    module, x = SimAM(64), torch.randn(2, 64, 5, 7, dtype=torch.double)
    order, channels = torch.randperm(35), torch.randperm(64)
    shuffled = x[:, channels].flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x)[:, channels].flatten(2)[..., order].view_as(x))


def test_weights_do_not_see_what_is_added_to_a_channel_nor_its_scale_but_for_the_regularisation():
    x = torch.randn(2, 64, 5, 7, dtype=torch.double)
    module, scale = SimAM(64), torch.rand(64, 1, 1, dtype=torch.double) + 0.5
    torch.testing.assert_close(module.attend(x + 3), module.attend(x))
    torch.testing.assert_close(module.attend(x * scale), module.attend(x), rtol=0, atol=1e-3)
    strong = SimAM(64, regularisation=1.0)
    assert (strong.attend(x * scale) - strong.attend(x)).abs().max() > 1e-2


# The product computes its own gradient; plain operations say what it should be.


@pytest.mark.parametrize("regularisation", [1e-4, 0.5])
@pytest.mark.parametrize("size", [(5, 64, 40, 41), (2, 64, 1, 1)])  # several tiles; one position
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_equals_that_of_plain_operations(regularisation, size, layout):
    x = torch.randn(size, dtype=torch.double).to(memory_format=layout).requires_grad_()
    module, g = SimAM(64, regularisation=regularisation), torch.randn(size, dtype=torch.double)
    (ours,) = torch.autograd.grad(module(x), x, g)
    (expected,) = torch.autograd.grad(module.read(x, weights=module.attend(x)), x, g)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_can_be_differentiated_again():
    x = torch.randn(2, 3, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(SimAM(3), x)


def test_works_under_the_transforms_of_torch_func(unchecked):
    module, x = SimAM(64), torch.randn(2, 64, 5, 7, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(lambda image: module(image[None])[0])(x), module(x))


def test_keeps_only_its_input_for_the_gradient():
    x, kept = torch.randn(8, 64, 28, 28, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        SimAM(64)(x)
    assert [tensor.untyped_storage().data_ptr() for tensor in kept] == [x.untyped_storage().data_ptr()]


@pytest.mark.parametrize("regularisation", [0.0, -1.0])
def test_refuses_a_regularisation_that_is_not_positive(regularisation):
    with pytest.raises(ValueError, match=f"regularisation must be positive, got {regularisation}"):
        SimAM(64, regularisation=regularisation)
