import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries, steps
from visattn.attention import AdditiveAttention, LocationAttention, MultiplicativeAttention

CASES = [
    MemoryCase(MultiplicativeAttention, {}, lambda q, d: q * d, 655_360),
    MemoryCase(MultiplicativeAttention, {"score": "concat", "width": 5}, lambda q, d: 5 * (q + d) + 5, 8965),
    MemoryCase(LocationAttention, {"size": SIZE}, lambda q, d: q * REGIONS, 7680, ordered=True),
]


def score(module: MultiplicativeAttention, query: Tensor, region: Tensor) -> Tensor:
    """Equation 8 of the paper."""
    if module.score == "general":
        return query @ (module.key.weight @ region)
    if module.score == "concat":
        joined = torch.cat((module.query.weight, module.key.weight), 1)  # W_a
        return module.sum.weight[0] @ torch.tanh(joined @ torch.cat((query, region)))
    return query @ region


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_scores_as_the_paper_says(case):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    prepared = module.prepare(held)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            exponentials = [score(module, asked[b, r], region).exp() for region in held[b]]
            expected = torch.stack(exponentials) / sum(exponentials)
            torch.testing.assert_close(weights[b, r], expected, rtol=0, atol=1e-12)
            read = sum(weight * region for weight, region in zip(expected, held[b], strict=True))
            torch.testing.assert_close(found[b, r], read, rtol=0, atol=1e-12)


def test_dot_is_general_with_nothing_learned():
    dot = MultiplicativeAttention(MEMORY, MEMORY, score="dot")
    general = MultiplicativeAttention(MEMORY, MEMORY).double()
    assert not list(dot.parameters())
    torch.nn.init.eye_(general.key.weight)
    held, asked = memory(), [torch.randn(2, 3, MEMORY, dtype=torch.double)]
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[0] = False
    mask[1, 4] = False
    ours, theirs = (steps(module, asked, module.prepare(held, mask)) for module in (dot, general))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(dot(asked[0], dot.prepare(held))[0], general(asked[0], general.prepare(held))[0])


def test_concat_is_the_perceptron_of_additive_attention_without_its_bias():
    ours = MultiplicativeAttention(QUERY, MEMORY, score="concat", width=5).double()
    theirs = AdditiveAttention(QUERY, MEMORY, width=5).double()
    state = {name.replace("sum", "score"): each for name, each in ours.state_dict().items()}
    theirs.load_state_dict(state | {"key.bias": torch.zeros(5)})
    held, (asked, *_) = memory(), queries()
    torch.testing.assert_close(ours(asked, ours.prepare(held)), theirs(asked, theirs.prepare(held)), rtol=0, atol=1e-15)


def test_more_of_the_query_is_sharper_and_what_all_regions_share_changes_nothing():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    before, _ = module.attend(asked, module.prepare(held))
    shared, _ = module.attend(asked, module.prepare(held + 3))
    torch.testing.assert_close(shared, before, rtol=0, atol=1e-11)
    sharper, _ = module.attend(2 * asked, module.prepare(held))
    torch.testing.assert_close(sharper, before**2 / (before**2).sum(2, keepdim=True), rtol=0, atol=1e-12)
    concat = CASES[1].lively()
    moved = [concat.attend(asked, concat.prepare(each))[0] for each in (held, held + 3)]
    assert not torch.allclose(*moved, rtol=0, atol=1e-3)


def test_location_looks_by_the_query_alone():
    module, held, (asked, *_) = CASES[2].lively(), memory(), queries()
    weights, _ = module.attend(asked, module.prepare(held))
    for b in range(2):
        for r in range(3):
            exponentials = [(row @ asked[b, r]).exp() for row in module.query.weight]
            torch.testing.assert_close(weights[b, r], torch.stack(exponentials) / sum(exponentials), rtol=0, atol=1e-12)
    other, _ = module.attend(asked, module.prepare(torch.randn_like(held)))
    assert torch.equal(other, weights)
    assert not torch.allclose(module.attend(-asked, module.prepare(held))[0], weights, rtol=0, atol=1e-3)


def test_keys_are_the_memory_times_the_matrix_once():
    module, held = CASES[0].lively(), memory()
    prepared = module.prepare(held)
    torch.testing.assert_close(prepared.keys, held @ module.key.weight.T, rtol=0, atol=1e-12)
    made = []
    module.key.register_forward_hook(lambda *_: made.append(1))
    steps(module, queries(steps=4), prepared)
    assert not made


def test_refuses_a_dot_product_of_unequal_widths():
    with pytest.raises(
        ValueError, match="query must have the features of the memory, 1280, for a dot product, got 512"
    ):
        MultiplicativeAttention(512, 1280, score="dot")


def test_refuses_an_unknown_score(unchecked):
    with pytest.raises(ValueError, match="score must be general, dot or concat, got 'sum'"):
        MultiplicativeAttention(QUERY, MEMORY, score="sum")


def test_refuses_a_width_of_nothing():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        MultiplicativeAttention(QUERY, MEMORY, width=0)


def test_location_refuses_a_memory_of_another_size():
    module = CASES[2].lively()
    with pytest.raises(ValueError, match="memory must have 15 regions as constructed, got 14"):
        module.prepare(memory()[:, 1:])
    with pytest.raises(ValueError, match=r"size must be \(3, 5\) as constructed, got \(5, 3\)"):
        module.prepare(memory(), None, (5, 3))
    with pytest.raises(ValueError, match=r"size must be the \(height, width\) of the map that is the memory, got None"):
        LocationAttention(QUERY, MEMORY)
    with pytest.raises(ValueError, match=r"size must be a positive height and width, got \(0, 3\)"):
        LocationAttention(QUERY, MEMORY, size=(0, 3))
