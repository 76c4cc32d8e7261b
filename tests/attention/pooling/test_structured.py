import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import StructuredSelfAttentivePool

CASES = [
    Case(
        StructuredSelfAttentivePool,
        {},
        lambda c: c * c // 4 + c,
        (1088, 16_640),
        macs=lambda c, h, w: h * w * (c * c // 4 + c + 4 * c),
        sums_to_one=(2, 3),
    ),
    Case(
        StructuredSelfAttentivePool,
        {"hops": 2, "width": 8, "out_channels": 64},
        lambda c: 8 * c + 16 + 64 * (2 * c + 1),
        (8784, 34_896),
        macs=lambda c, h, w: h * w * (8 * c + 16 + 2 * c) + 64 * 2 * c,
        sums_to_one=(2, 3),
    ),
]


def paper(module: StructuredSelfAttentivePool, x: Tensor) -> Tensor:
    """Section 2.1 of the paper, in loops."""
    w1, w2 = module.inner.weight[:, :, 0], module.hop.weight[:, :, 0]
    y = []
    for sample in x.flatten(2):
        words = [sample[:, i] for i in range(sample.shape[1])]
        logits = [[row @ torch.tanh(w1 @ word) for word in words] for row in w2]
        rows = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in logits]
        y.append(torch.cat([sum(a * word for a, word in zip(row, words, strict=True)) for row in rows]))
    return torch.stack(y)


def lively(hops: int = 3, **options) -> StructuredSelfAttentivePool:
    module = StructuredSelfAttentivePool(8, hops=hops, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_equals_the_paper_in_loops():
    module, x = lively(), torch.randn(2, 8, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_does_not_see_where_things_are_but_does_see_which_hop_is_which():
    module, x = lively(), torch.randn(2, 8, 3, 5, dtype=torch.double)
    shuffled = x.flatten(2)[..., torch.randperm(15)].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x), rtol=0, atol=1e-12)
    hops = module(x).unflatten(1, (3, 8))
    assert not torch.allclose(hops[:, 0], hops[:, 1])


@pytest.mark.parametrize(("hops", "n"), [(1, 6), (3, 6), (4, 20)])
def test_penalty_of_uniform_hops(hops, n):
    uniform = torch.full((2, hops, 1, n), 1 / n)
    expected = hops**2 / n**2 - 2 * hops / n + hops
    torch.testing.assert_close(lively(hops).penalty(uniform), torch.tensor(expected), rtol=0, atol=1e-6)


def test_penalty_is_zero_for_hops_at_places_of_their_own_and_only_then():
    own = torch.eye(3, 6).view(1, 3, 2, 3)
    assert lively().penalty(own) == 0
    assert lively().penalty(own[:, [0, 1, 1]]) == 2
    mixed = torch.cat((own, own[:, [0, 1, 1]]))
    assert lively().penalty(mixed) == 1  # the mean, whatever the batch


def test_a_layer_after_the_hops_brings_the_vector_to_a_width():
    module, x = lively(out_channels=5), torch.randn(2, 8, 3, 5, dtype=torch.double)
    plain = lively()
    plain.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(module(x), module.out(plain(x)))


@pytest.mark.parametrize(("name", "value"), [("hops", 0), ("width", 0)])
def test_refuses_nothing_at_all(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        StructuredSelfAttentivePool(64, **{name: value})
