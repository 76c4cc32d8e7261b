import pytest
import torch

from benchmarks.measure import peak
from tests.attention.case import Case
from tests.attention.pairwise.loops import lively, multi_head, torch_s_own
from visattn import DilatedSelfAttention


def macs(c: int, h: int, w: int, rate: int) -> int:
    """Four projections, and dense attention on s² maps as large as the largest of them."""
    return 4 * h * w * c * c + 2 * rate**2 * (-(-h // rate) * -(-w // rate)) ** 2 * c


CASES = [
    Case(
        DilatedSelfAttention,
        options,
        lambda c: 4 * c * c + 4 * c,
        (16_640, 263_168),
        lambda c, h, w, rate=rate: macs(c, h, w, rate),
        sums_to_one=-1,
    )
    for options, rate in (({}, 2), ({"rate": 3, "heads": 1}, 3))
]
every_size = pytest.mark.parametrize("size", [(6, 4), (5, 7), (2, 9), (1, 1)])


@every_size
@pytest.mark.parametrize("rate", [1, 2, 3])
def test_equals_the_definition_in_loops(rate, size):
    module = lively(DilatedSelfAttention(8, rate=rate, heads=2))
    x = torch.randn(2, 8, *size, dtype=torch.double)

    def reaches(head: int, p: tuple[int, int], r: tuple[int, int]) -> bool:
        return (p[0] - r[0]) % rate == (p[1] - r[1]) % rate == 0

    with torch.no_grad():
        torch.testing.assert_close(module(x), multi_head(module, x, reaches), rtol=0, atol=1e-12)


@every_size
@pytest.mark.parametrize("rate", [2, 3])
def test_is_torch_s_attention_on_each_interlaced_map(rate, size):
    module, x = lively(DilatedSelfAttention(16, rate=rate)), torch.randn(2, 16, *size, dtype=torch.double)
    y, dense = module(x), torch_s_own(module)
    for i in range(min(rate, size[0])):
        for j in range(min(rate, size[1])):
            part = x[:, :, i::rate, j::rate]
            tokens = part.flatten(2).mT
            wanted = dense(tokens, tokens, tokens)[0].mT.view_as(part)
            torch.testing.assert_close(y[:, :, i::rate, j::rate], wanted, rtol=0, atol=1e-12)


def test_is_grid_attention_where_the_rate_divides_the_map():
    module, x = lively(DilatedSelfAttention(16, rate=3)), torch.randn(2, 16, 6, 12, dtype=torch.double)
    grid = x.view(2, 16, 2, 3, 4, 3).permute(0, 3, 5, 1, 2, 4).reshape(18, 16, 8).mT
    y = torch_s_own(module)(grid, grid, grid)[0].mT.view(2, 3, 3, 16, 2, 4).permute(0, 3, 4, 1, 5, 2)
    torch.testing.assert_close(module(x), y.reshape(x.shape), rtol=0, atol=1e-12)


def test_a_rate_beyond_the_map_leaves_each_position_to_itself():
    module, x = lively(DilatedSelfAttention(16, rate=9)), torch.randn(2, 16, 5, 7, dtype=torch.double)
    alone = module.out(module.value(x.movedim(1, -1))).movedim(-1, 1)
    torch.testing.assert_close(module(x.requires_grad_()), alone, rtol=0, atol=1e-12)
    module(x).sum().backward()
    assert x.grad.isfinite().all()


def test_does_not_tell_apart_the_rows_that_meet_but_those_that_do_not():
    module, x = lively(DilatedSelfAttention(16, rate=2)), torch.randn(2, 16, 5, 7, dtype=torch.double)
    for swapped, same in (([2, 1, 0, 3, 4], True), ([1, 0, 2, 3, 4], False)):
        assert torch.allclose(module(x[:, :, swapped]), module(x)[:, :, swapped], rtol=0, atol=1e-12) == same


def test_makes_no_matrix_of_all_pairs():
    module, x = DilatedSelfAttention(64, rate=4), torch.randn(1, 64, 48, 48, requires_grad=True)

    def train() -> None:
        module(x).sum().backward()

    assert peak(train) < 20 * x.nbytes < 4 * (48 * 48) ** 2


def test_refuses_a_rate_that_is_not_positive():
    with pytest.raises(ValueError, match="rate must be positive, got 0"):
        DilatedSelfAttention(64, rate=0)


def test_refuses_heads_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="heads must divide channels=64, got 3"):
        DilatedSelfAttention(64, heads=3)
