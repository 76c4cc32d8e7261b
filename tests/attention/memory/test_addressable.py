import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries, steps
from visattn.attention import AddressableMemory

CASES = [
    MemoryCase(AddressableMemory, {"width": 4}, lambda q, d: 4 * d + 4 + (q + 1) * 40, 25_644, ordered=True),
    MemoryCase(
        AddressableMemory,
        {"width": 4, "reach": 2, "axes": 1},
        lambda q, d: 4 * d + 4 + (q + 1) * 32,
        21_540,
        ordered=True,
    ),
]


def address(head: Any, query: Tensor, tape: Tensor, before: Tensor, mask: Tensor, axes: int) -> Tensor:
    """Equations 5 to 9 of the paper, one after another."""
    height, width = SIZE if axes == 2 else (1, REGIONS)
    key = head.content.query(query)
    beta = math.log1p(math.exp(head.content.sharpness(query)))
    content = torch.zeros(REGIONS, dtype=torch.double)
    for i in range(REGIONS):
        if mask[i]:
            content[i] = math.exp(beta * F.cosine_similarity(key, tape[i], 0))
    gate = 1 / (1 + math.exp(-head.gate(query)))
    looks = gate * content / content.sum() + (1 - gate) * before
    shifts = head.shift(query).exp() / head.shift(query).exp().sum()
    steps = range(-head.reach, head.reach + 1)
    moved = torch.zeros(REGIONS, dtype=torch.double)
    for i in range(REGIONS):
        for share, (y, x) in zip(shifts, product(steps if axes == 2 else [0], steps), strict=True):
            moved[(i // width + y) % height * width + (i % width + x) % width] += share * looks[i]
    sharp = (moved * mask) ** (1 + math.log1p(math.exp(head.sharpness(query))))
    return sharp / sharp.sum()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_is_the_paper_s_machine_step_by_step(case, masked):
    module, held, asked = case.lively(), memory(), queries(steps=4)
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, REGIONS - 4 :] = not masked
    looked, found = steps(module, asked, module.prepare(held, mask if masked else None, SIZE))
    for b in range(2):
        for r in range(3):
            tape = torch.stack([module.cell.weight @ region + module.cell.bias for region in held[b]])
            read = write = mask[b] / mask[b].sum().double()
            for t, query in enumerate(each[b, r] for each in asked):
                read = address(module.reading, query, tape, read, mask[b], module.axes)
                write = address(module.writing, query, tape, write, mask[b], module.axes)
                torch.testing.assert_close(looked[t][b, r], read, rtol=0, atol=1e-11)
                torch.testing.assert_close(found[t][b, r], read @ tape, rtol=0, atol=1e-10)
                erase, add = module.erase(query).sigmoid(), module.add(query)
                tape = torch.stack([cell * (1 - w * erase) + w * add for cell, w in zip(tape, write, strict=True)])


def fixed(module: AddressableMemory, head: str, **values: Any) -> None:
    """A head that does the same for all queries."""
    for name, value in values.items():
        layer = getattr(module, head).get_submodule(name)
        torch.nn.init.zeros_(layer.weight)
        with torch.no_grad():
            layer.bias.copy_(torch.as_tensor(value, dtype=torch.double))


def test_finds_what_it_wrote():
    """A thing is written where a region is like the key, and found again by the place beside it."""
    module, held, (asked, *_) = AddressableMemory(QUERY, MEMORY, width=MEMORY).double(), memory(), queries()
    torch.nn.init.eye_(module.cell.weight)
    torch.nn.init.zeros_(module.cell.bias)
    held[:, 7] = 0
    held[:, 7, 0] = 9
    key, still, right = torch.eye(MEMORY)[0], -1e3 * (torch.arange(9) != 4), -1e3 * (torch.arange(9) != 5)
    for head, shift in (("writing", still), ("reading", right)):
        parts = {"content.query": key, "content.sharpness": 1e3, "gate": 1e3, "shift": shift, "sharpness": 1e3}
        fixed(module, head, **parts)
    torch.nn.init.zeros_(module.erase.weight)
    torch.nn.init.constant_(module.erase.bias, 1e3)
    prepared = module.prepare(held, None, SIZE)
    weights, tape = module.attend(asked, prepared)
    assert torch.equal(weights.argmax(2), torch.full((2, 3), 8))  # one to the right of 7
    torch.testing.assert_close(tape.memory[:, :, 7], module.add(asked), rtol=0, atol=1e-9)
    kept = torch.arange(REGIONS) != 7
    torch.testing.assert_close(tape.memory[:, 1, kept], held[:, kept], rtol=0, atol=1e-9)
    fixed(module, "reading", gate=-1e3, shift=-1e3 * (torch.arange(9) != 3))
    again, _ = module.attend(asked, prepared, tape)
    assert torch.equal(again.argmax(2), torch.full((2, 3), 7))
    found = module.read(asked, prepared, tape, weights=again)
    torch.testing.assert_close(found, module.add(asked), rtol=0, atol=1e-9)


def test_is_a_torus_and_turned_around_it_does_not_look_the_same():
    module, held, asked = CASES[0].lively(), memory(), queries()

    def look(held: Tensor) -> Tensor:
        return torch.stack(steps(module, asked, module.prepare(held, None, SIZE))[0]).unflatten(3, SIZE)

    looked, grid = look(held), held.unflatten(1, SIZE)
    rolled = look(grid.roll((1, 2), (1, 2)).flatten(1, 2))
    torch.testing.assert_close(rolled, looked.roll((1, 2), (3, 4)), rtol=0, atol=1e-11)
    turned = look(grid.flip(1, 2).flatten(1, 2))
    assert not torch.allclose(turned, looked.flip(3, 4), rtol=0, atol=1e-3)


def test_who_asks_writes_for_itself_alone():
    module, (first, second) = CASES[0].lively(), queries()
    prepared = module.prepare(memory(), None, SIZE)
    _, tape = module.attend(first, prepared)
    assert not torch.allclose(tape.memory[:, 0], tape.memory[:, 1], rtol=0, atol=1e-2)
    found, _ = module(second, prepared, tape)
    assert not torch.allclose(found, module(second, prepared)[0], rtol=0, atol=1e-3)


def test_the_sharpest_look_is_finite():
    module, held, (first, second) = CASES[0].lively(torch.float), memory(dtype=torch.float), queries(dtype=torch.float)
    for head in (module.reading, module.writing):
        torch.nn.init.constant_(head.sharpness.bias, 1e4)
    prepared = module.prepare(held, None, SIZE)
    _, tape = module.attend(first, prepared)
    weights, _ = module.attend(second, prepared, tape)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 3))


def test_refuses_what_makes_no_sense(unchecked):
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        AddressableMemory(QUERY, MEMORY, width=0)
    with pytest.raises(ValueError, match="reach must not be negative, got -1"):
        AddressableMemory(QUERY, MEMORY, reach=-1)
    with pytest.raises(ValueError, match="axes must be 1 or 2, got 3"):
        AddressableMemory(QUERY, MEMORY, axes=3)
