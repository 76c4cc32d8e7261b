import math

import pytest
import torch

from benchmarks.measure import peak
from tests.attention.case import Case
from tests.attention.pairwise.loops import lively, multi_head, torch_s_own
from visattn import LocalSelfAttention


def macs(c: int, h: int, w: int, window: int) -> int:
    """Four projections; blocks of up to window + 1 queries a side read the union of their windows; k² keys count."""
    pairs = 1
    for side in (h, w):
        block = side if side <= 2 * window else math.ceil(side / math.ceil(side / (window + 1)))
        pairs *= math.ceil(side / block) * block * min(side, block + window - 1)
    return 4 * h * w * c * c + 2 * pairs * c


CASES = [
    Case(
        LocalSelfAttention,
        options,
        lambda c: 4 * c * c + 4 * c,
        (16_640, 263_168),
        lambda c, h, w, window=window: macs(c, h, w, window),
        grid=(9, 11) if window == 7 else (5, 7),  # more than one block, or an exported graph is for one alone
        sums_to_one=-1,
    )
    for options, window in (({}, 7), ({"window": 3}, 3), ({"window": 3, "border": "mask"}, 3))
]
either_border = pytest.mark.parametrize("border", ["clamp", "mask"])


def first(at: int, length: int, window: int, border: str) -> int:
    """Where the window of a position starts."""
    start = at - window // 2
    return max(min(start, length - window), 0) if border == "clamp" else start


@either_border
@pytest.mark.parametrize(("window", "size"), [(3, (4, 6)), (3, (9, 2)), (5, (7, 3)), (1, (2, 3))])
def test_equals_the_definition_in_loops(border, window, size):
    module = lively(LocalSelfAttention(8, window=window, border=border, heads=2))
    x = torch.randn(2, 8, *size, dtype=torch.double)

    def reaches(head: int, p: tuple[int, int], r: tuple[int, int]) -> bool:
        starts = [first(at, side, window, border) for at, side in zip(p, size, strict=True)]
        return all(0 <= at - start < window for at, start in zip(r, starts, strict=True))

    with torch.no_grad():
        torch.testing.assert_close(module(x), multi_head(module, x, reaches), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("border", "counts"), [("clamp", (9, 9, 9)), ("mask", (4, 6, 9))])
def test_every_query_has_a_full_window_if_it_is_moved_inside(border, counts):
    reach = LocalSelfAttention(8, window=3, border=border, heads=2).reach(5, 7).sum(1).view(5, 7)
    assert (reach[0, 0], reach[0, 3], reach[2, 3]) == counts
    assert set(reach.unique().tolist()) == set(counts)


@either_border
@pytest.mark.parametrize("size", [(17, 23), (14, 9), (9, 31)])  # several blocks, the last one short; or one
def test_blocks_read_what_the_matrix_does(border, size):
    module = lively(LocalSelfAttention(16, border=border), 0.2)
    x = torch.randn(2, 16, *size, dtype=torch.double)
    torch.testing.assert_close(module(x), module.read(x, weights=module.attend(x)), rtol=0, atol=1e-12)


@either_border
def test_a_window_over_the_whole_map_is_torch_s_attention(border):
    module, x = lively(LocalSelfAttention(16, window=13, border=border)), torch.randn(2, 16, 5, 7, dtype=torch.double)
    tokens = x.flatten(2).mT
    dense, weights = torch_s_own(module)(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(module(x), dense.mT.view_as(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.attend(x), weights, rtol=0, atol=1e-12)


@either_border
def test_turns_with_the_map_and_does_not_shuffle_with_it(border):
    module, x = lively(LocalSelfAttention(16, window=3, border=border)), torch.randn(2, 16, 5, 7, dtype=torch.double)
    for turn in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.mT):
        torch.testing.assert_close(module(turn(x)), turn(module(x)), rtol=0, atol=1e-12)
    order = torch.randperm(5)
    assert not torch.allclose(module(x[:, :, order]), module(x)[:, :, order])


def test_moves_with_the_map_away_from_the_border():
    module, x = lively(LocalSelfAttention(16, window=3)), torch.randn(2, 16, 9, 11, dtype=torch.double)
    moved = module(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved[:, :, 2:-1, 3:-1], module(x)[:, :, 1:-2, 1:-3], rtol=0, atol=1e-12)


def test_sees_nothing_beyond_its_window():
    module, x = lively(LocalSelfAttention(16, window=5)), torch.randn(1, 16, 9, 11, dtype=torch.double)
    module(x.requires_grad_())[..., 4, 5].sum().backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    inside = torch.zeros(9, 11, dtype=torch.bool)
    inside[2:7, 3:8] = True
    assert torch.equal(seen, inside)


def test_makes_no_matrix_of_all_pairs():
    module, x = LocalSelfAttention(64), torch.randn(1, 64, 48, 48, requires_grad=True)  # one matrix a head: 20 MiB

    def train() -> None:
        module(x).sum().backward()

    assert peak(train) < 40 * x.nbytes < 4 * 4 * (48 * 48) ** 2


@pytest.mark.parametrize("window", [0, 4])
def test_refuses_a_window_without_a_centre(window):
    with pytest.raises(ValueError, match=f"window must be odd, got {window}"):
        LocalSelfAttention(64, window=window)


def test_refuses_an_unknown_border(unchecked):
    with pytest.raises(ValueError, match="border must be clamp or mask, got 'wrap'"):
        LocalSelfAttention(64, border="wrap")


@pytest.mark.parametrize("heads", [0, 5])
def test_refuses_heads_that_do_not_divide_the_channels(heads):
    with pytest.raises(ValueError, match=f"heads must divide channels=64, got {heads}"):
        LocalSelfAttention(64, heads=heads)
