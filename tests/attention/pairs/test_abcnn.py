import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import MatchingAttention, MatchingPool
from visattn.attention.pairs.abcnn import match

CASES = [
    Case(
        MatchingAttention,
        {"size": (5, 7)},
        lambda c: 35 * c,
        (2240, 8960),
        macs=lambda c, h, w: 3 * (h * w) ** 2 * c,  # the distances, and a plane for each map
        inputs=2,
    ),
    Case(
        MatchingAttention,
        {"size": (5, 7), "shared": False},
        lambda c: 2 * 35 * c,
        (4480, 17_920),
        macs=lambda c, h, w: 3 * (h * w) ** 2 * c,
        inputs=2,
    ),
    Case(
        MatchingAttention,
        {"values": "map"},
        lambda c: 0,
        (0, 0),
        macs=lambda c, h, w: 3 * (h * w) ** 2 * c,
        inputs=2,
    ),
    *(
        Case(
            MatchingPool,
            {"padding": 1, **options},
            lambda c: 0,
            (0, 0),
            macs=lambda c, h, w: (h * w) ** 2 * c,
            inputs=2,
        )
        for options in ({}, {"normalized": True})
    ),
]


def maps(*sizes: tuple[int, int], channels: int = 4) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, channels, *size, dtype=torch.double) for size in sizes)


def places(x: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]


def paper(x: Tensor, y: Tensor) -> Tensor:
    """The match matrix of section 4.1, in loops."""
    a = x.new_empty(len(x), len(places(x)), len(places(y)))
    for b in range(len(x)):
        for i, (p, q) in enumerate(places(x)):
            for j, (r, s) in enumerate(places(y)):
                square = sum((x[b, c, p, q] - y[b, c, r, s]) ** 2 for c in range(x.shape[1]))
                a[b, i, j] = 1 / (1 + math.sqrt(square))
    return a


EITHER = [MatchingAttention(4, values="map"), MatchingPool(4)]
either = pytest.mark.parametrize("module", EITHER, ids=lambda module: type(module).__name__)


@either
def test_weights_equal_the_paper_in_loops(module):
    x, y = maps((3, 5), (4, 2))
    torch.testing.assert_close(module.attend(x, y), paper(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_planes_equal_the_paper_in_loops(shared):
    module = MatchingAttention(4, size=(3, 5), shared=shared).double()
    x, y = maps((3, 5), (3, 5))
    a, planes = paper(x, y), (torch.zeros_like(x), torch.zeros_like(y))
    ours, theirs = module.values[0], module.values[0 if shared else 1]
    for b in range(2):
        for i, (p, q) in enumerate(places(x)):
            for j, (r, s) in enumerate(places(y)):
                planes[0][b, :, p, q] += a[b, i, j] * ours[:, j].detach()
                planes[1][b, :, r, s] += a[b, i, j] * theirs[:, i].detach()
    for one, other in zip(module(x, y), planes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_planes_of_the_other_map_are_means_of_what_matches():
    x, y = maps((3, 5), (4, 2))
    a, planes = paper(x, y), (torch.zeros_like(x), torch.zeros_like(y))
    for b in range(2):
        for i, (p, q) in enumerate(places(x)):
            for j, (r, s) in enumerate(places(y)):
                planes[0][b, :, p, q] += a[b, i, j] / sum(a[b, i, k] for k in range(8)) * y[b, :, r, s]
                planes[1][b, :, r, s] += a[b, i, j] / sum(a[b, k, j] for k in range(15)) * x[b, :, p, q]
    for one, other in zip(MatchingAttention(4, values="map")(x, y), planes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 1])
def test_windows_equal_the_paper_in_loops(padding):
    x, y = maps((5, 6), (4, 3))
    a = paper(x, y)
    for one, each, strength in zip(MatchingPool(4, padding=padding)(x, y), (x, y), (a.sum(2), a.sum(1)), strict=True):
        h, w = (side + 2 * padding - 2 for side in each.shape[2:])
        expected = each.new_zeros(2, 4, h, w)
        for b in range(2):
            for i, j in places(expected):
                for p, q in places(each):
                    if 0 <= p + padding - i < 3 and 0 <= q + padding - j < 3:
                        expected[b, :, i, j] += strength[b, p * each.shape[3] + q] * each[b, :, p, q]
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)


def test_a_match_is_whole_where_columns_are_equal_and_nowhere_else():
    x, _ = maps((3, 5), (3, 5))
    y = x.flip(3)
    a = match(x.flatten(2), y.flatten(2))
    assert a.gt(0).all()
    mirrored = torch.arange(15).view(3, 5).flip(1).flatten()
    assert torch.equal(a == 1, torch.nn.functional.one_hot(mirrored).bool().expand_as(a))


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 64, 2048])
def test_an_image_matches_itself_in_every_precision_and_has_a_gradient(channels, dtype):
    x = (torch.randn(2, channels, 4, 6) * 3 + 5).to(dtype).requires_grad_()
    a = MatchingPool(channels).attend(x, x)
    assert a.diagonal(dim1=1, dim2=2).eq(1).all()
    a.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_single_precision_loses_no_more_than_rounding_a_square_does():
    x, y = maps((6, 6), (6, 6), channels=50)
    y = x + 0.05 * y  # near, where the product loses most
    exact, ours = (match(each.flatten(2), other.flatten(2)) for each, other in ((x, y), (x.float(), y.float())))
    squares = x.square().flatten(2).sum(1)[:, :, None] + y.square().flatten(2).sum(1)[:, None]
    rounding = 4 * torch.finfo(torch.float).eps * squares
    assert ((ours - exact).abs() <= rounding * exact**2 / (2 * (1 / exact - 1))).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_matches():
    x, y = (each.flatten(2).float() for each in maps((6, 6), (5, 4), channels=50))
    torch.testing.assert_close(match(x.cuda(), y.cuda()).cpu(), match(x, y))


@pytest.mark.parametrize(
    "module", [MatchingAttention(4, size=(3, 5)), *EITHER, MatchingPool(4, normalized=True)], ids=str
)
def test_both_maps_are_treated_alike(module):
    x, y = maps((3, 5), (3, 5))
    module = module.double()
    torch.testing.assert_close(module.attend(y, x), module.attend(x, y).mT, rtol=0, atol=1e-12)
    for one, other in zip(module(y, x), module(x, y)[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_vectors_of_its_own_for_each_map_tell_them_apart():
    module, (x, y) = MatchingAttention(4, size=(3, 5), shared=False).double(), maps((3, 5), (3, 5))
    assert not torch.allclose(module(y, x)[0], module(x, y)[1], atol=1e-3)


def test_learned_vectors_know_where_things_are_and_features_of_the_other_map_do_not():
    (x, y), order = maps((3, 5), (3, 5)), torch.randperm(15)
    shuffled = y.flatten(2)[..., order].view_as(y)
    free, tied = MatchingAttention(4, values="map"), MatchingAttention(4, size=(3, 5)).double()
    torch.testing.assert_close(free(x, shuffled)[0], free(x, y)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(tied(x, shuffled)[0], tied(x, y)[0], atol=1e-3)


def test_where_all_matches_alike_it_is_average_pooling_times_a_known_number():
    x, y = maps((5, 6), (4, 3))
    weights = torch.full((2, 30, 12), 0.25, dtype=torch.double)
    plain = MatchingPool(4).read(x, y, weights=weights)
    for pooled, each, total in zip(plain, (x, y), (0.25 * 12, 0.25 * 30), strict=True):
        torch.testing.assert_close(pooled, 9 * total * F.avg_pool2d(each, 3, 1), rtol=0, atol=1e-12)
    for pooled, each in zip(MatchingPool(4, normalized=True).read(x, y, weights=weights), (x, y), strict=True):
        torch.testing.assert_close(pooled, F.avg_pool2d(each, 3, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 3), (3, 4)])
def test_refuses_maps_of_another_size(size):
    module, (x, y) = MatchingAttention(4, size=(3, 5)).double(), maps((3, 5), size)
    with pytest.raises(ValueError, match=r"size must be \(3, 5\), as given, got \({}, {}\)".format(*size)):
        module(x, y)


def test_refuses_unknown_values(unchecked):
    with pytest.raises(ValueError, match="values must be learned or map, got 'other'"):
        MatchingAttention(4, values="other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be positive, got 0"),
        ({"padding": 2}, "padding must lie between 0 and half of kernel_size=3, got 2"),
        ({"padding": -1}, "padding must lie between 0 and half of kernel_size=3, got -1"),
    ],
)
def test_refuses_windows_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MatchingPool(4, **options)


def test_refuses_maps_smaller_than_a_window():
    with pytest.raises(ValueError, match=r"maps must be at least 3 high and wide, got \(5, 2\)"):
        MatchingPool(4)(*maps((5, 2), (5, 5)))
