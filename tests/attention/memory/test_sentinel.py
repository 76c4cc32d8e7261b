import math

import pytest
import torch
from torch import nn

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, MemoryCase, memory, queries
from visattn.attention import SentinelAttention

CASES = [
    MemoryCase(
        SentinelAttention,
        {"width": 5},
        lambda q, d: q // 2 * (d + 1) + 3 * 5 * (q // 2) + 2 * 5,
        331_786,
        parts=2,
    )
]


@torch.no_grad()
def test_is_the_paper_s_softmax_over_regions_and_sentinel():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    prepared = module.prepare(held)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            h, s = asked[b, r].split(QUERY // 2)
            regions = [(module.value.weight @ m + module.value.bias).clamp(min=0) for m in held[b]]
            inner = [module.key.weight @ v for v in regions] + [module.sentinel.weight @ s]
            inner = [(each + module.key.bias + module.query.weight @ h).tanh() for each in inner]
            exponentials = [math.exp(module.score.weight[0] @ each) for each in inner]
            right = torch.tensor([each / sum(exponentials) for each in exponentials], dtype=torch.double)
            torch.testing.assert_close(weights[b, r], right, rtol=0, atol=1e-12)
            read = sum(a * v for a, v in zip(right, [*regions, s], strict=True))
            torch.testing.assert_close(found[b, r], read, rtol=0, atol=1e-12)


def test_what_is_not_the_sentinel_s_is_grounded():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1] = False
    weights, _ = module.attend(asked, module.prepare(held, mask))
    grounding = module.grounding(weights)
    torch.testing.assert_close(grounding[0], 1 - weights[0, :, -1], rtol=0, atol=1e-12)
    assert not grounding[1].any()


def test_the_order_of_the_regions_does_not_matter_and_that_of_state_and_sentinel_does():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    found, _ = module(asked, module.prepare(held))
    torch.testing.assert_close(module(asked, module.prepare(held.flip(1)))[0], found, rtol=0, atol=1e-12)
    turned = torch.cat(asked.chunk(2, 2)[::-1], 2)
    assert not torch.allclose(module(turned, module.prepare(held))[0], found, rtol=0, atol=1e-2)


def test_the_sentinel_alone_changes_its_weight():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    prepared = module.prepare(held)
    weights, _ = module.attend(asked, prepared)
    other, _ = module.attend(torch.cat((asked[..., : QUERY // 2], torch.randn(2, 3, QUERY // 2).double()), 2), prepared)
    ratio = other[..., :-1] / weights[..., :-1]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=0, atol=1e-10)  # regions keep their shares
    assert not torch.allclose(other[..., -1], weights[..., -1], rtol=0, atol=1e-3)


def test_learns_when_to_look_and_is_not_stuck_at_the_sentinel():
    """Half of the answers lie in the region that the state names, half in the sentinel."""
    torch.manual_seed(1)
    module, out = SentinelAttention(8, 8, width=16), nn.Linear(8, 4)
    optimizer = torch.optim.Adam([*module.parameters(), *out.parameters()], 2e-2)

    def batch() -> tuple[torch.Tensor, ...]:
        contents, own, name = torch.randint(4, (64, 4)), torch.randint(4, (64,)), torch.randint(4, (64,))
        looks = torch.rand(64) < 0.5
        held = torch.cat((torch.eye(4).expand(64, -1, -1), torch.eye(4)[contents]), 2)
        state = torch.cat((torch.eye(4)[name], looks[:, None].float().expand(-1, 4)), 1)
        sentinel = torch.cat((torch.eye(4)[own], torch.zeros(64, 4)), 1)
        answer = torch.where(looks, contents[torch.arange(64), name], own)
        return held, torch.cat((state, sentinel), 1)[:, None], answer, looks

    for _ in range(400):
        held, asked, answer, looks = batch()
        prepared = module.prepare(held)
        weights, _ = module.attend(asked, prepared)
        found = module.read(asked, prepared, weights=weights)
        loss = nn.functional.cross_entropy(out(found[:, 0]), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grounding = module.grounding(weights)
    assert loss < 0.4
    assert grounding[looks].mean() > 0.7
    assert grounding[~looks].mean() < 0.3


def test_a_query_is_state_and_sentinel():
    module = SentinelAttention(QUERY, MEMORY)
    assert (module.asks, module.features) == (2 * QUERY, QUERY)
    with pytest.raises(ValueError, match="query must have 12 features as constructed, got 6"):
        module(torch.randn(2, 3, QUERY), module.prepare(memory(dtype=torch.float)))


def test_refuses_a_width_of_nothing():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        SentinelAttention(QUERY, MEMORY, width=0)
