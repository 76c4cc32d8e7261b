import math

import pytest
import torch

from tests.explain.test_adversary import LOOKED, deaf, open_book
from visattn.explain import between, even, permutation, shuffled, uniform


def test_rows_are_shuffled_together_and_nothing_is_lost():
    weights = torch.rand(2, 6)
    for each in shuffled(weights, 4):
        order = [weights[0].tolist().index(value) for value in each[0].tolist()]
        assert torch.equal(each, weights[:, order])
        assert sorted(order) == list(range(6))


def test_an_output_that_ignores_attention_does_not_move():
    assert permutation(deaf, LOOKED) == uniform(deaf, LOOKED) == 0


def test_an_output_that_is_its_weights_moves_as_they_do():
    assert permutation(open_book, LOOKED, times=101) == pytest.approx(0.96)  # three of four times the peak moves
    assert uniform(open_book, LOOKED) == pytest.approx(0.72)
    assert torch.equal(even(LOOKED), torch.full((1, 4), 0.25))


def test_maps_of_two_models_are_compared_as_shares():
    a, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.75, 0.25]])
    assert between(a, b).divergence == pytest.approx(0, abs=1e-7)
    assert between(a, b).agreement == pytest.approx(1)
    apart = between(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert apart.divergence == pytest.approx(math.log(2))
    assert apart.agreement == pytest.approx(-1)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="times must be at least 1, got 0"):
        permutation(deaf, LOOKED, times=0)
    with pytest.raises(ValueError, match=r"maps must have one shape, got \(1, 4\) and \(4, 1\)"):
        between(LOOKED, LOOKED.mT)
    for wrong in (-LOOKED, 0 * LOOKED):
        with pytest.raises(ValueError, match="maps must not be negative, and not zero everywhere"):
            between(LOOKED, wrong)
