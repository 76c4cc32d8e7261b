import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from tests.attention.case import Case
from visattn import TransformerBlock2d

CASES = [
    Case(
        TransformerBlock2d,
        options,
        lambda c, scaled="layer_scale" in options: 12 * c * c + (15 if scaled else 13) * c,
        (50_112, 790_272) if "layer_scale" in options else (49_984, 789_760),
        macs=lambda c, h, w: h * w * (12 * c * c + 2 * h * w * c),
        sums_to_one=-1,
        small=8,
    )
    for options in ({}, {"layer_scale": 0.0, "causal": True})
] + [
    Case(
        TransformerBlock2d,
        {"norm": "post", "expansion": 2, "positions": "relative", "size": (5, 7)},
        lambda c: 8 * c * c + 11 * c + 22 * c // 8,
        (33_648, 527_808),
        macs=lambda c, h, w: h * w * (8 * c * c + 2 * h * w * c + (h + w) * c),
        sums_to_one=-1,
        small=8,
    )
]


def lively(**options: object) -> TransformerBlock2d:
    module = TransformerBlock2d(8, heads=2, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
@torch.no_grad()
def test_equals_the_paper_in_loops(norm, layer_scale):
    block, x = lively(norm=norm, layer_scale=layer_scale), torch.randn(2, 8, 3, 5).double()
    z, y = torch.empty_like(x), torch.empty_like(x)
    at = [(b, i, j) for b in range(2) for i in range(3) for j in range(5)]
    first, second = block.gammas if layer_scale else (1, 1)

    def normed(v: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        mean = sum(v) / 8
        return (v - mean) / (sum((v - mean) ** 2) / 8 + 1e-5) ** 0.5 * norm.weight + norm.bias

    seen = torch.empty_like(x)
    for b, i, j in at:
        seen[b, :, i, j] = normed(x[b, :, i, j], block.norms[0]) if norm == "pre" else x[b, :, i, j]
    mixed = block.attention(seen)  # proven by itself
    for b, i, j in at:
        z[b, :, i, j] = x[b, :, i, j] + first * mixed[b, :, i, j]
        z[b, :, i, j] = normed(z[b, :, i, j], block.norms[0]) if norm == "post" else z[b, :, i, j]
        inside = normed(z[b, :, i, j], block.norms[1]) if norm == "pre" else z[b, :, i, j]
        inside = block.perceptron[0](inside)
        inside = inside * (1 + torch.erf(inside / 2**0.5)) / 2
        y[b, :, i, j] = z[b, :, i, j] + second * block.perceptron[2](inside)
        y[b, :, i, j] = normed(y[b, :, i, j], block.norms[1]) if norm == "post" else y[b, :, i, j]
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equals_torch_after_copying_weights(norm):
    ours, x = TransformerBlock2d(64, norm=norm), torch.randn(2, 64, 5, 7)
    theirs = nn.TransformerEncoderLayer(
        64, 8, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm == "pre"
    )
    mine = ours.attention
    theirs.self_attn.in_proj_weight = nn.Parameter(torch.cat([mine.query.weight, mine.key.weight, mine.value.weight]))
    theirs.self_attn.out_proj = mine.out
    theirs.linear1, theirs.linear2 = ours.perceptron[0], ours.perceptron[2]
    theirs.norm1, theirs.norm2 = ours.norms
    torch.testing.assert_close(ours(x), theirs(x.flatten(2).mT).mT.view(x.shape), rtol=1e-4, atol=1e-5)


def test_equals_the_block_of_timm_after_copying_weights():
    ours, x = TransformerBlock2d(64, layer_scale=0.1), torch.randn(2, 64, 5, 7)
    theirs, mine = Block(64, 8, qkv_bias=True, init_values=0.1), ours.attention
    theirs.attn.qkv.weight = nn.Parameter(torch.cat([mine.query.weight, mine.key.weight, mine.value.weight]))
    theirs.attn.qkv.bias = nn.Parameter(torch.cat([mine.query.bias, mine.key.bias, mine.value.bias]))
    theirs.attn.proj, theirs.mlp.fc1, theirs.mlp.fc2 = mine.out, ours.perceptron[0], ours.perceptron[2]
    theirs.norm1, theirs.norm2 = ours.norms
    torch.testing.assert_close(ours(x), theirs(x.flatten(2).mT).mT.view(x.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_with_nothing_projected_out_pre_norm_is_the_identity_and_post_norm_is_two_norms(norm):
    block, x = TransformerBlock2d(64, norm=norm), torch.randn(2, 64, 5, 7)
    for layer in (block.attention.out, block.perceptron[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert not block.identity_at_init
    if norm == "pre":
        assert torch.equal(block(x), x)
    else:
        once = nn.functional.layer_norm(x.movedim(1, -1), (64,))
        torch.testing.assert_close(block(x).movedim(1, -1), nn.functional.layer_norm(once, (64,)))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_scale_of_zero_learns_at_once_and_the_rest_after_it(norm):
    block, x = TransformerBlock2d(64, norm=norm, layer_scale=0.0), torch.randn(2, 64, 5, 7)
    assert block.identity_at_init == torch.equal(block(x), x) == (norm == "pre")
    block(x).square().sum().backward()
    moving = {name for name, parameter in block.named_parameters() if parameter.grad.any()}
    assert {"gammas.0", "gammas.1"} <= moving
    assert not any(name.startswith(("attention", "perceptron")) for name in moving)
    with torch.no_grad():
        for gamma in block.gammas:
            gamma += 0.1
    block.zero_grad()
    block(x).square().sum().backward()
    assert all(parameter.grad.any() for name, parameter in block.named_parameters() if name != "attention.key.bias")


def test_norm_is_over_channels_and_not_over_the_map():
    block, x = lively(), torch.randn(1, 8, 3, 5).double()
    moved = x.clone()
    moved[:, :, 2, 4] += 7
    for part in block.attention.value, block.attention.out:
        nn.init.zeros_(part.weight)
    same = torch.ones(3, 5, dtype=torch.bool)
    same[2, 4] = False
    torch.testing.assert_close(block(moved)[..., same], block(x)[..., same], rtol=0, atol=1e-12)
    assert not torch.allclose(nn.GroupNorm(1, 8).double()(moved)[..., same], nn.GroupNorm(1, 8).double()(x)[..., same])


def test_refuses_what_does_not_fit(unchecked):
    with pytest.raises(ValueError, match="norm must be pre or post, got 'both'"):
        TransformerBlock2d(64, norm="both")
    with pytest.raises(ValueError, match="expansion must be positive, got 0"):
        TransformerBlock2d(64, expansion=0)
    with pytest.raises(ValueError, match="heads must divide channels=64, got 7"):
        TransformerBlock2d(64, heads=7)
