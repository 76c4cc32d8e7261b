import torch

from tests.attention.memory.case import MEMORY, QUERY, MemoryCase, memory, queries, steps
from visattn.attention import AdditiveAttention, CoverageAttention

CASES = [MemoryCase(CoverageAttention, {"width": 5}, lambda q, d: 5 * (q + d) + 3 * 5, 8975)]


def test_is_the_paper_s_score_with_the_sum_of_all_looks_before():
    module, held, asked = CASES[0].lively(), memory(), queries(steps=3)
    looked, _ = steps(module, asked, module.prepare(held))
    for b in range(2):
        for r in range(3):
            coverage = [torch.zeros(()).double() for _ in held[b]]
            for t, weights in enumerate(looked):
                scores = []
                for i, region in enumerate(held[b]):
                    inner = module.key.weight @ region + module.query.weight @ asked[t][b, r] + module.key.bias
                    inner = inner + module.coverage.weight[:, 0] * coverage[i]
                    scores.append(module.score.weight[0] @ torch.tanh(inner))
                exponentials = [score.exp() for score in scores]
                expected = torch.stack(exponentials) / sum(exponentials)
                torch.testing.assert_close(weights[b, r], expected, rtol=0, atol=1e-12)
                coverage = [before + now for before, now in zip(coverage, expected, strict=True)]


def test_looks_away_from_where_it_looked_if_it_learned_to():
    module = CoverageAttention(QUERY, MEMORY, width=5).double()
    with torch.no_grad():
        for parameter in (module.score.weight, module.coverage.weight):
            parameter.fill_(1.0)
        module.coverage.weight.neg_()
    prepared, (asked, *_) = module.prepare(memory()), queries()
    first, state = module.attend(asked, prepared)
    again, _ = module.attend(asked, prepared, state)
    torch.testing.assert_close(state, first)
    assert (again.gather(2, first.argmax(2, keepdim=True)) < first.amax(2, keepdim=True)).all()
    plain = AdditiveAttention(QUERY, MEMORY, width=5).double()
    plain.load_state_dict({name: each for name, each in module.state_dict().items() if name != "coverage.weight"})
    torch.testing.assert_close(first, plain.attend(asked, plain.prepare(prepared.values))[0], rtol=0, atol=1e-12)


def test_the_order_of_the_steps_before_does_not_matter_and_what_they_looked_at_does():
    module = CASES[0].lively()
    prepared, (query, *_) = module.prepare(memory()), queries()
    one, two, other = torch.rand(3, 2, 3, 15, dtype=torch.double).softmax(-1)
    ours, _ = module.attend(query, prepared, one + two)
    torch.testing.assert_close(module.attend(query, prepared, two + one)[0], ours, rtol=0, atol=1e-12)
    assert not torch.allclose(module.attend(query, prepared, one + other)[0], ours, rtol=0, atol=1e-4)


def test_the_penalty_is_what_is_looked_at_again():
    module, weights = CASES[0].make(), torch.rand(2, 3, 4, 5, dtype=torch.double).softmax(-1)  # b r t l
    expected = 0.0
    for b in range(2):
        for r in range(3):
            coverage = [0.0] * 5
            for t in range(4):
                for i in range(5):
                    expected += min(float(weights[b, r, t, i]), coverage[i])
                coverage = [before + float(now) for before, now in zip(coverage, weights[b, r, t], strict=True)]
    torch.testing.assert_close(float(module.penalty(weights)), expected / 6, rtol=0, atol=1e-12)
    assert module.penalty(torch.eye(4)[None]) == 0
    torch.testing.assert_close(float(module.penalty(torch.full((1, 4, 5), 0.25))), 3.75)


def test_steps_that_do_not_count_have_no_penalty():
    module, weights = CASES[0].make(), torch.rand(2, 4, 5, dtype=torch.double).softmax(-1)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    short = [module.penalty(weights[b : b + 1, :length]) for b, length in ((0, 3), (1, 2))]
    torch.testing.assert_close(module.penalty(weights, mask), sum(short) / 2, rtol=0, atol=1e-12)
