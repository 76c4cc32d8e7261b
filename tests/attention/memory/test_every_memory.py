"""What holds for every memory attention; one line in a module's own test file brings it under all of it."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, gather, memory, queries, steps
from visattn.attention import memory as family

CASES_OF_ALL = gather()
every_case = pytest.mark.parametrize("case", CASES_OF_ALL, ids=str)


def some(batch: int = 2) -> Tensor:
    """A mask with two regions gone."""
    mask = torch.ones(batch, REGIONS, dtype=torch.bool)
    mask[:, 3] = mask[:, REGIONS - 1] = False
    return mask


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def reordered(tree: Any, order: Tensor) -> Any:
    return tree_map(lambda each: each[:, order] if isinstance(each, Tensor) else each, tree)


def close(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def same(ours: Any, theirs: Any) -> bool:
    pairs = zip(tensors(ours), tensors(theirs), strict=True)
    return all(torch.allclose(one, other, rtol=0, atol=1e-11) for one, other in pairs)


def test_the_table_holds_every_memory_attention():
    assert {case.cls.__name__ for case in CASES_OF_ALL} == set(family.__all__)


@every_case
def test_reads_so_many_features_for_each_query(case):
    module = case.lively()
    _, found = steps(module, queries(), module.prepare(memory(), some(), SIZE))
    for each in found:
        assert each.shape == (2, 3, module.features)
        assert each.isfinite().all()


@every_case
def test_forward_reads_where_it_attends(case):
    module, asked = case.lively(), queries()
    prepared = module.prepare(memory(), some(), SIZE)
    _, found = steps(module, asked, prepared)
    state, forwards = None, []
    for query in asked:
        read, state = module(query, prepared, state)
        forwards.append(read)
    close(forwards, found)


@every_case
def test_weights_sum_to_one_where_they_should(case):
    module = case.lively()
    looked, _ = steps(module, queries(), module.prepare(memory(), None, SIZE))
    sums = torch.stack([each.sum(-1) for each in tensors(looked)])
    assert torch.allclose(sums, torch.ones_like(sums)) == case.sums_to_one


@every_case
def test_what_is_masked_is_neither_looked_at_nor_read(case):
    module, asked, held = case.lively(), queries(), memory()
    looked, found = steps(module, asked, module.prepare(held, some(), SIZE))
    other = torch.where(some()[..., None], held, torch.randn_like(held) * 100)
    close(steps(module, asked, module.prepare(other, some(), SIZE)), (looked, found))
    assert not any(each[..., 3].any() or each[..., REGIONS - 1].any() for each in tensors(looked))


@every_case
def test_nothing_is_read_from_a_memory_of_nothing(case):
    module, mask = case.lively(), some()
    mask[0] = False
    held, asked = memory().requires_grad_(), [each.requires_grad_() for each in queries()]
    looked, found = steps(module, asked, module.prepare(held, mask, SIZE))
    assert not any(each[0].any() for each in tensors(looked) + found)
    alone = steps(module, [each[1:] for each in asked], module.prepare(held[1:], mask[1:], SIZE))
    close([each[1:] for each in found], alone[1])
    gradients = torch.autograd.grad(torch.stack(found).sum(), (held, *asked), allow_unused=True)
    assert all(each.isfinite().all() for each in gradients if each is not None)


@every_case
def test_all_who_ask_share_one_memory_and_nothing_else_iff_it_says_so(case):
    module, held, asked = case.lively(), memory(), queries()
    together = steps(module, asked, module.prepare(held, some(), SIZE))
    repeated = module.prepare(held.repeat_interleave(3, 0), some(6), SIZE)
    alone = steps(module, [each.flatten(0, 1)[:, None] for each in asked], repeated)
    assert (
        same([each.flatten(0, 1) for each in tensors(together)], [each.squeeze(1) for each in tensors(alone)])
        == case.alike
    )


@every_case
def test_images_do_not_mix(case):
    module, held, asked = case.lively(), memory(), queries()
    together = steps(module, asked, module.prepare(held, some(), SIZE))
    for i in range(2):
        alone = steps(module, [each[i : i + 1] for each in asked], module.prepare(held[i : i + 1], some(1), SIZE))
        close([each[i : i + 1] for each in tensors(together)], alone)


@every_case
def test_beams_can_be_put_in_another_order_iff_they_are_alike(case):
    module = case.lively()
    prepared = module.prepare(memory(), some(), SIZE)
    first, second = queries()
    _, state = module.attend(first, prepared)
    order = torch.tensor([2, 0, 0])
    assert (state is not None) == module.stateful
    assert all(each.shape[:2] == (2, 3) for each in tensors(state))
    weights, after = module.attend(second, prepared, state)
    moved = module.attend(second[:, order], prepared, reordered(state, order))
    assert same(moved, reordered((weights, after), order)) == case.alike


@every_case
def test_the_order_of_the_regions_matters_iff_it_says_so(case):
    module, held, asked = case.lively(), memory(), queries()
    order = torch.randperm(REGIONS, generator=torch.Generator().manual_seed(1))
    _, found = steps(module, asked, module.prepare(held, None, SIZE))
    _, other = steps(module, asked, module.prepare(held[:, order], None, SIZE))
    assert same(found, other) != case.ordered


@every_case
def test_gradient_is_correct(case):
    module, held, asked = case.lively(), memory(1), queries(1, 2)
    names = [name for name, _ in module.named_parameters()]

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, held: Tensor, *asked: Tensor) -> tuple[Tensor, ...]:
            return tuple(steps(self.module, list(asked), self.module.prepare(held, some(1), SIZE))[1])

    def call(held: Tensor, *rest: Tensor) -> Any:
        given = {f"module.{name}": each for name, each in zip(names, rest[len(asked) :], strict=True)}
        return functional_call(Steps(), given, (held, *rest[: len(asked)]))

    inputs = [held, *asked, *(parameter.detach().clone() for parameter in module.parameters())]
    assert torch.autograd.gradcheck(call, tuple(each.requires_grad_() for each in inputs), fast_mode=True)


@every_case
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_is_finite_in_bf16_and_keeps_the_dtype(case, autocast):
    dtype = torch.float if autocast else torch.bfloat16
    module = case.lively(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        looked, found = steps(module, queries(dtype=dtype), module.prepare(memory(dtype=dtype), some(), SIZE))
    for each in tensors(looked) + found:
        assert each.isfinite().all()
        assert each.dtype == dtype


@every_case
def test_scores_are_not_rounded_under_autocast(case):
    module, asked, held = case.lively(torch.float), queries(dtype=torch.float), memory(dtype=torch.float)
    exact, _ = steps(module, asked, module.prepare(held * 20, None, SIZE))
    with torch.autocast("cpu", torch.bfloat16):
        looked, _ = steps(module, asked, module.prepare(held * 20, None, SIZE))
    assert all(each.dtype == torch.float for each in tensors(looked))
    sums = [each.sum(-1) for each in tensors(looked)]
    close(sums, [each.sum(-1) for each in tensors(exact)], 1e-1 if not case.sums_to_one else 1e-5)


@every_case
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_weights_round_trip(case, way):
    module, held, asked = case.lively(), memory(), queries()
    twin = case.make().double().eval() if way == "state_dict" else copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    assert twin.arguments == module.arguments
    close(steps(twin, asked, twin.prepare(held, None, SIZE)), steps(module, asked, module.prepare(held, None, SIZE)))


@pytest.mark.slow
@every_case
def test_a_step_compiles_without_a_break(case, unchecked):
    module = case.lively(torch.float)
    held, (first, second) = memory(dtype=torch.float), queries(dtype=torch.float)

    def two(held: Tensor, first: Tensor, second: Tensor) -> Tensor:
        prepared = module.prepare(held, some(), SIZE)
        _, state = module(first, prepared, None)
        return module(second, prepared, state)[0]

    compiled = torch.compile(two, backend="aot_eager", fullgraph=True)
    close(compiled(held, first, second), two(held, first, second), 1e-5)


@every_case
def test_has_the_parameters_its_paper_says(case):
    for query, memory_ in ((QUERY, MEMORY), (512, 1280)):
        counted = sum(parameter.numel() for parameter in case.make(query, memory_).parameters())
        assert counted == case.parameters(query, memory_)
    assert counted == case.golden


@every_case
@pytest.mark.parametrize(("batch", "count"), [(1, 1), (0, 3), (2, 0)])
def test_any_number_of_images_and_queries(case, batch, count):
    module = case.lively()
    _, found = steps(module, queries(batch, count), module.prepare(memory(batch), some(batch), SIZE))
    assert all(each.shape == (batch, count, module.features) for each in found)


@every_case
def test_writes_to_nothing_it_is_given(case):
    module, held, asked = case.lively(), memory(), queries()
    prepared = module.prepare(held, some(), SIZE)
    _, state = module.attend(asked[0], prepared)
    given = tensors((held, asked, prepared, state))
    before = [each.clone() for each in given]
    module(asked[1], prepared, state)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@every_case
def test_refuses_what_does_not_fit(case):
    module = case.lively()
    with pytest.raises(ValueError, match=re.escape(f"memory must have {MEMORY} features as constructed, got 5")):
        module.prepare(torch.randn(2, REGIONS, 5, dtype=torch.double), None, SIZE)
    prepared = module.prepare(memory(), None, SIZE)
    with pytest.raises(ValueError, match=f"query must have {QUERY} features as constructed, got 5"):
        module.attend(torch.randn(2, 3, 5, dtype=torch.double), prepared)
    with pytest.raises(ValueError, match=re.escape(f"size must have as many positions as the memory, {REGIONS}, got")):
        module.prepare(memory(), None, (2, 4))
    if module.needs_size:
        with pytest.raises(ValueError, match="size must be the"):
            module.prepare(memory())
    for query, held in ((0, 8), (6, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            case.cls(query, held, **case.options)
    with pytest.raises(TypeError, match="misspelt"):
        case.cls(QUERY, MEMORY, **case.options, misspelt=1)
