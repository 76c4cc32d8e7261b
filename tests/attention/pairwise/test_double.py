import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from tests.attention.pairwise.test_core import Largest
from visattn import DoubleAttention

CASES = [
    Case(
        DoubleAttention,
        {},
        lambda c: c * c + 7 * c // 4,
        (4208, 65_984),
        macs=lambda c, h, w: h * w * (c * c // 2 + 2 * c * c // 4 + 2 * c * c // 16),
        sums_to_one=[(2, 3), 1],
    ),
    Case(
        DoubleAttention,
        {"maps": 5},
        lambda c: c * c // 2 + c // 4 + c + 2 * 5 * (c + 1),
        (2778, 35_658),
        macs=lambda c, h, w: 4 * 5 * c * h * w + 2 * 5 * c * c // 4,  # less than the paper's order of sums takes
        sums_to_one=[(2, 3), 1],
    ),
]


def lively(channels: int = 8, **options: int) -> DoubleAttention:
    """In double precision, with nothing small."""
    module = DoubleAttention(channels, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: DoubleAttention, x: Tensor) -> Tensor:
    """Section 3 of the paper, in loops: gather, distribute, and one layer back to the width of the map."""
    x, size = x.flatten(2), x.shape[2:]
    y, at = torch.empty_like(x), range(x.shape[2])
    maps = range(module.gather.out_channels)
    for b in range(x.shape[0]):
        a = {i: module.value(x[b, :, i]) for i in at}
        bs, v = (
            {i: torch.exp(layer.weight[:, :, 0, 0] @ x[b, :, i] + layer.bias) for i in at}
            for layer in (module.gather, module.distribute)
        )
        g = [sum(bs[i][k] / sum(bs[j][k] for j in at) * a[i] for i in at) for k in maps]
        for i in at:
            z = sum(v[i][k] / v[i].sum() * g[k] for k in maps)
            y[b, :, i] = x[b, :, i] + module.out(z)
    return y.unflatten(2, size)


@pytest.mark.parametrize("options", [{}, {"maps": 3}, {"reduction": 2, "maps": 1}], ids=str)
@pytest.mark.parametrize("size", [(2, 3), (3, 5)], ids=["values first", "sums first"])
def test_equals_the_paper_in_loops(options, size):
    module, x = lively(**options), torch.randn(2, 8, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-10)


def test_implies_a_matrix_whose_rows_sum_to_one_and_reads_by_it():
    module, x = lively(), torch.randn(2, 8, 3, 5, dtype=torch.double)
    weights = module.attend(x)
    matrix = weights.distribute.flatten(2).mT @ weights.gather.flatten(2)
    torch.testing.assert_close(matrix.sum(2), torch.ones(2, 15, dtype=torch.double))
    y = module.out(matrix @ module.value(x.flatten(2).mT)).mT.view_as(x)
    torch.testing.assert_close(module(x), x + y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(2, 3), (3, 5)], ids=["values first", "sums first"])
def test_reads_weights_that_sum_to_something_else(size):
    module, x = lively(), torch.randn(2, 8, *size, dtype=torch.double)
    weights = type(module.attend(x))(*torch.randn(2, 2, 2, *size, dtype=torch.double))
    matrix = weights.distribute.flatten(2).mT @ weights.gather.flatten(2)
    y = module.out(matrix @ module.value(x.flatten(2).mT)).mT.view_as(x)
    torch.testing.assert_close(module.read(x, weights=weights), x + y, rtol=0, atol=1e-11)


def test_values_that_are_the_same_everywhere_are_read_everywhere():
    module, x = lively(), torch.randn(2, 8, 3, 5, dtype=torch.double)
    nn.init.zeros_(module.value.weight)
    same = module.out(module.value.bias)[:, None, None]
    torch.testing.assert_close(module(x), x + same, rtol=0, atol=1e-11)


def test_one_descriptor_is_read_by_all_alike_and_two_are_not():
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    for maps in (1, 2):
        delta = lively(maps=maps)(x) - x
        assert torch.allclose(delta, delta[:, :, :1, :1].expand_as(delta)) == (maps == 1)


def test_does_not_see_where_things_are_but_does_see_the_order_of_channels():
    module, x = lively(), torch.randn(2, 8, 4, 6, dtype=torch.double)
    order, channels = torch.randperm(24), torch.randperm(8)
    shuffled = module(x.flatten(2)[..., order].view_as(x)).flatten(2)
    torch.testing.assert_close(shuffled, module(x).flatten(2)[..., order], rtol=0, atol=1e-11)
    assert (module(x[:, channels]) - module(x)[:, channels]).abs().max() > 0.1


def test_costs_less_than_its_paper_says_on_a_large_map():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        DoubleAttention(64)(torch.randn(1, 64, 16, 24))
    assert counter.get_total_flops() == 2 * (64 * 64 * 16 * 24 + 64**3 // 8) < 2 * 9 * 64 * 64 * 16 * 24 // 8


def test_makes_nothing_larger_than_the_map():
    module, x = DoubleAttention(16), torch.randn(1, 16, 40, 50, requires_grad=True)
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.elements == x.numel()


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        DoubleAttention(64, reduction=reduction)


def test_refuses_to_gather_nothing():
    with pytest.raises(ValueError, match="maps must be positive, got 0"):
        DoubleAttention(64, maps=0)
