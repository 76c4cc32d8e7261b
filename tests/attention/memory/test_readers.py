import math

import torch

from tests.attention.memory.case import MemoryCase, memory, queries, steps
from visattn.attention import AdditiveAttention, AttentiveReader, ImpatientReader

CASES = [
    MemoryCase(AttentiveReader, {"width": 5}, lambda q, d: 5 * (q + d) + 2 * 5 + q * (d + q), 926_474),
    MemoryCase(ImpatientReader, {"width": 5}, lambda q, d: 5 * (q + d) + 2 * 5 + q * (d + q) + d * (5 + d), 2_571_274),
]


@torch.no_grad()
def test_the_attentive_reader_is_the_paper_s():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    prepared = module.prepare(held)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            u = asked[b, r]
            m = [(module.key.weight @ y + module.key.bias + module.query.weight @ u).tanh() for y in held[b]]
            exponentials = [math.exp(module.score.weight[0] @ each) for each in m]
            s = torch.tensor([each / sum(exponentials) for each in exponentials], dtype=torch.double)
            read = sum(weight * y for weight, y in zip(s, held[b], strict=True))
            g = (module.found.weight @ read + module.asked.weight @ u).tanh()
            torch.testing.assert_close(weights[b, r], s, rtol=0, atol=1e-12)
            torch.testing.assert_close(found[b, r], g, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_impatient_reader_is_the_paper_s_word_by_word():
    module, held, asked = CASES[1].lively(), memory(), queries(steps=4)
    looked, said = steps(module, asked, module.prepare(held))
    for b in range(2):
        for i in range(3):
            r = torch.zeros(8, dtype=torch.double)
            for t, words in enumerate(asked):
                shared = module.query.weight @ words[b, i] + module.before.weight @ r + module.key.bias
                m = [(module.key.weight @ y + shared).tanh() for y in held[b]]
                exponentials = [math.exp(module.score.weight[0] @ each) for each in m]
                s = torch.tensor([each / sum(exponentials) for each in exponentials], dtype=torch.double)
                r = sum(weight * y for weight, y in zip(s, held[b], strict=True)) + (module.kept.weight @ r).tanh()
                g = (module.found.weight @ r + module.asked.weight @ words[b, i]).tanh()
                torch.testing.assert_close(looked[t][b, i], s, rtol=0, atol=1e-12)
                torch.testing.assert_close(said[t][b, i], g, rtol=0, atol=1e-11)


def test_the_attentive_reader_looks_where_additive_attention_looks_and_says_more():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    plain = AdditiveAttention(6, 8, width=5).double()
    plain.load_state_dict({name: each for name, each in module.state_dict().items() if name in plain.state_dict()})
    theirs = plain.prepare(held)
    prepared = module.prepare(held)
    torch.testing.assert_close(module.attend(asked, prepared)[0], plain.attend(asked, theirs)[0], rtol=0, atol=0)
    level = torch.ones_like(held)
    said, _ = module(asked, module.prepare(level))
    assert not torch.allclose(said[:, 0], said[:, 1], rtol=0, atol=1e-2)  # plain attention reads ones for any query


def test_the_first_word_is_read_as_the_attentive_reader_reads_and_the_order_of_words_matters():
    module, held, (first, second) = CASES[1].lively(), memory(), queries()
    plain = AttentiveReader(6, 8, width=5).double()
    plain.load_state_dict({name: each for name, each in module.state_dict().items() if name in plain.state_dict()})
    prepared = module.prepare(held)
    said, state = module(first, prepared)
    torch.testing.assert_close(said, plain(first, plain.prepare(held))[0], rtol=0, atol=0)
    _, other = module(second, prepared)
    ends = module(second, prepared, state)[1], module(first, prepared, other)[1]
    assert not torch.allclose(*ends, rtol=0, atol=1e-2)


def test_the_order_of_the_regions_does_not_matter_to_either():
    for case in CASES:
        module, held, asked = case.lively(), memory(), queries(steps=3)
        _, said = steps(module, asked, module.prepare(held))
        _, other = steps(module, asked, module.prepare(held.flip(1)))
        torch.testing.assert_close(other, said, rtol=0, atol=1e-11)
