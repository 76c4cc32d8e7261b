import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from tests.attention.pairwise.test_core import Largest
from visattn import AreaAttention
from visattn.attention.pairwise import core
from visattn.attention.pairwise.area import Areas, area_cover, area_sums

CASES = [
    Case(
        AreaAttention,
        {"heads": 8},
        lambda c: 4 * c * c,
        (16_384, 262_144),
        macs=lambda c, h, w: 4 * c * c * h * w + 2 * c * h * w * (3 * h - 3) * (3 * w - 3),
        small=8,
    ),
    Case(
        AreaAttention,
        {"key": "features", "heads": 4, "area": (2, 3)},
        lambda c: 4 * c * c + 5 * (c // 4) // 2 + 4 * (c // 4) ** 2 + 2 * c // 4,
        (17_480, 278_816),
        macs=lambda c, h, w: (
            4 * c * c * h * w
            + 6 * (c // 4) ** 2  # of each size
            + 4 * 3 * (c // 4) ** 2 * (areas := (2 * h - 1) * (3 * w - 3))
            + 2 * c * h * w * areas
        ),
        small=8,
    ),
]


def lively(channels: int = 8, heads: int = 2, **options: object) -> AreaAttention:
    """In double precision, with nothing small."""
    module = AreaAttention(channels, heads=heads, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def rectangles(h: int, w: int, area: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Ordered by height, by width, then row by row."""
    sizes = itertools.product(range(1, area[0] + 1), range(1, area[1] + 1))
    corners = ((a, b, i, j) for a, b in sizes for i in range(h - a + 1) for j in range(w - b + 1))
    return [(slice(i, i + a), slice(j, j + b)) for a, b, i, j in corners]


def paper(module: AreaAttention, x: Tensor, value_of: str = "sum") -> Tensor:
    """Section 3 of the paper within multi-head attention, in loops over heads, queries and rectangles."""
    y = torch.empty_like(x).flatten(2)
    areas, (h, w), d = module.areas, x.shape[2:], x.shape[1] // module.heads
    for b in range(x.shape[0]):
        read = []
        for head in range(module.heads):
            query, key, value = (
                torch.einsum("dc,chw->dhw", layer.weight[head * d : (head + 1) * d, :, 0], x[b])
                for layer in (module.query, module.key, module.value)
            )
            keys, values = [], []
            for rows, columns in rectangles(h, w, areas.area):
                items = key[:, rows, columns].flatten(1)
                mean = items.mean(1)
                if areas.hidden is not None:
                    deviation = ((items**2).mean(1) - mean**2).abs().add(1e-6).sqrt()
                    size = rows.stop - rows.start - 1, columns.stop - columns.start - 1
                    features = torch.cat((mean, deviation, areas.heights[size[0]], areas.widths[size[1]]))
                    mean = areas.out(areas.hidden(features).relu())
                keys.append(mean)
                part = value[:, rows, columns].flatten(1)
                values.append(part.sum(1) if value_of == "sum" else part.mean(1))
            logits = torch.stack([key @ query.flatten(1) for key in keys]) / d**0.5
            read.append(torch.stack(values, 1) @ logits.softmax(0))
        y[b] = module.out.weight[:, :, 0] @ torch.cat(read)
    return x + y.view_as(x)


@pytest.mark.parametrize("key", ["mean", "features"])
@pytest.mark.parametrize("area", [(3, 3), (1, 2), (2, 9)])
def test_equals_the_paper_in_loops(key, area):
    module, x = lively(key=key, area=area), torch.randn(2, 8, 3, 4, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-10)
        assert (module(x) - paper(module, x, "mean")).abs().max() > 0.1


@pytest.mark.parametrize("key", ["mean", "features"])
@pytest.mark.parametrize("size", [(5, 7), (1, 6), (2, 1)])
def test_reads_the_same_from_sums_of_areas(key, size, monkeypatch):
    for heads in (1, 16):
        module, x = AreaAttention(64, heads=heads, key=key).double(), torch.randn(2, 64, *size, dtype=torch.double)
        y = module(x)
        with monkeypatch.context() as patch:
            patch.setattr(core, "SMALL", 0)
            torch.testing.assert_close(module(x), y, rtol=0, atol=1e-11)


def test_costs_less_than_its_paper_says_where_heads_are_wide():
    def cost(heads: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            AreaAttention(64, heads=heads)(torch.randn(1, 64, 5, 7))
        return counter.get_total_flops() // 2

    layers, areas = 4 * 64 * 64 * 35, 12 * 18
    assert cost(1) == layers + 2 * 64 * 35 * 35
    assert cost(4) == cost(8) == layers + 2 * 64 * 35 * areas


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 9), (2, 1)])
@pytest.mark.parametrize("area", [(3, 3), (1, 4), (9, 1)])
def test_sums_every_rectangle_by_size_and_then_row_by_row(size, area):
    x = torch.randn(2, *size, dtype=torch.double)
    expected = torch.stack([x[:, rows, columns].sum((1, 2)) for rows, columns in rectangles(*size, area)], 1)
    torch.testing.assert_close(area_sums(x, area), expected, rtol=0, atol=1e-12)
    y = torch.randn_like(expected)
    torch.testing.assert_close((area_cover(y, size, area) * x).sum(), (expected * y).sum(), rtol=0, atol=1e-10)


def test_counts_the_areas_of_a_grid():
    assert area_sums(torch.ones(8, 8), (3, 3)).shape == (441,)
    assert Areas(4, area=(3, 3)).count((8, 8), torch.ones(())).sum() == sum(
        a * b * (9 - a) * (9 - b) for a in (1, 2, 3) for b in (1, 2, 3)
    )


def test_sums_of_halves_are_rounded_once():
    x = torch.full((16, 16), 1000.0).half() + torch.rand(16, 16).half()
    torch.testing.assert_close(area_sums(x, (5, 5)), area_sums(x.double(), (5, 5)).half(), rtol=0, atol=0)


def test_of_single_positions_is_plain_multi_head_attention():
    module, x = lively(area=(1, 1)), torch.randn(2, 8, 3, 5, dtype=torch.double)
    query, key, value = (
        layer(x.flatten(2)).unflatten(1, (2, -1)).mT for layer in (module.query, module.key, module.value)
    )
    y = F.scaled_dot_product_attention(query, key, value).mT.flatten(1, 2)
    torch.testing.assert_close(module(x), x + module.out(y).view_as(x), rtol=0, atol=1e-11)
    torch.testing.assert_close(module.attend(x).sum(3), torch.ones(2, 2, 15, dtype=torch.double))


def test_rows_sum_to_the_mean_area_that_is_read():
    module, x = lively(), torch.randn(2, 8, 3, 5, dtype=torch.double)
    query, key = (layer(x.flatten(2)).unflatten(1, (2, -1)).flatten(0, 1).mT for layer in (module.query, module.key))
    weights = module.areas.weights(query, module.areas.keys(key, (3, 5)), (3, 5))
    torch.testing.assert_close(weights.sum(2), torch.ones(4, 15, dtype=torch.double))
    size = (weights * module.areas.count((3, 5), x)).sum(2)
    torch.testing.assert_close(module.attend(x).sum(3).flatten(0, 1), size)


@pytest.mark.parametrize("key", ["mean", "features"])
def test_queries_read_a_memory_of_one_axis_and_are_drawn_on_it(key):
    areas = Areas(4, area=(1, 3), key=key).double()
    query, memory, value = (torch.randn(2, n, d, dtype=torch.double) for n, d in ((5, 4), (6, 4), (6, 3)))
    keys = areas.keys(memory, (1, 6))
    weights = areas.weights(query, keys, (1, 6))
    assert weights.shape == (2, 5, 6 + 5 + 4)
    values = torch.stack([value[:, columns].sum(1) for _, columns in rectangles(1, 6, (1, 3))], 1)
    torch.testing.assert_close(areas.read(query, keys, value, (1, 6)), weights @ values, rtol=0, atol=1e-11)
    shown = areas.to_positions(weights, (1, 6))
    torch.testing.assert_close(shown.sum(2), torch.ones(2, 5, dtype=torch.double))
    one = torch.zeros(1, 1, 15, dtype=torch.double)
    one[..., -1] = 1
    torch.testing.assert_close(areas.to_positions(one, (1, 6))[0, 0], torch.tensor([0, 0, 0, 1, 1, 1]).double() / 3)


def test_weights_move_with_what_the_map_holds():
    module, x = lively(), torch.zeros(1, 8, 9, 10, dtype=torch.double)
    x[:, :, 2:4, 2:5] = torch.randn(8, 2, 3)  # so far from the border that all areas with a part of it fit
    weights, moved = (module.attend(each).view(1, 2, 9, 10, 9, 10) for each in (x, x.roll((3, 3), (2, 3))))
    torch.testing.assert_close(moved[:, :, 5:7, 5:8, 5:7, 5:8], weights[:, :, 2:4, 2:5, 2:4, 2:5], rtol=0, atol=1e-11)
    assert (moved - weights).abs().max() > 0.01


def test_sees_what_is_beside_what_unless_areas_are_single_positions():
    x, order = torch.randn(2, 8, 4, 6, dtype=torch.double), torch.randperm(24)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    for area in ((1, 1), (2, 2)):
        module = lively(area=area)
        same = torch.allclose(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-10)
        assert same == (area == (1, 1))


def test_holds_no_matrix_where_the_map_is_large(monkeypatch):
    monkeypatch.setattr(core, "SMALL", 0)  # nor of this one then
    module, x = AreaAttention(8, heads=1), torch.randn(1, 8, 20, 30, requires_grad=True)
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.elements <= 8 * 9 * 20 * 30  # the matrix of areas has 9 * 20 * 30 * 20 * 30


@pytest.mark.parametrize("heads", [0, 3])
def test_refuses_heads_that_do_not_divide_the_channels(heads):
    with pytest.raises(ValueError, match=f"heads must divide channels=64, got {heads}"):
        AreaAttention(64, heads=heads)


def test_refuses_an_area_of_nothing():
    with pytest.raises(ValueError, match=r"area must be a positive height and width, got \(0, 3\)"):
        AreaAttention(64, area=(0, 3))


def test_refuses_an_unknown_key(unchecked):
    with pytest.raises(ValueError, match="key must be mean or features, got 'max'"):
        AreaAttention(64, key="max")
