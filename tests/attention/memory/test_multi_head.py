import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, MemoryCase, memory, queries
from tests.attention.pairwise.test_core import Largest
from visattn.attention import MultiHeadAttention

CASES = [
    MemoryCase(MultiHeadAttention, {"heads": 2}, lambda q, d: 2 * q * (q + d), 1_835_008),
    MemoryCase(MultiHeadAttention, {"heads": 2, "width": 4, "slots": 3}, lambda q, d: 8 * (q + d) + 24, 14_360),
    MemoryCase(
        MultiHeadAttention,
        {"heads": 1, "causal": True},
        lambda q, d: 2 * q * (q + d),
        1_835_008,
        ordered=True,
        alike=False,
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def paper(module: MultiHeadAttention, held: Tensor, asked: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3.2 in loops over heads, queries and regions, for one image."""
    width = module.key.out_features // module.heads
    read = torch.empty_like(asked)
    weights = torch.zeros(len(asked), module.heads, len(held) + module.slots, dtype=torch.double)
    for r, query in enumerate(asked):
        heads = []
        for n in range(module.heads):
            part = slice(n * width, (n + 1) * width)
            keys = [module.key.weight[part] @ region for region in held]
            values = [module.value.weight[part] @ region for region in held]
            there = [i for i in range(len(held)) if mask[i] and not (module.causal and i - len(held) > r - len(asked))]
            if module.slots:
                keys += [width**0.5 * slot[part] for slot in module.slot_keys]
                values += [module.slots**0.5 * slot[part] for slot in module.slot_values]
                there += range(len(held), len(held) + module.slots)
            scores = {i: (module.query.weight[part] @ query @ keys[i] / width**0.5).exp() for i in there}
            for i, score in scores.items():
                weights[r, n, i] = score / sum(scores.values())
            heads.append(sum(weights[r, n, i] * values[i] for i in there))
        read[r] = module.out.weight @ torch.cat(heads)
    return weights, read


@every_case
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_paper_in_loops(case, masked):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, [2, 7]] = not masked
    prepared = module.prepare(held, mask if masked else None)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        expected, read = paper(module, held[b], asked[b], mask[b])
        torch.testing.assert_close(weights[b], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[b], read, rtol=0, atol=1e-11)


@every_case
def test_nothing_is_read_where_there_is_nothing(case):
    module, (asked, *_) = case.lively(), queries()
    mask = torch.zeros(2, REGIONS, dtype=torch.bool)
    mask[1, 0] = True
    found, _ = module(asked, module.prepare(memory(), mask))
    assert not found[0].any()
    assert found[1].all()


def test_the_order_of_the_regions_does_not_matter_and_of_what_they_say_does():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    found, _ = module(asked, module.prepare(held))
    torch.testing.assert_close(module(asked, module.prepare(held.flip(1)))[0], found, rtol=0, atol=1e-11)
    prepared = module.prepare(held)
    mixed = prepared._replace(values=prepared.values.flip(1))
    assert not torch.allclose(module(asked, mixed)[0], found, rtol=0, atol=1e-2)


def test_a_word_reads_itself_and_those_before_it_as_torch_says():
    module, words = MultiHeadAttention(MEMORY, MEMORY, heads=2, causal=True).double(), memory()
    found, _ = module(words, module.prepare(words))
    query, key, value = (
        layer(words).unflatten(2, (2, -1)).transpose(1, 2) for layer in (module.query, module.key, module.value)
    )
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, module.out(y), rtol=0, atol=1e-11)
    weights, _ = module.attend(words, module.prepare(words))
    assert not weights.transpose(1, 2).triu(1).any()


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_word_by_word_is_all_words_at_once(slots, stride, masked):
    module, words = MultiHeadAttention(MEMORY, MEMORY, heads=2, causal=True, slots=slots).double(), memory()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, 4:6] = not masked
    at_once, _ = module(words, module.prepare(words, mask))
    prepared, found = module.prepare(words[:, :0], None), []
    for i in range(0, REGIONS, stride):
        part = slice(i, i + stride)
        prepared = module.extend(prepared, words[:, part], mask[:, part] if masked else None)
        found.append(module(words[:, part], prepared)[0])
    torch.testing.assert_close(torch.cat(found, 1), at_once, rtol=0, atol=1e-11)
    assert prepared.mask is None or torch.equal(prepared.mask, mask)


def test_extending_makes_keys_of_what_is_new_alone():
    module, words = MultiHeadAttention(MEMORY, MEMORY, heads=2), memory(dtype=torch.float)
    prepared, made = module.prepare(words), []
    module.key.register_forward_hook(lambda _, inputs, __: made.append(inputs[0].shape[1]))
    module.extend(prepared, words[:, :1])
    assert made == [1]


def test_keys_and_values_are_kept_in_the_model_s_dtype():
    prepared = CASES[1].lively(torch.bfloat16).prepare(memory(dtype=torch.bfloat16))
    assert {prepared.keys.dtype, prepared.values.dtype} == {torch.bfloat16}


def test_reads_without_the_matrix():
    module, x = MultiHeadAttention(8, 8, heads=2), torch.randn(1, 500, 8, requires_grad=True)
    with Largest() as largest:
        module(x, module.prepare(x))[0].sum().backward()
    assert largest.elements <= 500 * 8 * 4  # the matrix has 2 * 500 * 500


def test_a_fresh_slot_is_as_wide_as_its_paper_says():
    module = MultiHeadAttention(512, 512, slots=40)
    torch.testing.assert_close(float(module.slot_keys.std()), 1 / 64, rtol=0.05, atol=0)
    torch.testing.assert_close(float(module.slot_values.std()), 1 / 40, rtol=0.05, atol=0)


@pytest.mark.parametrize("heads", [0, 4])
def test_refuses_heads_that_do_not_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"heads must divide width=6, got {heads}"):
        MultiHeadAttention(QUERY, MEMORY, heads=heads)


def test_refuses_a_width_of_nothing_and_fewer_slots_than_none():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        MultiHeadAttention(QUERY, MEMORY, width=0)
    with pytest.raises(ValueError, match="slots must be at least 0, got -1"):
        MultiHeadAttention(QUERY, MEMORY, heads=2, slots=-1)


def test_forward_refuses_a_query_that_does_not_fit():
    module = CASES[0].lively()
    with pytest.raises(ValueError, match="query must have 6 features as constructed, got 5"):
        module(torch.randn(2, 3, 5).double(), module.prepare(memory()))
