import itertools
import math

import pytest
import torch
from timm.layers import apply_rot_embed_cat, build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.layers.halo_attn import PosEmbedRel
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from visattn.attention.pairwise import core, positions
from visattn.attention.pairwise.positions import (
    LearnedPositions,
    RelativeSoftmax,
    both,
    near,
    relative_logits,
    rotate,
    sinusoid,
    sinusoid_2d,
    widen,
)

LAYOUTS = ["interleaved", "timm", "mae", "detr"]


def wave(p: float, i: int, features: int, steps: int | None = None) -> tuple[float, float]:
    """Sine and cosine of pair i at position p."""
    angle = p / 10_000 ** (i / (features // 2 if steps is None else steps))
    return math.sin(angle), math.cos(angle)


@pytest.mark.parametrize("layout", ["interleaved", "concatenated", "tensor2tensor"])
def test_sinusoid_is_that_of_the_paper(layout):
    ours = sinusoid(torch.arange(9.0).double(), 12, layout=layout)
    for p in range(9):
        waves = [wave(p, i, 12, 5 if layout == "tensor2tensor" else None) for i in range(6)]
        theirs = [x for pair in waves for x in pair] if layout == "interleaved" else [*zip(*waves, strict=True)]
        torch.testing.assert_close(ours[p], torch.tensor(theirs, dtype=torch.double).flatten(), rtol=0, atol=1e-12)


def test_sinusoids_of_the_two_orders_without_interleaving_are_not_the_same():
    p = torch.arange(9.0)
    plain, released = (sinusoid(p, 12, layout=layout) for layout in ("concatenated", "tensor2tensor"))
    assert torch.equal(plain[:, [0, 6]], released[:, [0, 6]])
    assert (plain - released).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["interleaved", "concatenated", "tensor2tensor"])
def test_products_of_sinusoids_depend_on_the_distance_alone(layout):
    table = sinusoid(torch.arange(20.0).double(), 16, layout=layout)
    products = table @ table.mT
    for distance in range(20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    torch.testing.assert_close(products.diagonal(), torch.full((20,), 8.0).double())


def test_a_sinusoid_of_two_features_is_one_wave():
    ours = sinusoid(torch.arange(3.0), 2, layout="tensor2tensor")
    assert torch.equal(ours, torch.stack((torch.arange(3.0).sin(), torch.arange(3.0).cos()), 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinusoid_2d_is_that_of_its_code(layout):
    h, w, c = 3, 5, 16
    ours = sinusoid_2d(h, w, c, layout=layout, dtype=torch.double)
    for y, x in itertools.product(range(h), range(w)):
        q, p = (2 * math.pi * (y + 1) / (h + 1e-6), 2 * math.pi * (x + 1) / (w + 1e-6)) if layout == "detr" else (y, x)
        row, column = ([wave(each, i, c // 2) for i in range(c // 4)] for each in (q, p))
        sines, cosines = zip(*row, strict=True)
        sines_x, cosines_x = zip(*column, strict=True)
        theirs = {
            "interleaved": [v for pair in (*row, *column) for v in pair],
            "detr": [v for pair in (*row, *column) for v in pair],
            "timm": [*sines, *sines_x, *cosines, *cosines_x],
            "mae": [*sines_x, *cosines_x, *sines, *cosines],
        }[layout]
        torch.testing.assert_close(ours[:, y, x], torch.tensor(theirs, dtype=torch.double), rtol=0, atol=1e-12)


def test_sinusoid_2d_equals_timm():
    torch.testing.assert_close(sinusoid_2d(3, 5, 16, layout="timm").flatten(1).mT, build_sincos2d_pos_embed([3, 5], 16))
    theirs = build_sincos2d_pos_embed([3, 5], 16, reverse_coord=True, interleave_sin_cos=True).view(5, 3, 16)
    torch.testing.assert_close(sinusoid_2d(3, 5, 16, layout="mae"), theirs.permute(2, 1, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_place_has_a_sinusoid_of_the_same_length_and_no_two_the_same(layout):
    table = sinusoid_2d(5, 7, 32, layout=layout, dtype=torch.double).flatten(1)
    torch.testing.assert_close(table.square().sum(0), torch.full((35,), 16.0).double())
    assert (torch.cdist(table.mT, table.mT) + torch.eye(35)).min() > 0.1


def test_transposing_the_map_swaps_the_halves_of_its_sinusoid():
    ours, turned = sinusoid_2d(5, 7, 16), sinusoid_2d(7, 5, 16)
    assert torch.equal(turned.mT, ours.roll(8, 0))
    assert not torch.equal(turned.mT, ours)


def test_sinusoid_2d_in_half_precision_is_the_exact_one_rounded():
    assert torch.equal(sinusoid_2d(40, 40, 16, dtype=torch.bfloat16), sinusoid_2d(40, 40, 16).bfloat16())


def test_refuses_layouts_and_widths_that_do_not_exist(unchecked):
    with pytest.raises(ValueError, match="features must be even, got 7"):
        sinusoid(torch.arange(3.0), 7)
    with pytest.raises(ValueError, match="layout must be interleaved, concatenated or tensor2tensor, got 'mixed'"):
        sinusoid(torch.arange(3.0), 8, layout="mixed")
    with pytest.raises(ValueError, match="channels must be divisible by 4, got 6"):
        sinusoid_2d(3, 5, 6)
    with pytest.raises(ValueError, match="layout must be interleaved, timm, mae or detr, got 'mixed'"):
        sinusoid_2d(3, 5, 8, layout="mixed")
    with pytest.raises(ValueError, match="features must be divisible by 4, got 6"):
        rotate(torch.randn(3, 5, 6))


def test_learned_positions_are_the_table_at_its_size_and_resized_elsewhere():
    module = LearnedPositions(8, (14, 14))
    assert module(14, 14) is module.table
    tokens = module.table.flatten(1).mT[None]
    theirs = resample_abs_pos_embed(tokens, [7, 10], [14, 14], num_prefix_tokens=0)[0].mT.unflatten(1, (7, 10))
    torch.testing.assert_close(module(7, 10), theirs)
    plain = F.interpolate(module.table[None], (7, 10), mode="bicubic")[0]
    assert (module(7, 10) - plain).abs().max() > 1e-3  # which aliases
    assert module.bfloat16()(7, 10).dtype == torch.bfloat16


def by_gathering(query: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Relative logits with a vector for every pair of positions."""
    kh, kw = (len(rows) + 1) // 2, (len(columns) + 1) // 2
    logits = torch.empty(*query.shape[:-1], kh, kw, dtype=query.dtype)
    for y, x, i, j in itertools.product(*map(range, (*query.shape[-3:-1], kh, kw))):
        logits[..., y, x, i, j] = query[..., y, x, :] @ (rows[i - y + kh - 1] + columns[j - x + kw - 1])
    return logits.flatten(-2).flatten(-3, -2)


@pytest.mark.parametrize("keys", [(3, 5), (4, 5), (6, 9)])
def test_relative_logits_are_those_of_the_distances(keys):
    query = torch.randn(2, 3, 3, 5, 4).double()
    rows, columns = (torch.randn(2 * side - 1, 4).double() for side in keys)
    down, across = relative_logits(query, rows, columns)
    assert down.shape == (2, 3, 3, 5, keys[0])
    assert across.shape == (2, 3, 3, 5, keys[1])
    torch.testing.assert_close(both(down, across), by_gathering(query, rows, columns), rtol=0, atol=1e-12)


def test_relative_logits_of_equal_distances_are_equal():
    query = torch.randn(4).expand(5, 7, 4)
    logits = both(*relative_logits(query, torch.randn(9, 4), torch.randn(13, 4))).view(5, 7, 5, 7)
    torch.testing.assert_close(logits[1:, 1:, 1:, 1:], logits[:-1, :-1, :-1, :-1])
    assert not torch.allclose(logits[1:, 1:, 1:, 1:], logits[:-1, :-1, 1:, 1:])


def test_relative_logits_of_windows_equal_those_of_timm():
    theirs = PosEmbedRel(4, 10, dim_head=8, scale=1.0)
    query = torch.randn(6, 5, 16, 8)
    down, across = relative_logits(query.unflatten(2, (4, 4)), theirs.height_rel, theirs.width_rel)
    torch.testing.assert_close(both(down, across), theirs(query))


def test_refuses_more_queries_than_keys():
    with pytest.raises(ValueError, match="queries must be at most as many as the 3 keys of the table on a line, got 4"):
        near(torch.randn(5, 2), 4)


def test_wider_queries_and_keys_have_the_products_and_the_positions_in_them():
    query, key = torch.randn(2, 3, 15, 4).double(), torch.randn(2, 3, 54, 4).double()
    parts = relative_logits(query.unflatten(2, (3, 5)), torch.randn(11, 4).double(), torch.randn(17, 4).double())
    wide_query, wide_key = widen(query, key, *parts)
    torch.testing.assert_close(wide_query @ wide_key.mT, query @ key.mT + both(*parts), rtol=0, atol=1e-12)


def lively(scale_positions: bool = True, causal: bool = False) -> RelativeSoftmax:
    module = RelativeSoftmax(4, (3, 5), scale_positions=scale_positions, causal=causal).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("scale_positions", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_relative_softmax_is_that_of_the_sum_of_logits(scale_positions, causal):
    module, query, key = lively(scale_positions, causal), torch.randn(6, 15, 4).double(), torch.randn(6, 15, 4).double()
    positions = by_gathering(query.unflatten(1, (3, 5)), module.rows, module.columns)
    logits = query @ key.mT / 2 + (positions / 2 if scale_positions else positions)
    if causal:
        logits = logits.masked_fill(torch.ones(15, 15, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(module.weights(query, key), logits.softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", [3, 40])
def test_relative_softmax_reads_the_same_without_the_matrix(monkeypatch, causal, features):
    module = lively(causal=causal)
    inputs = [torch.randn(6, 15, d).double().requires_grad_() for d in (4, 4, features)]
    results = []
    for threshold in (core.SMALL, 0):
        for where in (core, positions):
            monkeypatch.setattr(where, "SMALL", threshold)
        y = module.read(*inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), [*inputs, *module.parameters()])))
    for with_matrix, without in zip(*results, strict=True):
        torch.testing.assert_close(with_matrix, without, rtol=0, atol=1e-10)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        made = output if isinstance(output, (list, tuple)) else [output]
        self.elements = max([self.elements, *(each.numel() for each in made if isinstance(each, Tensor))])
        return output


def test_relative_softmax_makes_no_matrix_of_all_pairs_on_a_large_map(monkeypatch):
    module, inputs = RelativeSoftmax(16, (32, 32)), [torch.randn(1, 1024, 16) for _ in range(3)]
    for where in (core, positions):
        monkeypatch.setattr(where, "SMALL", 0)
    with Largest() as made:
        module.read(*inputs)
    assert made.elements < 1024**2 / 8
    with Largest() as made:
        module.weights(*inputs[:2])
    assert made.elements == 1024**2


def test_rotation_turns_pairs_by_row_and_by_column():
    x = torch.randn(2, 3, 5, 8).double()
    ours, theirs = rotate(x), torch.empty_like(x)
    for y, column, i in itertools.product(range(3), range(5), range(4)):
        angle = (y if i < 2 else column) * 100 ** (-(i % 2) / 2)
        cos, sin = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.double)
        theirs[:, y, column, 2 * i : 2 * i + 2] = x[:, y, column, 2 * i : 2 * i + 2] @ turn.mT
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_rotation_equals_timm():
    x, theirs = torch.randn(2, 3, 35, 16), RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[5, 7])
    ours = rotate(x.unflatten(2, (5, 7)), temperature=10_000.0).flatten(2, 3)
    torch.testing.assert_close(ours, apply_rot_embed_cat(x, theirs.get_embed()))


def test_products_of_what_is_rotated_depend_on_the_distance_alone():
    query, key = (rotate(torch.randn(8).double().expand(5, 7, 8)).flatten(0, 1) for _ in range(2))
    products = (query @ key.mT).view(5, 7, 5, 7)
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], rtol=0, atol=1e-12)
    assert not torch.allclose(products[1:, 1:, 1:, 1:], products[:-1, :-1, 1:, 1:])
    torch.testing.assert_close(query.norm(dim=1), query[:1].norm().expand(35), rtol=0, atol=1e-12)


def test_rotation_in_half_precision_keeps_the_type():
    assert rotate(torch.randn(3, 5, 8).bfloat16()).dtype == torch.bfloat16
