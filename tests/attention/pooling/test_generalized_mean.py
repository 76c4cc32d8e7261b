import pytest
import torch
from torch import Tensor

from tests.attention.case import Case
from visattn import GeneralizedMeanPool

CASES = [
    Case(GeneralizedMeanPool, {}, lambda c: 1, (1, 1), macs=lambda c, h, w: 0),
    Case(GeneralizedMeanPool, {"learned": False, "exponent": 2.0}, lambda c: 1, (1, 1), macs=lambda c, h, w: 0),
]


def paper(x: Tensor, p: float) -> Tensor:
    """Equation 3 of the paper, in loops."""
    y = torch.empty(x.shape[:2], dtype=x.dtype)
    for b, sample in enumerate(x):
        for c, channel in enumerate(sample):
            values = [max(float(v), 1e-6) for v in channel.flatten()]
            y[b, c] = (sum(v**p for v in values) / len(values)) ** (1 / p)
    return y


@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, 7.0])
def test_equals_the_paper_in_loops(p):
    x = torch.randn(2, 6, 3, 5, dtype=torch.double)
    module = GeneralizedMeanPool(6, exponent=p).double()
    torch.testing.assert_close(module(x), paper(x, p), rtol=0, atol=1e-12)


def test_lies_between_the_mean_and_the_maximum():
    x = torch.rand(2, 6, 3, 5, dtype=torch.double) + 0.1
    one, many = GeneralizedMeanPool(6, exponent=1.0).double(), GeneralizedMeanPool(6, exponent=500.0).double()
    torch.testing.assert_close(one(x), x.mean((2, 3)))
    torch.testing.assert_close(many(x), x.amax((2, 3)), rtol=0.01, atol=0)
    three = GeneralizedMeanPool(6).double()(x)
    assert ((one(x) < three) & (three < many(x))).all()


def test_grows_with_the_map_and_does_not_see_where_things_are():
    x = torch.rand(2, 6, 3, 5, dtype=torch.double) + 0.1
    module = GeneralizedMeanPool(6).double()
    torch.testing.assert_close(module(2 * x), 2 * module(x))
    torch.testing.assert_close(module(x.flip(2, 3)), module(x))
    assert not torch.allclose(module(x + 1), module(x) + 1)


def test_large_features_do_not_overflow():
    x = torch.full((1, 2, 3, 5), 1e20)
    module = GeneralizedMeanPool(2)
    torch.testing.assert_close(module(x), torch.full((1, 2), 1e20))
    torch.testing.assert_close(module.attend(x), torch.full_like(x, 1 / 15))


def test_the_exponent_learns_only_if_it_should():
    assert GeneralizedMeanPool(6).exponent.requires_grad
    assert not GeneralizedMeanPool(6, learned=False).exponent.requires_grad


@pytest.mark.parametrize(("name", "value"), [("exponent", 0.0), ("floor", -1.0)])
def test_refuses_what_has_no_power(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        GeneralizedMeanPool(64, **{name: value})
