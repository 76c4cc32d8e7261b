import math

import pytest
import torch
from torch.nn import functional as F

from tests.attention.memory.case import MemoryCase, memory, queries
from visattn.attention import CosineAttention

CASES = [MemoryCase(CosineAttention, {}, lambda q, d: q * d + d + q + 1, 657_153)]


def test_is_the_paper_s_addressing_by_content():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    weights, _ = module.attend(asked, module.prepare(held))
    found, _ = module(asked, module.prepare(held))
    for b in range(2):
        for r in range(3):
            key = module.query.weight @ asked[b, r] + module.query.bias
            beta = math.log1p(math.exp(module.sharpness(asked[b, r]).item()))
            cosines = [F.cosine_similarity(key, region, 0).item() for region in held[b]]
            exponentials = [math.exp(beta * cosine) for cosine in cosines]
            expected = torch.tensor([each / sum(exponentials) for each in exponentials], dtype=torch.double)
            torch.testing.assert_close(weights[b, r], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(found[b, r], expected @ held[b], rtol=0, atol=1e-12)


def test_the_length_of_a_region_changes_nothing_and_its_direction_does():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    before, _ = module.attend(asked, module.prepare(held))
    longer, _ = module.attend(asked, module.prepare(held * torch.rand(2, held.shape[1], 1).add(0.1)))
    torch.testing.assert_close(longer, before, rtol=0, atol=1e-12)
    turned, _ = module.attend(asked, module.prepare(held.roll(1, 2)))
    assert not torch.allclose(turned, before, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strength", [-200.0, 200.0])
def test_the_query_says_how_sharply(strength):
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    torch.nn.init.constant_(module.sharpness.bias, strength)
    weights, _ = module.attend(asked, module.prepare(held))
    if strength < 0:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / held.shape[1]), rtol=0, atol=1e-12)
    else:
        nearest = (module.query(asked) @ held.mT / held.norm(dim=2)[:, None]).argmax(2)
        assert torch.equal(weights.argmax(2), nearest)
        assert weights.amax(2).min() > 0.5


def test_regions_of_zeros_are_neither_like_nor_unlike_and_have_a_gradient():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    held[:, 2] = 0
    held.requires_grad_()
    scores = module.scores(asked, module.prepare(held))
    assert not scores[..., 2].any()
    (gradient,) = torch.autograd.grad(module(asked, module.prepare(held))[0].sum(), held)
    assert gradient.isfinite().all()
