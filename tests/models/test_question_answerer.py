from functools import partial

import pytest
import torch
from torch import nn

from visattn.attention import (
    AttentionOnAttention,
    AttentiveReader,
    HardAttention,
    ImpatientReader,
    MultiHeadAttention,
)
from visattn.models.question_answerer import QuestionAnswerer

ATTENTIVE, IMPATIENT = partial(AttentiveReader, width=8), partial(ImpatientReader, width=8)


def answerer(**options) -> QuestionAnswerer:
    small = {"backbone": "resnet10t", "reader": ATTENTIVE, "embedding": 8, "hidden": 12, "width": 16}
    return QuestionAnswerer(20, 11, **small | options).eval()


def asked(r: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, and questions of different lengths."""
    return torch.randn(2, 3, 64, 96), torch.randint(20, (2, r, 6)), torch.tensor([[1, 4, 6], [2, 6, 3]])[:, :r]


def state(model: QuestionAnswerer, words: list[int]) -> list[torch.Tensor]:
    """The state of the question's cell after each word, step by step."""
    cell = model.question.layers.cells[0]
    now, found = (torch.zeros(cell.width), torch.zeros(cell.width)), []
    for word in words:
        now = cell(cell.known(model.question.words.weight[word]), None, now)
        found.append(now[0])
    return found


def test_the_attentive_reader_looks_once_by_the_last_state():
    model, (images, words, lengths) = answerer(), asked()
    found = model.answer(images, words, lengths)
    assert found.maps.shape == (2, 3, 1, 6)
    assert (found.lengths == 1).all()
    reader = model.reader
    for b in range(2):
        regions = model.regions(model.features(images[b : b + 1])).memory[0]
        for r in range(3):
            q = state(model, words[b, r, : lengths[b, r]].tolist())[-1]
            prepared = reader.prepare(regions[None])
            weights, _ = reader.attend(q[None, None], prepared)
            y = (reader.found(weights[0, 0] @ regions) + reader.asked(q)).tanh()
            logits = model.classifier(torch.cat((y, q)))
            torch.testing.assert_close(found.logits[b, r], logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.maps[b, r, 0], weights[0, 0], rtol=1e-4, atol=1e-5)


def test_the_impatient_reader_looks_with_each_word_and_knows_what_it_found():
    model, (images, words, lengths) = answerer(reader=IMPATIENT), asked()
    found = model.answer(images, words, lengths)
    assert found.maps.shape == (2, 3, 6, 6)
    assert torch.equal(found.lengths, lengths)
    reader = model.reader
    for b in range(2):
        regions = model.regions(model.features(images[b : b + 1])).memory[0]
        prepared = reader.prepare(regions[None])
        for r in range(3):
            states, r_t = state(model, words[b, r, : lengths[b, r]].tolist()), None
            for t, q in enumerate(states):
                weights, _ = reader.attend(q[None, None], prepared, None if r_t is None else r_t[None, None])
                torch.testing.assert_close(found.maps[b, r, t], weights[0, 0], rtol=1e-4, atol=1e-5)
                before = 0 if r_t is None else reader.kept(r_t).tanh()
                r_t = weights[0, 0] @ regions + before
            y = (reader.found(r_t) + reader.asked(q)).tanh()
            torch.testing.assert_close(found.logits[b, r], model.classifier(torch.cat((y, q))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reader", [ATTENTIVE, IMPATIENT], ids=["attentive", "impatient"])
def test_what_stands_behind_a_question_does_not_count(reader):
    model, (images, words, lengths) = answerer(reader=reader), asked()
    other = words.clone()
    other[torch.arange(6) >= lengths[..., None]] = 7
    torch.testing.assert_close(model(images, words, lengths), model(images, other, lengths))
    first = words.clone()
    first[:, :, 0] = (first[:, :, 0] + 1) % 20
    assert not torch.allclose(model(images, words, lengths), model(images, first, lengths), atol=1e-5)


def test_questions_are_answered_one_by_one_as_together():
    model, (images, words, lengths) = answerer(layers=1, heads=2), asked()
    together = model(images, words, lengths)
    for b in range(2):
        for r in range(3):
            alone = model(images[b : b + 1], words[b : b + 1, r : r + 1, : lengths[b, r]])
            torch.testing.assert_close(together[b, r], alone[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "reader", [partial(MultiHeadAttention, heads=2), partial(HardAttention, attention=ATTENTIVE)], ids=["heads", "hard"]
)
def test_any_attention_reads(reader):
    model, (images, words, lengths) = answerer(reader=reader), asked()
    assert model(images, words, lengths).shape == (2, 3, 11)


@pytest.mark.parametrize("around", [None, HardAttention, partial(AttentionOnAttention, dropout=0.0)])
def test_refuses_a_reader_in_which_questions_hide_regions_from_each_other(around):
    causal = partial(MultiHeadAttention, heads=2, causal=True)
    reader = causal if around is None else partial(around, attention=causal)
    with pytest.raises(ValueError, match=r"reader must let every question look at all regions, \w+Attention is causal"):
        answerer(reader=reader)


@pytest.mark.slow
@pytest.mark.parametrize("reader", [ATTENTIVE, IMPATIENT], ids=["attentive", "impatient"])
def test_learns_which_half_is_asked_for(reader):
    """Two words ask which of four brightnesses the left and the right half of an image have."""
    torch.manual_seed(0)
    tiny = {"in_chans": 1, "channels": [8, 8, 8, 8], "stem_width": 8}
    model = answerer(reader=reader, backbone_args=tiny, layers=1, heads=2).train()
    levels = torch.randint(4, (16, 2))
    images = (levels.float() - 1.5)[:, None, None].repeat_interleave(32, 3).expand(-1, 1, 32, -1)
    words = torch.tensor([[[3, 1], [3, 2]]]).expand(16, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images, words).flatten(0, 1), levels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"layers": -1}, "layers must not be negative, got -1"),
        ({"backbone": "resnet10x"}, "backbone must be the name of a timm model, got 'resnet10x'; close: resnet10t"),
        (
            {"reader": lambda query, memory: AttentiveReader(query + 1, memory)},
            "reader must be asked with 12 features, AttentiveReader wants 13",
        ),
    ],
)
def test_refuses_options_it_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        answerer(**options)


@pytest.mark.parametrize("beyond", [False, True], ids=["none", "beyond"])
def test_refuses_lengths_that_no_question_has(beyond):
    model, (images, words, lengths) = answerer(), asked()
    lengths[1, 1] = words.shape[2] + 1 if beyond else 0
    with pytest.raises(ValueError, match=rf"lengths must lie from 1 to {words.shape[2]}, all words, got \[\["):
        model(images, words, lengths)
    with pytest.raises(ValueError, match=r"words must have at least one a question, got \(2, 3, 0\)"):
        model(images, words[:, :, :0])
