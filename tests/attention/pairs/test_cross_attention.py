import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import CrossAttention2d

CASES = [
    Case(
        CrossAttention2d,
        options,
        parameters,
        golden,
        macs=lambda c, h, w: 4 * h * w * c * c + 2 * (h * w) ** 2 * c,
        sums_to_one=-1,
        inputs=2,
    )
    for options, parameters, golden in (
        ({}, lambda c: 4 * c * c + 4 * c, (16_640, 263_168)),
        ({"heads": 4, "bias": False}, lambda c: 4 * c * c, (16_384, 262_144)),
    )
]


def pair(context: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 3, 5, dtype=torch.double), torch.randn(2, context, 4, 2, dtype=torch.double)


def paper(module: CrossAttention2d, x: Tensor, y: Tensor) -> Tensor:
    """Section 3.2 of the paper, in loops."""
    channels, width = x.shape[1], x.shape[1] // module.heads
    (wq, wo), (wk, wv) = (module.query.weight, module.out.weight), module.key_value.weight.split(channels)
    (bq, bo), (bk, bv) = (module.query.bias, module.out.bias), module.key_value.bias.split(channels)
    result = torch.empty_like(x)
    for b in range(len(x)):
        asked = [y[b, :, p, q] for p in range(y.shape[2]) for q in range(y.shape[3])]
        for p in range(x.shape[2]):
            for q in range(x.shape[3]):
                heads = []
                for t in range(module.heads):
                    of = slice(t * width, (t + 1) * width)
                    query = wq[of] @ x[b, :, p, q] + bq[of]
                    scores = [math.exp(query @ (wk[of] @ z + bk[of]) / math.sqrt(width)) for z in asked]
                    heads.append(
                        sum(s / sum(scores) * (wv[of] @ z + bv[of]) for s, z in zip(scores, asked, strict=True))
                    )
                result[b, :, p, q] = wo @ torch.cat(heads) + bo
    return result


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_equals_the_paper_in_loops(heads):
    module = CrossAttention2d(8, context_channels=6, heads=heads).double()
    x, y = pair()
    with torch.no_grad():
        torch.testing.assert_close(module(x, y), paper(module, x, y), rtol=0, atol=1e-12)


def test_equals_torch_after_copying_weights():
    ours = CrossAttention2d(8, context_channels=6, heads=4).double()
    theirs = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True).double()
    keys, values = ours.key_value.weight.chunk(2)
    state = {"q_proj_weight": ours.query.weight, "k_proj_weight": keys, "v_proj_weight": values}
    state["in_proj_bias"] = torch.cat((ours.query.bias, ours.key_value.bias))
    theirs.load_state_dict(state | {f"out_proj.{name}": value for name, value in ours.out.state_dict().items()})
    x, y = pair()
    tokens = y.flatten(2).mT
    output, weights = theirs(x.flatten(2).mT, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(ours(x, y), output.mT.view_as(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.attend(x, y), weights, rtol=0, atol=1e-12)


def shuffle(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(2)[..., order].view_as(x)


def test_the_order_of_what_is_asked_does_not_matter_and_that_of_what_asks_comes_back():
    module, (x, y) = CrossAttention2d(8, context_channels=6).double(), pair()
    expected = module(x, y)
    torch.testing.assert_close(module(x, shuffle(y, torch.randperm(8))), expected, rtol=0, atol=1e-12)
    order = torch.randperm(15)
    torch.testing.assert_close(module(shuffle(x, order), y), shuffle(expected, order), rtol=0, atol=1e-12)


def test_the_two_maps_do_not_stand_for_each_other():
    module = CrossAttention2d(8).double()
    x, y = (torch.randn(2, 8, 3, 5, dtype=torch.double) for _ in range(2))
    assert not torch.allclose(module(x, y), module(y, x), atol=1e-3)


def test_heads_scale_by_their_own_width():
    one, two = (CrossAttention2d(8, heads=heads, bias=False).double() for heads in (1, 2))
    two.load_state_dict(one.state_dict())
    x, y = pair(8)
    with torch.no_grad():
        one.query.weight[4:] = two.query.weight[4:] = 0  # the first head alone has something to say
        first = (one.attend(x, y).log() * math.sqrt(8)).diff(dim=3)[:, 0]
        torch.testing.assert_close((two.attend(x, y).log() * math.sqrt(4)).diff(dim=3)[:, 0], first)


@pytest.mark.parametrize("heads", [0, 3, 16])
def test_refuses_heads_that_do_not_divide_the_channels(heads):
    with pytest.raises(ValueError, match=f"heads must divide channels=8, got {heads}"):
        CrossAttention2d(8, heads=heads)
