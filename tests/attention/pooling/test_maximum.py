import torch

from tests.attention.case import Case
from visattn import MaxPool

CASES = [Case(MaxPool, {}, lambda c: 0, (0, 0), macs=lambda c, h, w: 0, sums_to_one=(2, 3))]


def test_is_the_maximum_and_its_map_says_where():
    x = torch.randn(2, 6, 3, 5)
    module = MaxPool(6)
    assert torch.equal(module(x), x.amax((2, 3)))
    weights = module.attend(x)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(x[weights.bool()].view(2, 6), module(x))


def test_of_equal_values_the_first_is_picked_and_learns():
    x = torch.zeros(1, 2, 3, 5, requires_grad=True)
    module = MaxPool(2)
    module(x).sum().backward()
    first = torch.zeros(1, 2, 3, 5)
    first[:, :, 0, 0] = 1
    assert torch.equal(module.attend(x.detach()), first)
    assert torch.equal(x.grad, first)


def test_moves_with_the_map_and_not_with_its_mean():
    x = torch.randn(2, 6, 3, 5)
    module = MaxPool(6)
    assert torch.equal(module.attend(x.roll(1, 3)), module.attend(x).roll(1, 3))
    assert torch.equal(module(x.roll(1, 3)), module(x))
    assert not torch.allclose(module(x), x.mean((2, 3)))
