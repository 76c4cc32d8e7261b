import math

import pytest
import torch

from tests.attention.memory.case import MEMORY, QUERY, MemoryCase, memory, queries
from visattn.attention import AdditiveAttention
from visattn.attention.memory.additive import perceptron, plain_perceptron

CASES = [
    MemoryCase(AdditiveAttention, {"width": 5}, lambda q, d: 5 * (q + d) + 2 * 5, 8970),
    MemoryCase(AdditiveAttention, {}, lambda q, d: 512 * (q + d) + 2 * 512, 918528),
]


def test_is_the_paper_s_perceptron_on_query_and_region_together():
    attention = CASES[0].lively()
    held, (asked, *_) = memory(), queries()
    weights, _ = attention.attend(asked, attention.prepare(held))
    score = attention.score.weight[0]
    joined = torch.cat((attention.query.weight, attention.key.weight), 1)  # W_a and U_a side by side
    for b in range(2):
        for r in range(3):
            scores: list[float] = []
            for region in held[b]:
                hidden = joined @ torch.cat((asked[b, r], region)) + attention.key.bias
                scores.append(
                    sum(u * math.tanh(x) for u, x in zip(*(each.tolist() for each in (score, hidden)), strict=True))
                )
            exponentials = [math.exp(score) for score in scores]
            expected = torch.tensor([each / sum(exponentials) for each in exponentials], dtype=torch.double)
            torch.testing.assert_close(weights[b, r], expected, rtol=0, atol=1e-12)
            found, _ = attention(asked, attention.prepare(held))
            torch.testing.assert_close(found[b, r], expected @ held[b], rtol=0, atol=1e-12)


def test_a_bias_of_all_scores_changes_nothing_and_one_of_the_perceptron_does():
    attention = CASES[0].lively()
    prepared, (asked, *_) = attention.prepare(memory()), queries()
    before, _ = attention.attend(asked, prepared)
    scores = attention.scores(asked, prepared)
    torch.testing.assert_close((scores + 3).softmax(-1), before, rtol=0, atol=1e-12)
    moved = prepared._replace(keys=prepared.keys + 3)
    assert not torch.allclose(attention.attend(asked, moved)[0], before, atol=1e-3)


def test_keys_are_made_once():
    attention = CASES[0].lively()
    made = []
    attention.key.register_forward_hook(lambda *_: made.append(1))
    prepared = attention.prepare(memory())
    for query in queries(steps=4):
        attention(query, prepared)
    assert len(made) == 1


def test_refuses_a_width_of_nothing():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        AdditiveAttention(QUERY, MEMORY, width=0)


@pytest.mark.parametrize("keys", [1, 3], ids=["one memory", "a memory for each query"])
def test_its_own_gradients_are_those_of_the_equation(keys):
    inputs = [torch.randn(*size, dtype=torch.double, requires_grad=True) for size in ((4, 3, 5), (4, keys, 7, 5), (5,))]
    ours, right = perceptron(*inputs), plain_perceptron(*inputs)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-14)
    g = torch.randn_like(ours)
    for one, other in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(right, inputs, g), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    assert torch.autograd.gradgradcheck(perceptron, inputs, fast_mode=True)


def test_keeps_nothing_that_is_as_large_as_all_queries_times_all_regions():
    asked, keys, score = (torch.randn(*size, requires_grad=True) for size in ((2, 3, 5), (2, 1, 7, 5), (5,)))
    kept: dict[str, list[int]] = {}
    for function in (perceptron, plain_perceptron):
        sizes = kept.setdefault(function.__name__, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()), lambda x: x):
            function(asked, keys, score)
    assert max(kept["plain_perceptron"]) == 2 * 3 * 7 * 5
    assert max(kept["perceptron"]) == 2 * 7 * 5
