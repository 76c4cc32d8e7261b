import csv
import itertools
from functools import partial

import pytest
import pytorch_lightning as pl
import torch

import visattn
from visattn.attention import (
    AttentiveReader,
    CoverageAttention,
    HardAttention,
    ImpatientReader,
    MultiHeadAttention,
)
from visattn.checkpoint import describe
from visattn.data.described import QuestionBatch, QuestionedCanvas
from visattn.models import QuestionAnswerer
from visattn.tasks import Answering
from visattn.tasks.run import Predictions

LITTLE = {
    "backbone": "resnet10t",
    "backbone_args": {"in_chans": 1, "channels": [8, 8, 16, 16], "stem_width": 8, "output_stride": 8},
    "reader": partial(AttentiveReader, width=16),
    "embedding": 8,
    "hidden": 16,
}


def canvases(**options) -> QuestionedCanvas:
    few = {"size": 64, "cells": (2, 2), "digits": (2, 3), "canvases": 48, "evaluated": 8, "batch_size": 8}
    return QuestionedCanvas(**few | options)


def built(**options) -> tuple[Answering, QuestionBatch]:
    """A task with its network, as a trainer would build it, and a batch."""
    data = canvases()
    data.setup()
    task = Answering(**LITTLE | options)
    task._trainer = pl.Trainer(max_steps=1, logger=False, accelerator="cpu", enable_progress_bar=False)
    task._trainer.datamodule = data
    task.configure_model()
    task.eval()
    return task, next(iter(data.val_dataloader()))


def test_the_loss_is_the_cross_entropy_of_the_answers():
    task, batch = built()
    logits = task.model(batch.images, batch.words, batch.lengths).log_softmax(-1)
    expected = -torch.stack([logits[b, r, batch.answers[b, r]] for b in range(8) for r in range(4)]).mean()
    torch.testing.assert_close(task.training_loss(batch), expected)


def test_the_penalty_of_a_reader_counts():
    task, batch = built(reader=partial(CoverageAttention, width=8), penalty_factor=0.0)
    without = task.training_loss(batch)
    task.hparams["penalty_factor"] = 2.0
    found = task.model.answer(batch.images, batch.words, batch.lengths)
    penalties = []
    for maps, length in zip(found.maps.flatten(0, 1), batch.lengths.flatten().tolist(), strict=True):
        seen, total = torch.zeros(maps.shape[1]), torch.zeros(())
        for look in maps[:length]:
            total, seen = total + torch.minimum(look, seen).sum(), seen + look
        penalties.append(total)
    expected = without + 2 * torch.stack(penalties).mean()
    torch.testing.assert_close(task.training_loss(batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "reader",
    [AttentiveReader, partial(ImpatientReader, width=8), partial(MultiHeadAttention, heads=2)],
    ids=["attentive", "impatient", "heads"],
)
def test_picks_are_taught_by_how_likely_they_make_the_right_answer(reader):
    hard = partial(HardAttention, attention=reader, expected=0.0)
    task, batch = built(reader=hard, policy_factor=0.7, entropy_factor=0.3)
    task.train()
    task.average.fill_(-3.0)
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: float(value)})
    state = {name: value.clone() for name, value in task.state_dict().items()}
    torch.manual_seed(0)
    loss = task.training_loss(batch)
    loss.backward()
    average = task.average.item()
    assert all(p.grad.any() for name, p in task.model.reader.named_parameters() if "key" in name or "score" in name)
    task.load_state_dict(state)  # norms of the backbone have moved
    torch.manual_seed(0)
    found = task.model.answer(batch.images, batch.words, batch.lengths)
    log_p = found.logits.log_softmax(-1)
    likely, drawn, entropy = torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(8, 4)
    for b in range(8):
        for r in range(4):
            likely[b, r] = log_p[b, r, batch.answers[b, r]]
            for t in range(int(found.lengths[b, r])):
                s, p = (each[b, r, t] for each in found.maps)
                drawn[b, r] = drawn[b, r] + (s * p.log()).sum()
                entropy[b, r] = entropy[b, r] - (p * p.log()).sum()
    assert average == pytest.approx(0.9 * -3.0 + 0.1 * likely.mean().item(), rel=1e-4)
    assert logged["train/reward"] == pytest.approx(likely.mean().item(), rel=1e-4)
    picks = (likely - average).detach() * drawn
    expected = -(likely + 0.7 * picks + 0.3 * entropy).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_reader_with_other_options_is_refused():
    two = partial(MultiHeadAttention, heads=2)
    (task, _), (other, _) = (built(reader=each) for each in (two, partial(two, heads=4)))
    content = {"visattn": describe(task.model, **task.described), "state_dict": task.state_dict()}
    with pytest.raises(ValueError, match=r"the checkpoint holds reader\.heads 2, the model has 4"):
        other.on_load_checkpoint(content)
    built(reader=two, dropout=0.5)[0].on_load_checkpoint(content)


def test_channels_lie_last_in_what_the_backbone_makes_and_answer_the_same():
    losses = []
    for last in (False, True):
        torch.manual_seed(0)
        task, batch = built(channels_last=last)
        assert task.model.features(batch.images).is_contiguous(memory_format=torch.channels_last) == last
        losses.append(task.training_loss(batch).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "reader",
    [AttentiveReader, partial(ImpatientReader, width=8), partial(MultiHeadAttention, heads=2)],
    ids=["attentive", "impatient", "heads"],
)
def test_an_evaluation_says_what_is_right_and_what_was_read_where_it_is(reader):
    task, batch = built(reader=reader)
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value})
    task.evaluate(batch, "test")
    found = task.model.answer(batch.images, batch.words, batch.lengths)
    right, inside = [], []
    for b in range(8):
        for r in range(4):
            right.append(found.logits[b, r].argmax() == batch.answers[b, r])
            weights = found.maps[b, r, found.lengths[b, r] - 1]
            weights = weights.mean(0) if weights.ndim > 1 else weights
            row, column = divmod(int(weights.argmax()), 8)
            x0, y0, x1, y1 = batch.boxes[b, r].tolist()
            if x1:
                inside.append(x0 <= 8 * column + 4 < x1 and y0 <= 8 * row + 4 < y1)
    assert logged["test/accuracy"].compute() == pytest.approx(sum(right) / 32)
    assert logged["test/grounded"].compute() == pytest.approx(sum(inside) / len(inside))


@pytest.mark.slow
def test_trains_tests_and_travels(trainer, tmp_path):
    class Losses(pl.Callback):
        each: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, *_):
            self.each.append(float(trainer.callback_metrics["train/loss"]))

    pl.seed_everything(0)
    data, losses = canvases(more=(4, 4)), Losses()
    task = Answering(**LITTLE | {"optimizer": partial(torch.optim.AdamW, lr=5e-3)})
    run = trainer(losses, max_epochs=5, check_val_every_n_epoch=5)
    run.checkpoint_callbacks[0].monitor = "val/accuracy"
    run.fit(task, datamodule=data)
    assert sum(losses.each[-6:]) < sum(losses.each[:6])
    assert {"val/accuracy", "val/grounded", "val/loss"} <= run.callback_metrics.keys()
    (one, more) = run.test(task, datamodule=data, verbose=False)
    assert {"test/accuracy", "test/grounded"} <= one.keys()
    assert {"test_more/accuracy", "test_more/grounded"} <= more.keys()
    model = visattn.load(tmp_path / "checkpoints" / "last.ckpt")
    assert isinstance(model, QuestionAnswerer)
    assert model.labels == data.labels
    words = torch.tensor([[model.vocabulary.numbers("What is above the seven?")]])
    assert model(torch.rand(1, 1, 64, 64), words).shape == (1, 1, 11)
    folder = tmp_path / "mine"
    visattn.save(model, folder)
    assert visattn.load(folder).vocabulary == data.vocabulary


def test_needs_to_be_told_words_and_answers():
    with pytest.raises(ValueError, match="the data must say which words and which answers there are"):
        Answering(**LITTLE).configure_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet10x"}, "backbone 'resnet10x' is not known to timm; close: "),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
        ({"policy_factor": -0.1}, "policy_factor must not be negative, got -0.1"),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Answering(**LITTLE | options)


def test_a_prediction_has_a_row_for_each_question(trainer, tmp_path):
    task, data = Answering(**LITTLE), canvases()
    trainer(Predictions()).predict(task, datamodule=data)
    rows = list(csv.reader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert rows[0] == ["image", "question", "answer", "probability"]
    task.eval()
    batch = next(iter(data.predict_dataloader()))
    likely, found = task.model(batch.images, batch.words, batch.lengths).softmax(-1).max(-1)
    assert len(rows) == 1 + 8 * 4
    for row, (b, r) in zip(rows[1:], itertools.product(range(8), range(4)), strict=True):
        asked = data.vocabulary.decode(batch.words[b, r].tolist())
        assert row == [f"test {b}", asked, data.labels[found[b, r]], f"{likely[b, r]:.4f}"]
