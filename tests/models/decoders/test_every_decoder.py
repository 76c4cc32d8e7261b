"""What holds for every decoder; one line in a decoder's own test file brings it under all of it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests.models.decoders.case import (
    MEMORY,
    REGIONS,
    SIZE,
    VOCABULARY,
    gather,
    memory,
    sentences,
    step_by_step,
)
from visattn.models import decoders
from visattn.models.decoders import Decoder

CASES_OF_ALL = gather()
every_case = pytest.mark.parametrize("case", CASES_OF_ALL, ids=str)


def some(batch: int = 2) -> Tensor:
    """A mask with two regions gone."""
    mask = torch.ones(batch, REGIONS, dtype=torch.bool)
    mask[:, 3] = mask[:, REGIONS - 1] = False
    return mask


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def close(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_the_table_holds_every_decoder():
    kinds = {getattr(decoders, name) for name in decoders.__all__}
    known = {k for k in kinds if isinstance(k, type) and issubclass(k, Decoder)} - {Decoder, decoders.Ensemble}
    assert {case.cls for case in CASES_OF_ALL} == known


@every_case
def test_all_steps_at_once_are_the_steps_one_by_one(case):
    decoder, words = case.lively(), sentences()
    prepared = decoder.prepare(memory(), some(), SIZE)
    said = decoder(prepared, words)
    close(said, step_by_step(decoder, prepared, words))
    assert said.features.shape[:3] == (2, 3, 5)
    assert decoder.write(said.features).shape == (2, 3, 5, VOCABULARY)
    assert all(each.shape[:3] == (2, 3, 5) for each in tensors(said.maps))


@every_case
def test_a_word_changes_what_comes_after_it_and_nothing_before(case):
    decoder, words = case.lively(), sentences()
    prepared = decoder.prepare(memory(), None, SIZE)
    before = decoder(prepared, words).features
    words[:, :, 2] = (words[:, :, 2] + 1) % VOCABULARY
    after = decoder(prepared, words).features
    close(after[:, :, :3], before[:, :, :3])
    assert (after[:, :, 3] != before[:, :, 3]).any(2).all()


@every_case
def test_what_is_masked_changes_nothing(case):
    decoder, held, words = case.lively(), memory(), sentences()
    other = torch.where(some()[..., None], held, torch.randn_like(held) * 100)
    said = decoder(decoder.prepare(held, some(), SIZE), words)
    close(decoder(decoder.prepare(other, some(), SIZE), words), said)
    assert not torch.allclose(decoder(decoder.prepare(other, None, SIZE), words).features, said.features)


@every_case
def test_all_sentences_share_one_memory(case):
    decoder, held, words = case.lively(), memory(), sentences()
    together = decoder(decoder.prepare(held, some(), SIZE), words)
    repeated = decoder.prepare(held.repeat_interleave(3, 0), some(6), SIZE)
    alone = decoder(repeated, words.flatten(0, 1)[:, None])
    close([each.flatten(0, 1) for each in tensors(together)], [each.squeeze(1) for each in tensors(alone)])


@every_case
def test_images_do_not_mix(case):
    decoder, held, words = case.lively(), memory(), sentences()
    together = decoder(decoder.prepare(held, some(), SIZE), words)
    for i in range(2):
        alone = decoder(decoder.prepare(held[i : i + 1], some(1), SIZE), words[i : i + 1])
        close([each[i : i + 1] for each in tensors(together)], alone)


@every_case
def test_beams_can_be_put_in_another_order(case):
    decoder, words = case.lively(), sentences()
    prepared = decoder.prepare(memory(), some(), SIZE)
    order = torch.tensor([2, 0, 0])
    state = decoder.begin(prepared, 3)
    for t in range(3):
        _, _, state = decoder.step(words[:, :, t - 1] if t else None, prepared, state)
    assert all(each.shape[:2] == (2, 3) for each in tensors(state))

    def moved(tree: Any) -> Any:
        return tree_map(lambda each: each[:, order] if isinstance(each, Tensor) else each, tree)

    last = words[:, :, 2]
    close(decoder.step(last[:, order], prepared, moved(state)), moved(decoder.step(last, prepared, state)))


@every_case
def test_every_parameter_learns(case):
    decoder = case.make().train()
    said = decoder(decoder.prepare(memory(dtype=torch.float), None, SIZE), sentences())
    torch.nn.functional.cross_entropy(
        decoder.write(said.features).flatten(0, 2), sentences(length=5).flatten()
    ).backward()
    without = [name for name, each in decoder.named_parameters() if each.grad is None or not each.grad.any()]
    assert not without


@every_case
def test_is_finite_under_autocast(case):
    decoder = case.lively(torch.float)
    with torch.autocast("cpu", torch.bfloat16):
        said = decoder(decoder.prepare(memory(dtype=torch.float), some(), SIZE), sentences())
        logits = decoder.write(said.features)
    assert all(each.isfinite().all() for each in (*tensors(said), logits))


@every_case
@pytest.mark.parametrize(("batch", "count", "length"), [(1, 1, 0), (0, 3, 2), (2, 1, 1)])
def test_any_number_of_images_sentences_and_words(case, batch, count, length):
    decoder = case.lively()
    said = decoder(decoder.prepare(memory(batch), None, SIZE), sentences(batch, count, length))
    assert said.features.shape[:3] == (batch, count, length + 1)


@every_case
def test_weights_round_trip(case):
    decoder, held, words = case.lively(), memory(), sentences()
    twin = case.make().double().eval()
    twin.load_state_dict(decoder.state_dict())
    for other in (twin, copy.deepcopy(decoder)):
        close(other(other.prepare(held, None, SIZE), words), decoder(decoder.prepare(held, None, SIZE), words))


@pytest.mark.slow
@every_case
def test_compiles_without_a_break(case, unchecked):
    decoder, held, words = case.lively(torch.float), memory(dtype=torch.float), sentences()

    def logits(held: Tensor, words: Tensor) -> Tensor:
        return decoder.write(decoder(decoder.prepare(held, some(), SIZE), words).features)

    compiled = torch.compile(logits, backend="aot_eager", fullgraph=True)
    close(compiled(held, words), logits(held, words), 1e-4)


@every_case
def test_has_the_parameters_its_paper_says(case):
    for vocabulary, features in ((VOCABULARY, MEMORY), (10000, 512)):
        counted = sum(parameter.numel() for parameter in case.make(vocabulary, features).parameters())
        assert counted == case.parameters(vocabulary, features)
    assert counted == case.golden


@every_case
def test_refuses_what_does_not_fit(case):
    decoder = case.make()
    with pytest.raises(ValueError, match=f"memory must have {MEMORY} features as constructed, got 5"):
        decoder.prepare(torch.randn(2, REGIONS, 5), None, SIZE)
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        case.make(vocabulary=0)
    with pytest.raises(TypeError, match="misspelt"):
        case.cls(VOCABULARY, MEMORY, **case.options, misspelt=1)
