import math

import pytest
import torch

from visattn.explain import adversary, jensen_shannon

LOOKED = torch.tensor([[0.97, 0.01, 0.01, 0.01]])


def deaf(weights):
    """A network whose output ignores attention."""
    return torch.tensor([0.7, 0.3]).expand(len(weights), 2) + 0 * weights.sum((1, 2))[:, None]


def open_book(weights):
    """A network whose output is its weights."""
    return weights[:, 0]


def twins(weights):
    """A network in which the first region says what the second does."""
    likely = weights[:, 0, :2].sum(1)
    return torch.stack((likely, 1 - likely), 1)


def test_where_the_output_ignores_attention_weights_go_as_far_as_they_can():
    found = adversary(deaf, LOOKED)
    assert found.divergence > 0.95 * math.log(2) * (1 - 0.03)
    assert found.moved == 0
    assert found.weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_where_the_output_is_the_weights_they_cannot_move():
    for epsilon in (0.01, 0.1):
        found = adversary(open_book, LOOKED, epsilon=epsilon)
        assert found.moved <= epsilon
        assert found.divergence <= epsilon * math.log(2)  # the bound that total variation sets


def test_of_two_regions_that_say_the_same_the_other_is_found():
    found = adversary(twins, LOOKED, epsilon=0.01)
    assert found.weights[0, 1] > 0.9
    assert found.divergence > 0.5
    assert found.moved <= 0.01
    own = twins(LOOKED[None])[0]
    assert (twins(found.weights[None])[0] - own).abs().sum() / 2 == pytest.approx(found.moved, abs=1e-6)


def test_rows_keep_their_sums_and_gates_their_range():
    shares = torch.tensor([[0.5, 0.1, 0.1], [2.0, 0.1, 0.1]])
    found = adversary(deaf, shares)
    torch.testing.assert_close(found.weights.sum(1), shares.sum(1))
    gates = torch.tensor([[0.9, 0.8, 0.1]])
    found = adversary(deaf, gates, gates=True)
    assert ((found.weights >= 0) & (found.weights <= 1)).all()
    p, q = gates / gates.sum(), found.weights / found.weights.sum()
    assert jensen_shannon(p, q).item() == pytest.approx(found.divergence, abs=1e-5)


def test_the_same_chance_finds_the_same():
    first, second = (adversary(twins, LOOKED, steps=20, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (LOOKED, {"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        (LOOKED, {"starts": 0}, "starts must be at least 1, got 0"),
        (LOOKED, {"steps": 0}, "steps must be at least 1, got 0"),
        (-LOOKED, {}, "weights must not be negative, got -0.97"),
        (LOOKED * torch.nan, {}, "weights must not be negative, got nan"),
        (2 * LOOKED, {"gates": True}, "weights of gates must be at most 1, got 1.94"),
    ],
)
def test_bad_input_is_refused(weights, options, message):
    with pytest.raises(ValueError, match=message):
        adversary(deaf, weights, **options)
