import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import MultiHeadSelfAttention2d
from visattn.attention.pairwise.positions import sinusoid, sinusoid_2d

CASES = [
    Case(
        MultiHeadSelfAttention2d,
        options,
        lambda c, relative="size" in options: 4 * c * c + 4 * c + 22 * c // 8 * relative,
        (16_816, 263_872) if "size" in options else (16_640, 263_168),
        macs=lambda c, h, w, relative="size" in options: h * w * (4 * c * c + 2 * h * w * c + (h + w) * c * relative),
        sums_to_one=-1,
        small=8,
    )
    for options in (
        {},
        {"positions": "rotary", "heads": 2},
        {"positions": "sinusoidal", "causal": True},
        {"positions": "relative", "size": (5, 7)},
    )
]

POSITIONS = [None, "sinusoidal", "sinusoidal-1d", "learned", "relative", "rotary"]


def lively(positions: str | None = None, size: tuple[int, int] = (3, 5), **options: object) -> MultiHeadSelfAttention2d:
    """In double precision, with nothing zero."""
    module = MultiHeadSelfAttention2d(8, heads=2, positions=positions, size=size, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: MultiHeadSelfAttention2d, x: Tensor) -> Tensor:
    """Section 3.2 of the paper in loops, with the positions of the others."""
    y, (h, w), causal = torch.empty_like(x), x.shape[2:], module.affinity.causal
    if module.positions == "sinusoidal":
        x = x + sinusoid_2d(h, w, 8, dtype=torch.double)
    if module.positions == "sinusoidal-1d":
        x = x + sinusoid(torch.arange(h * w).double(), 8).mT.view(8, h, w)
    if module.positions == "learned":
        x = x + module.learned.table
    at = [(i, j) for i in range(h) for j in range(w)]

    def turned(vector: Tensor, place: tuple[int, int]) -> Tensor:
        if module.positions != "rotary":
            return vector
        pairs = [complex(*vector[2 * i : 2 * i + 2].tolist()) for i in range(2)]
        turns = [pair * complex(math.cos(p), math.sin(p)) for pair, p in zip(pairs, place, strict=True)]
        return torch.tensor([part for z in turns for part in (z.real, z.imag)], dtype=torch.double)

    for b in range(x.shape[0]):
        projected = {
            name: {(i, j): layer(x[b, :, i, j]).chunk(2) for i, j in at}
            for name, layer in (("q", module.query), ("k", module.key), ("v", module.value))
        }
        for n, here in enumerate(at):
            heads = []
            for a in range(2):
                query, scores = turned(projected["q"][here][a], here), {}
                for m, there in enumerate(at):
                    logit = query @ turned(projected["k"][there][a], there)
                    if module.positions == "relative":
                        dy, dx = there[0] - here[0], there[1] - here[1]
                        logit = logit + query @ (module.affinity.rows[dy + h - 1] + module.affinity.columns[dx + w - 1])
                    if m <= n or not causal:
                        scores[there] = math.exp(logit / math.sqrt(4))
                total = sum(scores.values())
                heads.append(sum(s / total * projected["v"][there][a] for there, s in scores.items()))
            y[b, :, here[0], here[1]] = module.out(torch.cat(heads))
    return y


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_the_paper_in_loops(positions, causal):
    module, x = lively(positions, causal=causal), torch.randn(2, 8, 3, 5).double()
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.read(x, weights=module.attend(x)), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch_after_copying_weights(bias):
    ours = MultiHeadSelfAttention2d(64, bias=bias)
    theirs = nn.MultiheadAttention(64, 8, bias=bias, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in (ours.query, ours.key, ours.value)]).normal_())
            for layer, part in zip((ours.query, ours.key, ours.value), theirs.in_proj_bias.chunk(3), strict=True):
                layer.bias.copy_(part)
    x = torch.randn(2, 64, 5, 7)
    tokens = x.flatten(2).mT
    y, weights = theirs(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(ours(x), y.mT.view(x.shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.attend(x), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_does_not_see_where_things_are_unless_it_is_told(positions):
    module, x, order = lively(positions), torch.randn(2, 8, 3, 5).double(), torch.randperm(15)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    assert torch.allclose(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-11) == (positions is None)


@pytest.mark.parametrize("positions", POSITIONS)
def test_causal_sees_nothing_that_comes_later(positions):
    module, x = lively(positions, causal=True), torch.randn(1, 8, 3, 5).double()
    seen = torch.autograd.functional.jacobian(lambda x: module(x).sum((0, 1)).flatten(), x)
    seen = seen[:, 0].abs().sum(1).flatten(1)
    assert not seen.triu(1).any()
    assert (seen + torch.ones(15, 15).triu(1)).all()
    assert not module.attend(x).triu(1).any()


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_sees_distances_not_places(positions):
    module, x = lively(positions), torch.randn(8).double()[:, None, None].expand(1, 8, 3, 5)
    weights = module.attend(x).unflatten(2, (3, 5)).unflatten(4, (3, 5)).log()
    near, far = weights[..., :-1, :-1, :-1, :-1], weights[..., 1:, 1:, 1:, 1:]  # equal distances, other sums
    steps = near - far
    torch.testing.assert_close(steps, steps[..., :1, :1].expand_as(steps), rtol=0, atol=1e-10)
    assert steps.abs().max() > 1e-3


def test_a_head_is_scaled_by_its_own_width_and_not_that_of_all():
    module, x = lively(), torch.randn(1, 8, 3, 5).double()
    tokens = x.flatten(2).mT
    query, key = module.query(tokens)[..., :4], module.key(tokens)[..., :4]
    torch.testing.assert_close(module.attend(x)[:, 0], (query @ key.mT / 2).softmax(-1))
    assert not torch.allclose(module.attend(x)[:, 0], (query @ key.mT / 8**0.5).softmax(-1), atol=1e-3)


def test_learned_positions_follow_the_size_of_the_map():
    module = lively("learned", size=(7, 7))
    for size in ((7, 7), (3, 5), (14, 9)):
        assert module(torch.randn(1, 8, *size).double()).shape == (1, 8, *size)


def test_learned_positions_export_with_dynamic_size(unchecked):
    module, x = nn.Sequential(lively("learned").eval()), torch.randn(2, 8, 3, 5).double()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(module, (x,), dynamic_shapes=(free,), strict=False).module()
    for size in ((2, 8, 3, 5), (3, 8, 6, 4)):
        x = torch.randn(*size).double()
        torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-11)


def test_weights_at_half_precision_are_near_the_exact_ones():
    module, x = MultiHeadSelfAttention2d(64), torch.randn(2, 64, 5, 7)
    y = module(x)
    torch.testing.assert_close(module.bfloat16()(x.bfloat16()).float(), y, rtol=0, atol=2e-2)


def test_refuses_what_does_not_fit(unchecked):
    with pytest.raises(ValueError, match="heads must divide channels=64, got 7"):
        MultiHeadSelfAttention2d(64, heads=7)
    with pytest.raises(ValueError, match="heads must divide channels=64, got 0"):
        MultiHeadSelfAttention2d(64, heads=0)
    with pytest.raises(ValueError, match=r"positions must be None, sinusoidal, .* or rotary, got 'absolute'"):
        MultiHeadSelfAttention2d(64, positions="absolute")
    for channels, heads, positions, divisor in (
        (16, 8, "rotary", 32),
        (6, 1, "sinusoidal", 4),
        (7, 1, "sinusoidal-1d", 2),
    ):
        message = f"channels must be divisible by {divisor} for {positions} positions, got {channels}"
        with pytest.raises(ValueError, match=message):
            MultiHeadSelfAttention2d(channels, heads=heads, positions=positions)
    for positions in ("learned", "relative"):
        with pytest.raises(ValueError, match=r"size must be the \(height, width\) of the feature map, got None"):
            MultiHeadSelfAttention2d(64, positions=positions)
    for call in (MultiHeadSelfAttention2d.forward, MultiHeadSelfAttention2d.attend):
        with pytest.raises(ValueError, match=r"size must be \(3, 5\) as constructed, got \(5, 3\)"):
            call(lively("relative"), torch.randn(1, 8, 5, 3).double())
