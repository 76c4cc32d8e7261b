import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from visattn.explain import jensen_shannon, kendall, total_variation


def tau(a: list[float], b: list[float]) -> float:
    """Kendall's τ-b as he wrote it: pairs one by one."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    signs = [tuple((x[i] > x[j]) - (x[i] < x[j]) for x in (a, b)) for i, j in pairs]
    untied = [sum(sign[k] != 0 for sign in signs) for k in (0, 1)]
    return sum(s * t for s, t in signs) / math.sqrt(untied[0] * untied[1])


def test_rank_correlation_counts_pairs_and_knows_ties():
    for _ in range(20):
        a, b = torch.randint(6, (2, 3, 4)).float()
        assert kendall(a, b) == pytest.approx(tau(a.flatten().tolist(), b.flatten().tolist()), abs=1e-12)
    a = torch.randn(5)
    assert kendall(a, a.exp()) == pytest.approx(1)
    assert kendall(a, -a) == pytest.approx(-1)
    assert math.isnan(kendall(a, torch.ones(5)))


def test_divergence_is_that_of_scipy_and_total_variation_that_of_sums():
    p, q = torch.rand(2, 7, 9, dtype=torch.double).softmax(2)
    expected = [jensenshannon(a, b) ** 2 for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    assert jensen_shannon(p, q).tolist() == pytest.approx(expected, abs=1e-12)
    assert total_variation(p, q).tolist() == pytest.approx(((p - q).clamp_min(0).sum(1)).tolist(), abs=1e-12)
    assert (jensen_shannon(p, q) <= total_variation(p, q) * math.log(2)).all()


def test_a_divergence_has_a_gradient_where_a_weight_is_zero():
    p, q = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([0.5, 0.5])
    jensen_shannon(p, q).backward()
    assert p.grad.isfinite().all()


def test_maps_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"maps must have one shape, got \(2,\) and \(3,\)"):
        kendall(torch.ones(2), torch.ones(3))
