import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import HierarchicalAttentionPool

CASES = [
    Case(
        HierarchicalAttentionPool,
        {},
        lambda c: 2 * (128 * c + 256),
        (16_896, 66_048),
        # regions, one crop, and what each level reads; reading the regions serves both
        macs=lambda c, h, w: (h * w + 1) * (128 * c + 128) + h * w * c + c,
        sums_to_one=[(2, 3), 1],
    ),
]


def lively(crops: int) -> HierarchicalAttentionPool:
    module = HierarchicalAttentionPool(6, width=4, crops=crops).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def level(part: nn.Module, items: list[Tensor]) -> tuple[list[float], Tensor]:
    scores = [math.exp(part.context.weight[0] @ torch.tanh(part.inner.weight @ v + part.inner.bias)) for v in items]
    weights = [s / sum(scores) for s in scores]
    return weights, sum(a * v for a, v in zip(weights, items, strict=True))


@torch.no_grad()
def paper(module: HierarchicalAttentionPool, bags: list[Tensor]) -> Tensor:
    """Equations 5 to 10 of the paper, in loops; every bag with as many crops as it has."""
    y = []
    for bag in bags:
        crops = [level(module.region, [crop[:, i, j] for i in range(3) for j in range(5)])[1] for crop in bag]
        y.append(level(module.crop, crops)[1])
    return torch.stack(y)


@pytest.mark.parametrize("crops", [1, 4])
def test_equals_the_paper_in_loops(crops):
    module, x = lively(crops), torch.randn(2 * crops, 6, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, list(x.split(crops))), rtol=0, atol=1e-12)


def test_what_fills_a_bag_up_changes_nothing():
    module, x = lively(3), torch.randn(6, 6, 3, 5, dtype=torch.double)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(module(x, mask), paper(module, [x[:2], x[3:]]), rtol=0, atol=1e-12)
    x[2] = 1e3
    torch.testing.assert_close(module(x, mask), paper(module, [x[:2], x[3:]]), rtol=0, atol=1e-12)
    assert not torch.allclose(module(x), module(x, mask))


def test_an_empty_bag_reads_zeros():
    module, x = lively(2), torch.randn(4, 6, 3, 5, dtype=torch.double)
    y = module(x, torch.tensor([[False, False], [True, True]]))
    assert not y[0].any()
    assert y[1].all()


def test_one_crop_has_a_weight_of_one():
    module, x = lively(1), torch.randn(3, 6, 3, 5, dtype=torch.double)
    assert torch.equal(module.attend(x).crop, torch.ones(3, 1, 1, 1, dtype=torch.double))


def test_crops_have_no_order_within_a_bag_but_bags_do():
    module, x = lively(3), torch.randn(6, 6, 3, 5, dtype=torch.double)
    order = torch.tensor([2, 0, 1, 4, 5, 3])
    torch.testing.assert_close(module(x[order]), module(x), rtol=0, atol=1e-12)
    within = order.view(2, 3) - torch.tensor([[0], [3]])
    torch.testing.assert_close(
        module.attend(x[order]).crop, module.attend(x).crop.take_along_dim(within[..., None, None], 1)
    )
    assert not torch.allclose(module(x.roll(1, 0)), module(x))


def test_both_weights_together_sum_to_one_over_a_bag():
    module, x = lively(3), torch.randn(6, 6, 3, 5, dtype=torch.double)
    weights = module.attend(x)
    together = weights.crop * weights.region.unflatten(0, (2, 3))[:, :, 0]
    torch.testing.assert_close(together.sum((1, 2, 3)), torch.ones(2, dtype=torch.double))


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        HierarchicalAttentionPool(64, width=0)
    with pytest.raises(ValueError, match="crops must be positive, got 0"):
        HierarchicalAttentionPool(64, crops=0)
    with pytest.raises(ValueError, match="the batch must be whole bags of crops=3 images, got 4 images"):
        lively(3)(torch.randn(4, 6, 3, 5, dtype=torch.double))
