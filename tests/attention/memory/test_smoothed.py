import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries
from visattn.attention import MultiplicativeAttention, SmoothedAttention

CASES = [
    MemoryCase(SmoothedAttention, {}, lambda q, d: q * d, 655_360, ordered=True),
    MemoryCase(SmoothedAttention, {"radius": 1}, lambda q, d: q * d, 655_360, ordered=True),
]


def paper(held: Tensor, mask: Tensor, width: int, radius: int) -> Tensor:
    """The means of what is there among the neighbours, in loops, of an image whose rows are so wide."""
    means = []
    for i in range(len(held)):
        near = [
            held[j]
            for j in range(len(held))
            if max(abs(i // width - j // width), abs(i % width - j % width)) <= radius and mask[j]
        ]
        means.append(sum(near) / len(near) if near else torch.zeros_like(held[0]))
    return torch.stack(means)


@pytest.mark.parametrize("size", [SIZE, None], ids=str)
@pytest.mark.parametrize("radius", [1, 2, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_looks_sharply_and_reads_what_is_around(size, radius, masked):
    module, held, (asked, *_) = SmoothedAttention(QUERY, MEMORY, radius=radius).double(), memory(), queries()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, 1:9] = not masked
    found, _ = module(asked, module.prepare(held, mask if masked else None, size))
    for b in range(2):
        values = paper(held[b], mask[b], REGIONS if size is None else size[1], radius)
        for r in range(3):
            scores = [asked[b, r] @ module.key.weight @ region for region in held[b]]  # module.key.weight is P^T
            exponentials = [score.exp() * there for score, there in zip(scores, mask[b], strict=True)]
            read = sum(weight * value for weight, value in zip(exponentials, values, strict=True)) / sum(exponentials)
            torch.testing.assert_close(found[b, r], read, rtol=0, atol=1e-11)


def test_looks_where_multiplicative_attention_looks():
    module, held, (asked, *_) = CASES[0].lively(), memory(), queries()
    plain = MultiplicativeAttention(QUERY, MEMORY).double()
    plain.load_state_dict(module.state_dict())
    prepared = module.prepare(held, None, SIZE)
    torch.testing.assert_close(module.attend(asked, prepared)[0], plain.attend(asked, prepared)[0])
    assert not torch.allclose(module(asked, prepared)[0], plain(asked, plain.prepare(held))[0], rtol=0, atol=1e-2)


def test_reads_a_level_map_as_it_is_and_turned_around_the_same():
    module, (asked, *_) = CASES[0].lively(), queries()
    level = torch.ones(2, REGIONS, MEMORY, dtype=torch.double)
    torch.testing.assert_close(module(asked, module.prepare(level, None, SIZE))[0], torch.ones(2, 3, MEMORY).double())
    held = memory()
    found = module(asked, module.prepare(held, None, SIZE))[0]
    torch.testing.assert_close(module(asked, module.prepare(held.flip(1), None, SIZE))[0], found)
    assert not torch.allclose(module(asked, module.prepare(held, None, (5, 3)))[0], found, rtol=0, atol=1e-2)


def test_refuses_a_radius_of_nothing():
    with pytest.raises(ValueError, match="radius must be at least 1, got 0"):
        SmoothedAttention(QUERY, MEMORY, radius=0)
