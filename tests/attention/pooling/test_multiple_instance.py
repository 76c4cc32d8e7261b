import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import GatedMultipleInstancePool

CASES = [
    Case(
        GatedMultipleInstancePool,
        {},
        lambda c: 256 * c + 128,
        (16_512, 65_664),
        macs=lambda c, h, w: h * w * (256 * c + 128 + c),
        sums_to_one=(2, 3),
    ),
    Case(
        GatedMultipleInstancePool,
        {"gated": False, "width": 16},
        lambda c: 16 * c + 16,
        (1040, 4112),
        macs=lambda c, h, w: h * w * (16 * c + 16 + c),
        sums_to_one=(2, 3),
    ),
]


def lively(**options) -> GatedMultipleInstancePool:
    module = GatedMultipleInstancePool(6, width=4, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def paper(module: GatedMultipleInstancePool, x: Tensor) -> Tensor:
    """Equations 7 to 9 of the paper, in loops."""
    v, w = module.inner.weight[:, :, 0], module.score.weight[0, :, 0]
    y = []
    for sample in x.flatten(2):
        bag = [sample[:, i] for i in range(sample.shape[1])]
        hidden = [torch.tanh(v @ h) for h in bag]
        if module.gate is not None:
            u = module.gate.weight[:, :, 0]
            hidden = [t / (1 + torch.exp(-(u @ h))) for t, h in zip(hidden, bag, strict=True)]
        scores = [math.exp(w @ t) for t in hidden]
        y.append(sum(s / sum(scores) * h for s, h in zip(scores, bag, strict=True)))
    return torch.stack(y)


@pytest.mark.parametrize("gated", [True, False])
def test_equals_the_paper_in_loops(gated):
    module, x = lively(gated=gated), torch.randn(2, 6, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_a_bag_has_no_order_and_repeating_it_changes_nothing():
    module, x = lively(), torch.randn(2, 6, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x.flip(2, 3)), module(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(torch.cat((x, x), 3)), module(x), rtol=0, atol=1e-12)
    assert not torch.allclose(module(x.flip(1)), module(x).flip(1))  # features have an order


def test_a_score_of_zero_gives_the_mean():
    module, x = lively(), torch.randn(2, 6, 3, 5, dtype=torch.double)
    nn.init.zeros_(module.score.weight)
    torch.testing.assert_close(module(x), x.mean((2, 3)), rtol=0, atol=1e-12)


def test_refuses_no_width():
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        GatedMultipleInstancePool(64, width=0)
