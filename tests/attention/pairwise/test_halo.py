import math

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor

from tests.attention.case import Case
from tests.attention.pairwise.loops import lively
from visattn import HaloAttention


def macs(c: int, h: int, w: int, block: int, halo: int) -> int:
    """Three projections, two of them of the zeros beyond the border too; the last blocks count in full."""
    queries, keys = math.prod(-(-side // block) * block for side in (h, w)), block + 2 * halo
    return (3 * h * w + 2) * c * c + 2 * queries * keys * keys * c + 2 * queries * keys * c


CASES = [
    Case(
        HaloAttention,
        options,
        lambda c, keys=block + 2 * halo: 3 * c * c + 2 * (2 * keys - 1) * c // 8,
        golden,
        lambda c, h, w, block=block, halo=halo: macs(c, h, w, block, halo),
        grid=(9, 11) if block > 4 else (5, 7),  # more than one block, or an exported graph is for one alone
        sums_to_one=-1 if options.get("border") == "mask" else None,
    )
    for options, block, halo, golden in (
        ({"block": 7}, 7, 3, (12_688, 198_208)),
        ({"block": 3, "halo": 1, "border": "mask"}, 3, 1, (12_432, 197_184)),
    )
]
either_border = pytest.mark.parametrize("border", ["zero", "mask"])


def paper(module: HaloAttention, x: Tensor, block: int, halo: int, border: str, scale_positions: bool) -> Tensor:
    """Section 2.2 of the paper, in loops; a key that is a halo beyond the border is zero, one farther off is none."""
    heads, out, (b, _, h, w) = module.heads, module.query.out_features, x.shape
    width, window = out // heads, block + 2 * halo
    ring = halo if border == "zero" else 0
    y = torch.zeros(b, out, h, w, dtype=x.dtype)
    for sample in range(b):
        for i in range(h):
            for j in range(w):
                top, left = i // block * block - halo, j // block * block - halo
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    q = module.query.weight[part] @ x[sample, :, i, j]
                    e, values = [], []
                    for p in range(top, top + window):
                        for r in range(left, left + window):
                            if not (-ring <= p < h + ring and -ring <= r < w + ring):
                                continue
                            inside = 0 <= p < h and 0 <= r < w
                            at = x[sample, :, p, r] if inside else torch.zeros(x.shape[1], dtype=x.dtype)
                            dy, dx = p - top - i % block + window - 1, r - left - j % block + window - 1
                            near = q @ (module.rows[dy] + module.columns[dx])
                            near = near / math.sqrt(width) if scale_positions else near
                            e.append(math.exp(q @ (module.key.weight[part] @ at) / math.sqrt(width) + near))
                            values.append(module.value.weight[part] @ at)
                    y[sample, part, i, j] = sum(weight * value for weight, value in zip(e, values, strict=True)) / sum(
                        e
                    )
    return y


@either_border
@pytest.mark.parametrize("scale_positions", [True, False])
@pytest.mark.parametrize(("block", "halo", "size"), [(2, 1, (4, 6)), (3, 1, (4, 5)), (2, 2, (5, 1)), (8, 1, (2, 3))])
def test_equals_the_paper_in_loops(border, scale_positions, block, halo, size):
    options = {"block": block, "halo": halo, "border": border, "scale_positions": scale_positions}
    module = lively(HaloAttention(8, heads=2, **options), 0.4)
    x = torch.randn(1, 8, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, **options), rtol=0, atol=1e-12)


def like(theirs: HaloAttn, **options) -> HaloAttention:
    """Ours with the weights of timm's, whose keys and values alternate head by head."""
    heads, channels = theirs.num_heads, theirs.q.in_channels
    ours = HaloAttention(
        channels, block=theirs.block_size, halo=theirs.halo_size, heads=heads, out_channels=theirs.dim_out_v, **options
    ).double()
    key, value = theirs.kv.weight[:, :, 0, 0].unflatten(0, (heads, 2, -1)).unbind(1)
    with torch.no_grad():
        ours.query.weight.copy_(theirs.q.weight[:, :, 0, 0])
        ours.key.weight.copy_(key.flatten(0, 1))
        ours.value.weight.copy_(value.flatten(0, 1))
        ours.rows.copy_(theirs.pos_embed.height_rel)
        ours.columns.copy_(theirs.pos_embed.width_rel)
    return ours


@pytest.mark.parametrize("scale_positions", [True, False])
@pytest.mark.parametrize(
    ("block", "halo", "size", "out"), [(4, 3, (8, 12), 32), (7, 3, (7, 14), 32), (4, 1, (8, 4), 64)]
)
def test_equals_timm_where_blocks_divide_the_map(scale_positions, block, halo, size, out):
    options = {"block_size": block, "halo_size": halo, "scale_pos_embed": scale_positions}
    theirs = HaloAttn(32, out, num_heads=4, **options).double()
    x = torch.randn(2, 32, *size, dtype=torch.double)
    with torch.no_grad():
        for table in (theirs.pos_embed.height_rel, theirs.pos_embed.width_rel):
            table.normal_()
        ours = like(theirs, scale_positions=scale_positions)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.read(x, weights=ours.attend(x)), theirs(x), rtol=0, atol=1e-12)
        assert not torch.allclose(like(theirs, scale_positions=not scale_positions)(x), theirs(x), atol=1e-3)


def test_equals_timm_with_a_stride():
    theirs = HaloAttn(32, num_heads=4, block_size=4, halo_size=1, stride=2, avg_down=True).double()
    x = torch.randn(2, 32, 8, 12, dtype=torch.double)
    torch.testing.assert_close(like(theirs, scale_positions=False, stride=2)(x), theirs(x), rtol=0, atol=1e-12)


def test_gradients_reach_the_corners_as_under_an_inverted_mask_they_do_not():
    module = lively(HaloAttention(16, block=2, halo=1, border="mask"))
    x = torch.randn(1, 16, 6, 6, dtype=torch.double, requires_grad=True)
    weights = module.attend(x)
    module(x)[..., :2, :2].square().sum().backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    assert seen[:3, :3].all()
    assert seen.sum() == 9
    assert weights[0, 0, 14].unique().numel() > 10  # no uniform weights inside


def test_blocks_that_do_not_divide_the_map_are_as_if_it_ended_there():
    module, x = lively(HaloAttention(16, block=4, halo=1, border="mask")), torch.randn(1, 16, 6, 7).double()
    wide = torch.cat((x, torch.full((1, 16, 6, 1), 1e3).double()), 3)
    torch.testing.assert_close(module(x)[..., :3], module(wide)[..., :3], rtol=0, atol=1e-12)  # the first blocks
    total = module.attend(x).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_is_bottleneck_attention_in_one_block_with_its_whole_halo_masked():
    module, x = lively(HaloAttention(16, block=6, halo=2, border="mask")), torch.randn(2, 16, 6, 6).double()
    query, key, value = (
        layer(x.movedim(1, -1)).unflatten(3, (8, -1)).permute(0, 3, 1, 2, 4)
        for layer in (module.query, module.key, module.value)
    )
    at = torch.arange(6)
    rows, columns = (table[at - at[:, None] + 2 + 9] for table in (module.rows, module.columns))  # the halo is 2 off
    logits = torch.einsum("bayxd,bapqd->bayxpq", query, key) + (
        torch.einsum("bayxd,ypd->bayxp", query, rows)[..., None]
        + torch.einsum("bayxd,xqd->bayxq", query, columns)[..., None, :]
    )
    weights = (logits.flatten(4) / math.sqrt(2)).softmax(-1).flatten(2, 3)
    y = (weights @ value.flatten(2, 3)).mT.reshape(x.shape)
    torch.testing.assert_close(module(x), y, rtol=0, atol=1e-12)


def test_moves_by_whole_blocks_and_by_no_less():
    module, x = lively(HaloAttention(16, block=2, halo=1)), torch.randn(2, 16, 12, 12, dtype=torch.double)
    for step, same in ((2, True), (1, False)):
        moved = module(x.roll((step, step), (2, 3)))[:, :, 4:-4, 4:-4]
        still = module(x)[:, :, 4 - step : -4 - step, 4 - step : -4 - step]
        assert torch.allclose(moved, still, rtol=0, atol=1e-12) == same


def test_a_stride_on_an_odd_map_has_the_size_of_a_convolution():
    module = lively(HaloAttention(16, block=4, halo=1, stride=2, out_channels=32))
    x = torch.randn(2, 16, 5, 7, dtype=torch.double)
    assert module(x).shape == torch.nn.Conv2d(16, 32, 3, 2, 1)(x.float()).shape
    torch.testing.assert_close(module(x), module.read(x, weights=module.attend(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be positive, got 0"),
        ({"halo": -1}, "halo must not be negative, got -1"),
        ({"heads": 5}, "heads must divide out_channels=64, got 5"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"border": "clamp"}, "border must be zero or mask, got 'clamp'"),
    ],
    ids=str,
)
def test_refuses_what_is_no_block(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        HaloAttention(64, **options)
