import torch

from tests.attention.case import Case
from visattn import MeanPool

CASES = [Case(MeanPool, {}, lambda c: 0, (0, 0), macs=lambda c, h, w: 0, sums_to_one=(2, 3))]


def test_is_the_mean_and_says_so():
    x = torch.randn(2, 6, 3, 5)
    assert torch.equal(MeanPool(6)(x), x.mean((2, 3)))
    assert torch.equal(MeanPool(6).attend(x), torch.full((2, 1, 3, 5), 1 / 15))


def test_does_not_see_where_things_are_but_does_see_channels():
    x = torch.randn(2, 6, 3, 5, dtype=torch.double)
    torch.testing.assert_close(MeanPool(6)(x.flip(2, 3)), MeanPool(6)(x))
    assert not torch.allclose(MeanPool(6)(x.flip(1)), MeanPool(6)(x))
