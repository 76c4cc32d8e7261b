from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.models.decoders.case import MEMORY, REGIONS, SIZE, VOCABULARY, gather, memory, sentences
from visattn import attention as zoo
from visattn.attention.memory import __all__ as FAMILY
from visattn.models.decoders import ShowAttendAndTell
from visattn.models.decoders.packing import Packing
from visattn.models.decoders.recurrent import RecurrentDecoder

LENGTHS = torch.tensor([[2, 5, 0], [4, 1, 5]])
STATEFUL = [name for name in FAMILY if getattr(zoo, name).stateful is True]

RECURRENT = [case for case in gather() if issubclass(case.cls, RecurrentDecoder)]


def there(lengths: Tensor, steps: int = 5) -> Tensor:
    return torch.arange(steps) < lengths[..., None]


def equal(ours, theirs, lengths):
    """The same where words are, and zeros elsewhere."""
    for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if one is not None:
            here = there(lengths, one.shape[2]).view(*lengths.shape, -1, *[1] * (one.ndim - 3))
            torch.testing.assert_close(one, torch.where(here, other, 0.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", gather(), ids=str)
def test_says_the_same_of_every_word(case):
    decoder, words = case.lively(), sentences()
    prepared = decoder.prepare(memory(), None, SIZE)
    ours, theirs = decoder(prepared, words, LENGTHS), decoder(prepared, words)
    here = there(LENGTHS)
    torch.testing.assert_close(ours.features[here], theirs.features[here], rtol=0, atol=1e-11)
    if isinstance(decoder, RecurrentDecoder):
        equal(ours, theirs, LENGTHS)


@pytest.mark.parametrize("lengths", [torch.zeros_like(LENGTHS), torch.full_like(LENGTHS, 9)], ids=["none", "too long"])
def test_lengths_may_be_none_or_more_than_there_are(lengths):
    decoder = ShowAttendAndTell(VOCABULARY, MEMORY, hidden=16, embedding=6).double().eval()
    words, prepared = sentences(), decoder.prepare(memory())
    equal(decoder(prepared, words, lengths), decoder(prepared, words), lengths)


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_learns_the_same(case):
    decoder, words, held = case.lively(), sentences(), memory().requires_grad_()
    wanted = [held, *decoder.parameters()]

    def gradients(*lengths):
        features = decoder(decoder.prepare(held, None, SIZE), words, *lengths).features
        loss = decoder.write(features[there(LENGTHS)]).square().sum()
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    for one, other in zip(gradients(LENGTHS), gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", STATEFUL)
def test_attention_remembers_the_sentence_that_it_is_asked_for(name):
    decoder = (
        ShowAttendAndTell(VOCABULARY, MEMORY, attention=getattr(zoo, name), hidden=16, embedding=6).double().eval()
    )
    words, held = sentences(), memory()
    prepared = decoder.prepare(held, None, SIZE)
    equal(decoder(prepared, words, LENGTHS), decoder(prepared, words), LENGTHS)


def test_fewer_captions_are_asked_for_step_by_step():
    packing = Packing(LENGTHS, 5)
    assert packing.counts == [5, 4, 3, 3, 2]
    assert packing.widths == [3, 2, 2, 2, 1]
    asks = packing.step(1).asks
    assert asks.shape == (2, 2)
    order = packing.order[asks]
    assert order.tolist() == [[1, 0], [5, 3]]  # the longest of each image first


def test_choices_follow_their_sentences():
    attention = partial(zoo.HardAttention, evaluation="argmax")
    decoder = ShowAttendAndTell(VOCABULARY, MEMORY, attention=attention, hidden=16, embedding=6).double().eval()
    words, choice = sentences(), torch.randint(REGIONS, (2, 3, 5))
    prepared = decoder.prepare(memory(), None, SIZE)
    ours, theirs = (decoder(prepared, words, lengths, choice) for lengths in (LENGTHS, None))
    equal(ours, theirs, LENGTHS)
    assert torch.equal(theirs.maps.weights.argmax(-1), choice)


def test_no_choice_for_attention_that_does_not_pick():
    decoder = ShowAttendAndTell(VOCABULARY, MEMORY, hidden=16)
    prepared = decoder.prepare(memory(dtype=torch.float))
    with pytest.raises(ValueError, match="choice must be None for AdditiveAttention, which does not pick"):
        decoder(prepared, sentences(), None, torch.zeros(2, 3, 5, dtype=torch.long))
