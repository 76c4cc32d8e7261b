import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, MemoryCase, memory, queries, small
from visattn.attention import HardAttention, LocalAttention, MultiHeadAttention, SentinelAttention
from visattn.attention.memory.hard import HardWeights
from visattn.models.decoders.core import stacked

CASES = [
    MemoryCase(HardAttention, {"attention": small}, lambda q, d: 5 * (q + d) + 2 * 5, 8970),
    MemoryCase(
        HardAttention,
        {"attention": small, "evaluation": "argmax", "temperature": 0.5},
        lambda q, d: 5 * (q + d) + 2 * 5,
        8970,
    ),
]


def mask() -> Tensor:
    there = torch.ones(2, REGIONS, dtype=torch.bool)
    there[0, 5:] = False
    there[1] = False
    return there


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_probabilities_are_those_inside_sharpened(case):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    inner, _ = module.attention.attend(asked, module.attention.prepare(held, mask()))
    prepared = module.prepare(held, mask())
    maps, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            powers = [float(weight) ** (1 / module.temperature) for weight in inner[b, r].detach()]
            right = torch.tensor([each / (sum(powers) or 1) for each in powers], dtype=torch.double)
            torch.testing.assert_close(maps.probabilities[b, r], right, rtol=0, atol=1e-12)
            read = right @ held[b]
            if module.evaluation == "argmax" and b == 0:
                read = held[b, right.argmax()]
            torch.testing.assert_close(found[b, r], read, rtol=0, atol=1e-12)


def test_draws_one_region_as_often_as_it_is_likely():
    module, held = HardAttention(QUERY, MEMORY, attention=small, expected=0.0, temperature=0.7).double(), memory()
    torch.nn.init.normal_(module.attention.score.weight, std=2)
    count = 20000
    asked = torch.randn(2, 1, QUERY, dtype=torch.double).expand(-1, count, -1)
    prepared = module.prepare(held, mask())
    maps, _ = module.attend(asked, prepared)
    found = module.read(asked, prepared, weights=maps)
    drawn, p = maps.weights[0], maps.probabilities[0, 0]
    assert torch.equal(drawn.sort(1).values[:, -2:], torch.tensor([0.0, 1.0]).double().expand(count, -1))
    assert ((drawn.mean(0) - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    assert torch.equal(found[0], held[0][drawn.argmax(1)])
    assert not maps.weights[1].any()
    assert not found[1].any()


def test_a_whole_minibatch_is_read_with_the_probabilities_or_with_draws():
    module, held, asked = HardAttention(QUERY, MEMORY, attention=small, expected=0.3).double(), memory(), queries()
    soft = []
    for _ in range(150):
        prepared = module.prepare(held)
        maps = [module.attend(query, prepared)[0] for query in asked]
        kinds = {bool((each == p).all()) for step in maps for each, p in zip(*step, strict=True)}
        assert len(kinds) == 1
        soft += kinds
    assert 0.15 < sum(soft) / len(soft) < 0.45


def test_no_gradient_goes_through_a_draw_and_one_goes_through_what_is_expected():
    held, (asked, *_) = memory(), queries()
    for expected in (0.0, 1.0):
        module = HardAttention(QUERY, MEMORY, attention=small, expected=expected).double()
        found, _ = module(asked.requires_grad_(), module.prepare(held))
        gradients = torch.autograd.grad(found.sum(), [asked, *module.parameters()])
        assert all(bool(each.any()) == bool(expected) for each in gradients)


def test_the_gradient_of_a_log_probability_is_that_of_the_draw():
    module, (asked, *_) = HardAttention(QUERY, MEMORY, attention=small, expected=0.0).double(), queries()
    prepared = module.prepare(memory(), mask())
    maps, _ = module.attend(asked, prepared)
    choice = maps.weights.argmax(2)
    scores = module.attention.scores(asked, prepared)[0, :, :5]
    ours = maps.log_probability()
    right = scores.log_softmax(1).gather(1, choice[0][:, None])[:, 0]
    torch.testing.assert_close(ours[0], right, rtol=0, atol=1e-12)
    assert not ours[1].any()
    weights = list(module.attention.parameters())
    gradients = [torch.autograd.grad(each.sum(), weights, retain_graph=True) for each in (ours[0], right)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_is_expected_has_no_reward():
    module, (asked, *_) = HardAttention(QUERY, MEMORY, attention=small, expected=1.0).double(), queries()
    maps, _ = module.attend(asked, module.prepare(memory()))
    for gradient in torch.autograd.grad(maps.log_probability().sum(), list(module.attention.parameters())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_a_reward_moves_the_probabilities_as_the_whole_sum_would():
    """The gradient of a mean reward, from many draws, and from all there can be."""
    module = HardAttention(QUERY, MEMORY, attention=small, expected=0.0).double()
    held, count = torch.randn(1, 4, MEMORY, dtype=torch.double), 40000
    asked = torch.randn(1, 1, QUERY, dtype=torch.double)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    maps, _ = module.attend(asked.expand(-1, count, -1), module.prepare(held))
    weight = module.attention.key.weight
    drawn = (maps.log_probability() * (maps.weights @ rewards)).mean()
    whole = maps.probabilities[0, 0] @ rewards
    (ours,), (right,) = (torch.autograd.grad(each, weight, retain_graph=True) for each in (drawn, whole))
    torch.testing.assert_close(ours, right, rtol=0, atol=0.05 * float(right.abs().max()))


def test_steps_that_do_not_count_have_neither_probability_nor_entropy():
    module, held, asked = CASES[0].lively(), memory(), queries(steps=3)
    prepared = module.prepare(held, mask())
    maps = stacked([module.attend(query, prepared)[0] for query in asked])
    assert isinstance(maps, HardWeights)
    counts = torch.rand(2, 3, 3) < 0.5
    p = maps.probabilities
    right = -(p * torch.where(p > 0, p, 1).log()).sum(3)
    torch.testing.assert_close(maps.entropy(), right, rtol=0, atol=1e-12)
    torch.testing.assert_close(maps.entropy(counts), right * counts, rtol=0, atol=1e-12)
    torch.testing.assert_close(maps.log_probability(counts), maps.log_probability() * counts, rtol=0, atol=0)
    level = HardWeights(*[torch.full((1, 2, 8), 1 / 8)] * 2)
    torch.testing.assert_close(level.entropy(), torch.full((1, 2), 8.0).log())


def test_what_heads_and_layers_draw_together_has_the_sum():
    p = torch.rand(2, 3, 4, 2, 5, REGIONS, dtype=torch.double).softmax(-1)  # of four steps, two layers and five heads
    drawn = torch.nn.functional.one_hot(torch.randint(REGIONS, p.shape[:-1]), REGIONS).double()
    maps, counts = HardWeights(drawn, p), torch.rand(2, 3, 4) < 0.5
    for b in range(2):
        for r in range(3):
            for t in range(4):
                each = [(drawn[b, r, t, n, h], p[b, r, t, n, h]) for n in range(2) for h in range(5)]
                likely = sum((s * a.log()).sum() for s, a in each) * counts[b, r, t]
                entropy = -sum((a * a.log()).sum() for _, a in each) * counts[b, r, t]
                torch.testing.assert_close(maps.log_probability(counts)[b, r, t], likely, rtol=0, atol=1e-11)
                torch.testing.assert_close(maps.entropy(counts)[b, r, t], entropy, rtol=0, atol=1e-11)
    assert maps.log_probability().shape == p.shape[:-1]


def test_draws_can_be_read_again():
    module, held, asked = CASES[0].lively().train(), memory(), queries()
    module.expected = 0.0
    prepared = module.prepare(held, mask())
    maps = stacked([module.attend(query, prepared)[0] for query in asked])
    for t, query in enumerate(asked):
        again, _ = module.attend(query, prepared, None, maps.choice[:, :, t])
        assert torch.equal(again.weights, maps.weights[:, :, t])
    module.expected = 1.0
    assert module.attend(asked[0], module.prepare(held))[0].choice is None


@pytest.mark.parametrize("training", [False, True])
def test_reads_from_the_regions_of_a_proposal(training):
    module, held, (asked, *_) = CASES[0].lively().train(training), memory(), queries()
    choice = torch.randint(REGIONS, (2, 3))
    prepared = module.prepare(held)
    maps, _ = module.attend(asked, prepared, None, choice)
    found = module.read(asked, prepared, weights=maps)
    assert torch.equal(found, held[torch.arange(2)[:, None], choice])
    right = maps.probabilities.gather(2, choice[..., None])[..., 0].log()
    torch.testing.assert_close(maps.log_probability(), right, rtol=0, atol=1e-12)


def test_the_order_of_the_regions_does_not_matter_and_of_what_they_say_does():
    module, held, (asked, *_) = CASES[1].lively(), memory(), queries()
    prepared = module.prepare(held)
    found, _ = module(asked, prepared)
    assert torch.equal(module(asked, module.prepare(held.flip(1)))[0], found)
    mixed = prepared._replace(values=prepared.values.flip(1))
    assert not torch.allclose(module(asked, mixed)[0], found, rtol=0, atol=1e-2)


def test_every_head_draws_for_itself_and_a_sentinel_can_be_drawn():
    held = memory(dtype=torch.float)
    heads = HardAttention(8, MEMORY, attention=MultiHeadAttention, expected=0.0)
    maps, _ = heads.attend(torch.randn(2, 3, 8), heads.prepare(held))
    assert maps.weights.shape == (2, 3, 8, REGIONS)
    assert torch.equal(maps.weights.sum(3), torch.ones(2, 3, 8))
    assert len(maps.weights[0, 0].argmax(1).unique()) > 1
    sentinel = HardAttention(QUERY, MEMORY, attention=SentinelAttention, expected=0.0)
    assert sentinel.asks == 2 * QUERY
    asked, prepared = torch.randn(2, 3, 2 * QUERY), sentinel.prepare(held)
    last, _ = sentinel.attend(asked, prepared, None, torch.full((2, 3), REGIONS))
    torch.testing.assert_close(sentinel.read(asked, prepared, weights=last), asked[..., QUERY:], rtol=0, atol=0)


def test_weights_that_do_not_sum_to_one_are_drawn_in_proportion():
    module = HardAttention(QUERY, MEMORY, attention=LocalAttention).double().eval()
    held, (asked, *_) = memory(), queries()
    prepared = module.prepare(held, None, (3, 5))
    inner, _ = module.attention.attend(asked, module.attention.prepare(held, None, (3, 5)))
    maps, _ = module.attend(asked, prepared)
    assert module.needs_size
    torch.testing.assert_close(maps.probabilities, inner / inner.sum(2, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
        ({"evaluation": "soft"}, "evaluation must be expected or argmax, got 'soft'"),
        ({"expected": 1.5}, r"expected must lie in \[0, 1\], got 1\.5"),
        ({"attention": HardAttention}, "attention must mix regions, got HardAttention, which picks"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        HardAttention(QUERY, MEMORY, **options)
