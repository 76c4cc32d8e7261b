import pytest
import torch
from torch import nn

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, MemoryCase, memory, queries, small, steps
from visattn.attention import AttentionOnAttention, CoverageAttention, HardAttention, MultiHeadAttention
from visattn.attention.memory.core import MemoryAttention


def two_heads(query: int, memory: int) -> MemoryAttention:
    return MultiHeadAttention(query, memory, heads=2)


CASES = [
    MemoryCase(
        AttentionOnAttention,
        {"attention": two_heads},
        lambda q, d: q * (q + 2 * d) + 2 * q * (q + q) + 2 * q,
        2_622_464,
    ),
    MemoryCase(
        AttentionOnAttention, {"attention": small}, lambda q, d: 5 * (q + d) + 10 + 2 * q * (d + q) + 2 * q, 1_845_002
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gates_what_is_read_as_the_paper_says(case):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    inner = module.attention
    prepared = module.prepare(held)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            if isinstance(inner, MultiHeadAttention):
                parts = []
                for part in (slice(0, 3), slice(3, 6)):
                    query = inner.query.weight[part] @ asked[b, r]
                    scores = torch.stack([query @ inner.key.weight[part] @ v / 3**0.5 for v in held[b]])
                    a = scores.exp() / scores.exp().sum()
                    parts.append(sum(a[i] * inner.value.weight[part] @ held[b, i] for i in range(REGIONS)))
                context = torch.cat(parts)
            else:
                context = inner(asked, prepared)[0][b, r]
            both = torch.cat((context, asked[b, r]))
            information = module.gate.weight[:QUERY] @ both + module.gate.bias[:QUERY]
            gate = module.gate.weight[QUERY:] @ both + module.gate.bias[QUERY:]
            right = information / (1 + torch.exp(-gate))
            torch.testing.assert_close(found[b, r], right, rtol=0, atol=1e-12)


def test_looks_where_the_attention_inside_looks():
    module, held, asked = AttentionOnAttention(QUERY, MEMORY, attention=CoverageAttention).double(), memory(), queries()
    assert module.stateful
    looked, _ = steps(module, asked, module.prepare(held))
    inner, _ = steps(module.attention, asked, module.attention.prepare(held))
    torch.testing.assert_close(looked, inner, rtol=0, atol=0)


def test_the_order_of_the_regions_does_not_matter_and_what_is_asked_does_whatever_is_there():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    found, _ = module(asked, module.prepare(held))
    torch.testing.assert_close(module(asked, module.prepare(held.flip(1)))[0], found, rtol=0, atol=1e-12)
    level = module(asked, module.prepare(torch.ones_like(held)))[0]
    assert not torch.allclose(level[:, 0], level[:, 1], rtol=0, atol=1e-2)  # what is read is the same for both


def test_a_gate_that_is_closed_reads_nothing():
    module, held, (asked, *_) = CASES[1].lively(), memory(), queries()
    nn.init.constant_(module.gate.bias[QUERY:].detach(), -1e3)
    assert module(asked, module.prepare(held))[0].abs().max() < 1e-100


def test_drops_of_context_and_query_in_training_alone():
    module, held, (asked, *_) = AttentionOnAttention(QUERY, MEMORY, attention=small).double(), memory(), queries()
    assert module.dropout.p == 0.3
    prepared = module.prepare(held)
    one, other = (module(asked, prepared)[0] for _ in range(2))
    assert not torch.allclose(one, other)
    module.eval()
    one, other = (module(asked, prepared)[0] for _ in range(2))
    assert torch.equal(one, other)


def test_refuses_attention_that_picks():
    with pytest.raises(ValueError, match="attention must mix regions, got HardAttention, which picks"):
        AttentionOnAttention(QUERY, MEMORY, attention=HardAttention)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got 2"):
        AttentionOnAttention(QUERY, MEMORY, attention=small, dropout=2.0)
