import math

import pytest
import torch
from torch import Tensor

from tests.attention.case import Case
from visattn import AttentionGate

CASES = [
    Case(
        AttentionGate,
        {},
        lambda c: c * c + c + 1,
        (4161, 65_793),
        macs=lambda c, h, w: h * w * (c * c + c // 2),
        inputs=2,
    ),
    Case(
        AttentionGate,
        {"form": "released"},
        lambda c: 7 * c * c // 2 + 4 * c + 1,
        (14_593, 230_401),
        macs=lambda c, h, w: -(-h // 2) * -(-w // 2) * (2 * c * c + c // 2) + h * w * 3 * c * c // 2,
        norm_over="positions",
        inputs=2,
    ),
]


def pair(*, size: tuple[int, int] = (6, 10), coarse: tuple[int, int] = (3, 5)) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, *size, dtype=torch.double), torch.randn(2, 6, *coarse, dtype=torch.double)


def lively(form: str = "paper", **options: int) -> AttentionGate:
    module = AttentionGate(8, form=form, **{"gating_channels": 6, **options}).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def sample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, pixels as areas, in loops."""
    y = x.new_zeros(*x.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            p, q = (
                max(0.0, (k + 0.5) * old / new - 0.5) for k, old, new in zip((i, j), x.shape[2:], size, strict=True)
            )
            for r in (math.floor(p), math.floor(p) + 1):
                for s in (math.floor(q), math.floor(q) + 1):
                    share = (1 - abs(p - r)) * (1 - abs(q - s))
                    y[:, :, i, j] += share * x[:, :, min(r, x.shape[2] - 1), min(s, x.shape[3] - 1)]
    return y


def paper(module: AttentionGate, x: Tensor, g: Tensor, form: str) -> Tensor:
    """The paper's weights, or those of its released code, in loops."""
    weight = module.skip.weight
    gating = torch.einsum("dc,bchw->bdhw", module.gating.weight[:, :, 0, 0], g) + module.gating.bias[:, None, None]
    if form == "paper":
        x_at = sample(x, g.shape[2:])
        skip = torch.einsum("dc,bchw->bdhw", weight[:, :, 0, 0], x_at)
    else:
        h, w = (-(-side // 2) for side in x.shape[2:])
        skip = x.new_zeros(len(x), len(weight), h, w)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                skip[:, :, i // 2, j // 2] += x[:, :, i, j] @ weight[:, :, i % 2, j % 2].T
        gating = sample(gating, (h, w))
    scores = module.score.bias + sum(
        module.score.weight[0, d, 0, 0] * (skip[:, d] + gating[:, d]).clamp(min=0) for d in range(skip.shape[1])
    )
    return sample(1 / (1 + (-scores[:, None]).exp()), x.shape[2:])


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize(
    ("size", "coarse"), [((6, 10), (3, 5)), ((5, 7), (2, 3)), ((4, 4), (4, 4)), ((6, 9), (1, 1)), ((3, 2), (4, 5))]
)
def test_equals_the_paper_in_loops(form, size, coarse):
    module, (x, g) = lively(form), pair(size=size, coarse=coarse)
    with torch.no_grad():
        expected = paper(module, x, g, form)
        torch.testing.assert_close(module.attend(x, g), expected, rtol=0, atol=1e-12)
        y = x * expected
        if form == "released":
            y = module.out(y)
        torch.testing.assert_close(module(x, g), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coarse", [(3, 5), (2, 2), (1, 7), (9, 9)])
def test_is_the_same_everywhere_where_both_maps_are(coarse):
    module, (x, g) = lively(), pair(coarse=coarse)
    weights = module.attend(x[:, :, :1, :1].expand_as(x), g[:, :, :1, :1].expand_as(g))
    torch.testing.assert_close(weights, weights[:, :, :1, :1].expand_as(weights), rtol=0, atol=1e-12)
    assert 0 < weights.min() < weights.max() < 1  # the two images differ


def test_what_is_far_from_where_the_gating_map_changes_keeps_its_weight():
    module, (x, g) = lively(), pair(size=(8, 8), coarse=(4, 4))
    moved = g.clone()
    moved[:, :, 0, 0] += 1
    changed = (module.attend(x, moved) != module.attend(x, g)).any(0)[0]
    assert changed[:3, :3].all()
    assert not changed[3:].any()
    assert not changed[:, 3:].any()


def test_mirrors_with_both_maps_but_not_with_one():
    module, (x, g) = lively(), pair()
    torch.testing.assert_close(module(x.flip(3), g.flip(3)), module(x, g).flip(3), rtol=0, atol=1e-12)
    assert not torch.allclose(module(x.flip(3), g), module(x, g).flip(3), atol=1e-3)


def test_scores_of_zero_halve_the_skip_connection():
    module, (x, g) = lively(), pair()
    torch.nn.init.zeros_(module.score.weight)
    torch.nn.init.zeros_(module.score.bias)
    torch.testing.assert_close(module(x, g), x / 2, rtol=0, atol=1e-15)


def test_refuses_an_unknown_form(unchecked):
    with pytest.raises(ValueError, match="form must be paper or released, got 'unet'"):
        AttentionGate(8, form="unet")


@pytest.mark.parametrize("reduction", [0, 9])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=8, got {reduction}"):
        AttentionGate(8, reduction=reduction)
