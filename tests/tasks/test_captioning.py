import csv
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.nn import functional as F

import visattn
from visattn.attention import (
    CBAM,
    AdditiveAttention,
    CoverageAttention,
    HardAttention,
    MultiHeadAttention,
    SqueezeExcitation,
)
from visattn.checkpoint import CheckpointError, describe
from visattn.data.captions import CaptionBatch, Captions
from visattn.data.described import DescribedCanvas
from visattn.data.vocabulary import Words
from visattn.metrics import evaluate
from visattn.metrics.cider import CiderD
from visattn.models.decoders import (
    ConvolutionalDecoder,
    DilatedDecoder,
    LuongDecoder,
    PooledDecoder,
    ShowAttendAndTell,
    TransformerDecoder,
    sample,
)
from visattn.tasks import Captioning
from visattn.tasks.captioning import Heard
from visattn.tasks.command_line import run_cli
from visattn.tasks.run import Predictions

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
SMALL = partial(ShowAttendAndTell, hidden=24, embedding=16, dropout=0.0, first="begin")
LITTLE = {"backbone": "resnet10t", "decoder": SMALL, "width": 16, "beam": 2}
FINE = {"backbone_args": {"output_stride": 8}}  # regions to choose from
LAYERS = partial(TransformerDecoder, width=16, depth=2, heads=2, dropout=0.0)
CONVOLUTIONS = partial(ConvolutionalDecoder, width=12, embedding=16, depth=2, dropout=0.0)
DILATED = partial(DilatedDecoder, width=16, dilations=(1, 2), dropout=0.0)
HEADS = partial(HardAttention, attention=partial(MultiHeadAttention, heads=2), expected=0.0)
every_decoder = pytest.mark.parametrize(
    "decoder", [SMALL, LAYERS, CONVOLUTIONS, DILATED], ids=["recurrent", "transformer", "convolutional", "dilated"]
)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twenty squares of four colours, with three captions each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["image,caption,split"]
    for k in range(20):
        name, colour = list(COLOURS.items())[k % 4]
        Image.new("RGB", (40, 40), colour).save(folder / f"{k}.png")
        split = "val" if k >= 12 else "train"
        rows += [f"{k}.png,{said},{split}" for said in (f"a {name} square", f"it is {name}", f"a square of {name}")]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def data(photos):
    def make(**options) -> Captions:
        few = {"captions_per_image": 3, "batch_size": 4, "workers": 0, "min_count": 1, "size": 32}
        return Captions(str(photos.parent / "captions.csv"), str(photos), **few | options)

    return make


@pytest.fixture
def fit(data, trainer):
    """Trains, and returns the trainer."""

    def run(task, *callbacks, of=None, **options):
        found = trainer(*callbacks, **options)
        found.checkpoint_callbacks[0].monitor = "val/cider_d"
        found.fit(task, datamodule=of or data())
        return found

    return run


class Losses(pl.Callback):
    def __init__(self):
        self.all: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.all.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def digits() -> DescribedCanvas:
    """Two cells for one or two digits, and the second test has two."""
    few = {"size": (32, 64), "cells": (1, 2), "digits": (1, 2), "more": (2, 2)}
    return DescribedCanvas(**few, canvases=48, evaluated=12, batch_size=8)


def built(data, **options) -> tuple[Captioning, CaptionBatch]:
    """A task with its network, as a trainer would build it, and a batch."""
    found = data()
    found.setup()
    task = Captioning(**LITTLE | options)
    task._trainer = pl.Trainer(max_steps=1, logger=False, accelerator="cpu", enable_progress_bar=False)
    task._trainer.datamodule = found
    task._trainer.state.fn = None
    task.configure_model()
    task.log = task.log_dict = lambda *_, **__: None
    return task, next(iter(found.train_dataloader()))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_true_words(data):
    task, batch = built(data)
    loss = task.training_loss(batch)
    logits = task.model(batch.images, batch.words[:, :, :-1])
    nats, count = 0.0, 0
    for b in range(len(batch.words)):
        for r in range(batch.words.shape[1]):
            for t in range(int(batch.lengths[b, r])):
                nats -= logits[b, r, t].log_softmax(0)[batch.words[b, r, t]].item()
                count += 1
    assert loss.item() == pytest.approx(nats / count, rel=1e-5)
    padded = batch._replace(words=F.pad(batch.words, (0, 3), value=task.model.end))
    assert task.training_loss(padded).item() == pytest.approx(loss.item(), rel=1e-5)


def test_regions_are_looked_at_alike(data):
    plain, batch = built(data)
    for target in ("one", "length"):
        task, _ = built(data, doubly=0.5, target=target)
        task.model.load_state_dict(plain.model.state_dict())
        said = task.model.told(batch.images, batch.words[:, :, :-1])
        there = torch.arange(batch.words.shape[2]) < batch.lengths[..., None]
        expected = []
        for maps, on in zip(said.maps.flatten(0, 1), there.flatten(0, 1), strict=True):
            total = maps[on].sum(0)
            share = 1.0 if target == "one" else on.sum() / len(total)
            expected.append(sum((share - each) ** 2 for each in total))
        difference = task.training_loss(batch) - plain.training_loss(batch)
        torch.testing.assert_close(difference, 0.5 * torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_the_penalty_of_an_attention_counts(data):
    task, batch = built(data, attention=CoverageAttention, penalty_factor=0.0)
    without = task.training_loss(batch)
    task.hparams["penalty_factor"] = 2.0
    said = task.model.told(batch.images, batch.words[:, :, :-1])
    there = torch.arange(batch.words.shape[2]) < batch.lengths[..., None]
    expected = without + 2 * task.model.decoder.attention.penalty(said.maps, there)
    torch.testing.assert_close(task.training_loss(batch), expected, rtol=1e-5, atol=1e-6)


def test_picks_are_taught_by_what_they_make_likely(data):
    task, batch = built(data, attention=partial(HardAttention, expected=0.0), policy_factor=1.0, entropy_factor=0.0)
    task.average.fill_(-3.0)
    torch.manual_seed(0)
    task.model.train()
    loss = task.training_loss(batch)
    torch.manual_seed(0)
    said = task.model.decoder(task.model.prepare(batch.images), batch.words[:, :, :-1], batch.lengths)
    there = torch.arange(batch.words.shape[2]) < batch.lengths[..., None]
    log_p = task.model.decoder.write(said.features).log_softmax(-1).gather(3, batch.words[..., None])[..., 0] * there
    reward = log_p.sum(2) / batch.lengths
    average = 0.9 * -3.0 + 0.1 * reward.mean()
    picked = said.maps.log_probability(there)
    expected = -log_p.sum() - ((reward - average).detach()[..., None] * picked).sum()
    torch.testing.assert_close(loss, expected / there.sum(), rtol=1e-4, atol=1e-5)
    assert task.average.item() == pytest.approx(average.item(), rel=1e-4)


def picked_by(task: Captioning) -> list[MultiHeadAttention]:
    """The attention of each layer, whose keys learn by its picks alone."""
    return [module.attention for module in task.model.decoder.modules() if isinstance(module, HardAttention)]


@every_decoder
def test_the_picks_of_every_head_and_layer_are_taught(data, decoder):
    options = {"attention": HEADS, "policy_factor": 1.0, "entropy_factor": 0.0, "doubly": 0.0}
    task, batch = built(data, decoder=decoder, **options, **FINE)
    task.train()
    torch.manual_seed(0)
    loss = task.training_loss(batch)
    loss.backward()
    looks = picked_by(task)
    assert len(looks) == (1 if decoder is SMALL else 2)
    for look in looks:
        assert all(head.any() for head in look.key.weight.grad.chunk(2))
    torch.manual_seed(0)
    said = task.model.decoder(task.model.prepare(batch.images), batch.words[:, :, :-1], batch.lengths)
    there = torch.arange(batch.words.shape[2]) < batch.lengths[..., None]
    log_p = task.model.decoder.write(said.features).log_softmax(-1).gather(3, batch.words[..., None])[..., 0] * there
    drawn = said.maps.probabilities.gather(-1, said.maps.weights.argmax(-1, keepdim=True)).log()
    drawn = drawn.flatten(3).sum(3).masked_fill(~there, 0.0)
    reward = log_p.sum(2) / batch.lengths
    expected = -log_p.sum() - ((reward - task.average).detach()[..., None] * drawn).sum()
    torch.testing.assert_close(loss, expected / there.sum(), rtol=1e-4, atol=1e-5)


def test_wake_sleep_learning_climbs_the_likelihood_of_the_caption(data):
    options = {"learning": "wake_sleep", "samples": 4000, "entropy_factor": 0.0}
    task, batch = built(data, attention=HardAttention, backbone_args={"output_stride": 16}, **options)
    model, decoder = task.model.eval(), task.model.decoder
    regions = 4  # 2×2, and two words
    words, lengths = torch.tensor([[[3, 0], [4, 0]]]), torch.tensor([[2, 1]])
    batch = batch._replace(images=batch.images[:1], words=words, lengths=lengths)
    features = model.features(batch.images)
    assert features.shape[2] * features.shape[3] == regions
    wanted = [*decoder.attention.parameters(), decoder.out.weight]

    every = torch.cartesian_prod(torch.arange(regions), torch.arange(regions))  # all ways to look
    many = words.repeat_interleave(len(every), 1)
    there = torch.arange(2) < lengths.repeat_interleave(len(every), 1)[..., None]
    said = decoder(model.ready(features), many[:, :, :-1], None, every.repeat(2, 1)[None])
    likely = -task.nats(said, many, there).sum(2) + said.maps.log_probability(there).sum(2)
    likely = likely.unflatten(1, (2, -1)).logsumexp(2) - torch.tensor([1.0, float(regions)]).log()
    exact = torch.autograd.grad(-likely.sum() / 3, wanted)

    torch.manual_seed(0)
    found = torch.autograd.grad(task.training_loss(batch), wanted)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 0.15 * other.norm()


def test_what_wake_sleep_proposes_is_taught_by_what_goes_with_the_words(data):
    fine = {"backbone_args": {"output_stride": 8}}
    task, batch = built(data, attention=HardAttention, learning="wake_sleep", samples=3, **fine)
    task.training_loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.proposal.parameters())
    assert any(p.grad.any() for p in task.proposal.parameters())
    with pytest.raises(ValueError, match=r"attention must pick one region a word for wake_sleep.*, got AdditiveAtt"):
        built(data, learning="wake_sleep")


@pytest.mark.parametrize("decoder", [SMALL, partial(LuongDecoder, hidden=8, embedding=8)], ids=["sat", "luong"])
def test_words_are_read_as_they_would_have_been_said(data, decoder, monkeypatch):
    task, batch = built(data, decoder=decoder, scheduled=0.5)
    task.model.eval()
    prepared, words = task.model.prepare(batch.images), batch.words[:, :, :-1]
    monkeypatch.setattr(pl.Trainer, "estimated_stepping_batches", 10)
    assert torch.equal(task.read_words(prepared, words), words)  # at the start
    monkeypatch.setattr(Captioning, "global_step", 10)
    torch.manual_seed(0)
    changed = [(task.read_words(prepared, words) != words).float().mean().item() for _ in range(20)]
    assert 0.3 < sum(changed) / 20 <= 0.5  # half are drawn, and now and then fall on the word itself


@pytest.mark.parametrize("explored", ["chance", "beam"])
def test_sentences_are_rewarded_by_their_cider(data, explored):
    task, batch = built(data, learning="self_critical", samples=3, explored=explored)
    task.scorer = CiderD(task.trainer.datamodule.references("train"), end=task.model.end)
    torch.manual_seed(1)
    loss = task.training_loss(batch)
    torch.manual_seed(1)
    prepared = task.model.prepare(batch.images)
    options = {"end": task.model.end, "never": [1]}
    if explored == "chance":
        found = visattn.models.decoders.sample(task.model.decoder, prepared, count=3, **options)
    else:
        found = visattn.models.decoders.beam(task.model.decoder, prepared, width=3, alpha=0.7, **options)
    total, count = torch.zeros(()), 0
    for b in range(len(found.words)):
        rewards = [float(task.scorer(found.words[b : b + 1, n], batch.indices[b : b + 1])[0]) for n in range(3)]
        for n in range(3):
            others = [r for k, r in enumerate(rewards) if k != n]
            logits = task.model.decoder.write(
                task.model.decoder(task.model.prepare(batch.images), found.words[:, :, :-1]).features
            )[b, n]
            logits[:, 1] = -torch.inf  # what is unknown is never said, though people's captions have it
            log_p = logits.log_softmax(-1)
            for t in range(int(found.lengths[b, n])):
                total = total - (rewards[n] - sum(others) / 2) * log_p[t, found.words[b, n, t]]
                count += 1
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)


@every_decoder
@pytest.mark.parametrize("attention", [HEADS, partial(HEADS, expected=1.0)], ids=["drawn", "expected"])
def test_picks_are_rewarded_as_words_are(data, decoder, attention):
    options = {"learning": "self_critical", "samples": 3, "policy_factor": 0.7, "entropy_factor": 0.0}
    task, batch = built(data, decoder=decoder, attention=attention, **options, **FINE)
    task.train()
    torch.manual_seed(1)
    prepared = task.model.prepare(batch.images)
    found = sample(task.model.decoder, prepared, end=task.model.end, count=3, longest=20, never=[1])
    there = torch.arange(found.words.shape[2]) < found.lengths[..., None]
    for rewards in (torch.full((4, 3), 2.0), torch.rand(4, 3)):
        task.rewards = lambda *_, rewards=rewards: rewards
        torch.manual_seed(1)
        task.zero_grad()
        loss = task.training_loss(batch)
        loss.backward()
        gradients = [look.key.weight.grad.clone() for look in picked_by(task)]
        same = bool((rewards == rewards[0, 0]).all())
        assert all(head.any() != same for each in gradients for head in each.chunk(2))

        choice = None if attention is not HEADS else found.maps.weights.argmax(-1)
        said = task.model.decoder(prepared, found.words[:, :, :-1], found.lengths, choice)
        advantage = rewards - (rewards.sum(1, keepdim=True) - rewards) / 2
        logits = task.model.decoder.write(said.features).index_fill(-1, torch.tensor([1]), -torch.inf)
        log_p = logits.log_softmax(-1).gather(3, found.words[..., None])[..., 0].masked_fill(~there, 0.0)
        if attention is HEADS:
            drawn = said.maps.probabilities.gather(-1, choice[..., None]).log()
            log_p = log_p + 0.7 * drawn.flatten(3).sum(3).masked_fill(~there, 0.0)
        expected = -(advantage[..., None] * log_p).sum() / there.sum()
        right = torch.autograd.grad(expected, [look.key.weight for look in picked_by(task)], retain_graph=True)
        for one, other in zip(gradients, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        if attention is HEADS:
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_batch_is_encoded_once_where_the_backbone_is_at_rest(data, frozen, monkeypatch):
    options = {"learning": "self_critical", "explored": "beam", "baseline": "greedy", "freeze_backbone": frozen}
    task, batch = built(data, **options)
    task.train()
    task.scorer = CiderD(task.trainer.datamodule.references("train"), end=task.model.end)
    calls, features = [], visattn.models.Captioner.features
    monkeypatch.setattr(visattn.models.Captioner, "features", lambda *of: calls.append(of) or features(*of))
    task.training_loss(batch)
    assert len(calls) == (1 if frozen else 3)


def test_what_a_beam_finds_while_it_learns_is_what_is_said_in_the_end(data):
    task, batch = built(data, dropout=0.5, decoder=partial(SMALL, dropout=0.5))
    task.train()
    found = task.best(batch.images, width=3, alpha=0.7)
    assert task.model.training
    assert not task.model.backbone.training  # it is frozen
    task.eval()
    with torch.no_grad():
        said = task.model.caption(batch.images, width=3, alpha=0.7)
    assert torch.equal(found.words, said.words)


def test_some_of_the_cross_entropy_is_added_to_rewards(data):
    plain, batch = built(data)
    torch.manual_seed(1)
    nats = plain.training_loss(batch)
    losses = []
    for factor in (0.0, 0.5):
        task, _ = built(data, learning="self_critical", samples=3, cross_entropy_factor=factor)
        task.model.load_state_dict(plain.model.state_dict())
        task.scorer = CiderD(task.trainer.datamodule.references("train"), end=task.model.end)
        torch.manual_seed(1)
        losses.append(task.training_loss(batch))
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * nats, rtol=1e-4, atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_to_name_colours_and_says_so(fit, data, trainer, tmp_path):
    pl.seed_everything(0)
    losses = Losses()
    task = Captioning(**LITTLE | {"freeze_backbone": False, "optimizer": partial(torch.optim.Adam, lr=1e-2)})
    found = fit(task, losses, max_epochs=40, check_val_every_n_epoch=40)
    assert losses.all[-1]["train/loss"] < 0.5 * losses.all[0]["train/loss"]
    assert found.callback_metrics["val/cider_d"] > 3
    assert 2.5 < found.callback_metrics["val/words"] <= 4
    model = visattn.load(tmp_path / "checkpoints" / "last.ckpt")
    assert model.vocabulary == task.vocabulary
    for name, colour in COLOURS.items():
        said = model.caption(model.transform(Image.new("RGB", (40, 40), colour))[None])
        assert name in model.vocabulary.decode(said.words[0, 0].tolist())


def test_a_frozen_backbone_stays_and_its_maps_are_made_once(fit, data, tmp_path):
    of = data(cache=str(tmp_path / "cache"))
    task = Captioning(**LITTLE)
    calls = []
    task_features = visattn.models.Captioner.features

    def counted(self, images):
        calls.append(len(images))
        return task_features(self, images)

    visattn.models.Captioner.features = counted
    try:
        found = fit(task, of=of, max_epochs=2)
        before = {name: value.clone() for name, value in task.model.backbone.state_dict().items()}
        assert sum(calls) == 20
        assert found.callback_metrics["val/bleu_1"] >= 0
        again = fit(Captioning(**LITTLE), of=data(), max_epochs=1)  # without a cache: every batch
        assert sum(calls) > 40
    finally:
        visattn.models.Captioner.features = task_features
    assert all(torch.equal(value, before[name]) for name, value in task.model.backbone.state_dict().items())
    assert not any(p.requires_grad for p in again.lightning_module.model.backbone.parameters())


def test_what_proposes_regions_is_learned_beside_the_network_and_resumed(data, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    half = tmp_path / "half.ckpt"

    class Note(pl.Callback):
        def on_fit_start(self, trainer, task):
            self.first = {name: p.clone() for name, p in task.proposal.state_dict().items()}

    class Half(pl.Callback):
        def on_train_epoch_end(self, trainer, task):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(half)

    proposals = []
    for callbacks, start in (([Half()], None), ([], str(half))):
        torch.manual_seed(0)
        task = Captioning(**LITTLE | FINE, attention=HardAttention, learning="wake_sleep", samples=2)
        note = Note()
        trained = trainer(note, *callbacks, max_epochs=2, limit_val_batches=0)
        trained.fit(task, datamodule=data(), ckpt_path=start)
        proposals.append(task.proposal.state_dict())
        assert all(not torch.equal(p, note.first[name]) for name, p in proposals[-1].items())
        held = {id(p) for group in trained.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in task.parameters() if p.requires_grad}
    assert all(torch.equal(p, proposals[1][name]) for name, p in proposals[0].items())


@pytest.mark.slow
def test_goes_on_by_itself_from_a_captioner_that_was_trained(fit, tmp_path):
    fit(Captioning(**LITTLE), max_epochs=1)
    first = tmp_path / "checkpoints" / "last.ckpt"
    task = Captioning(**LITTLE | {"learning": "self_critical", "start": str(first), "baseline": "greedy"})
    losses = Losses()
    fit(task, losses, max_epochs=2)
    assert "train/reward" in losses.all[-1]
    with pytest.raises(ValueError, match="start must be a trained captioner for self_critical learning, got None"):
        fit(Captioning(**LITTLE | {"learning": "self_critical"}))


@pytest.mark.slow
def test_any_attention_plugs_in(fit):
    for attention in (partial(MultiHeadAttention, heads=2), partial(HardAttention, attention=AdditiveAttention)):
        found = fit(Captioning(**LITTLE | {"attention": attention, "doubly": 0.1}), max_steps=2)
        assert torch.tensor(float(found.callback_metrics["train/loss"])).isfinite()


@pytest.mark.slow
def test_any_decoder_plugs_in(fit):
    transformer = partial(TransformerDecoder, width=16, depth=2, heads=2, maps="all")
    for decoder, doubly in ((transformer, 0.1), (partial(PooledDecoder, hidden=8, embedding=8), 0.0)):
        found = fit(Captioning(**LITTLE | {"decoder": decoder, "doubly": doubly}), max_steps=2)
        assert torch.tensor(float(found.callback_metrics["train/loss"])).isfinite()
    with pytest.raises(ValueError, match="doubly must be 0 for PooledDecoder, which looks nowhere"):
        fit(Captioning(**LITTLE | {"decoder": PooledDecoder, "doubly": 0.1}))


def test_scores_are_those_of_all_images_once(data, monkeypatch):
    task, _ = built(data)
    logged = {}
    task.log, task.log_dict = lambda name, value, **_: logged.update({name: value}), logged.update
    task.heard["val"] = [Heard("1.png", "a red square", ["a red square"], None)] * 2
    task.heard["val"] += [Heard("2.png", "a dog", ["it is blue", "a blue square"], None)]
    task.compare("val")
    assert logged["val/words"] == 2.5
    assert logged["val/bleu_1"] == pytest.approx(4 / 5 * math.exp(1 - 6 / 5))
    assert not task.heard
    assert not {"val/exact", "val/grounded"} & logged.keys()


# --- described canvases -----------------------------------------------------------------------------------------------

TINY = {"backbone_args": {"in_chans": 1, "channels": [8, 8, 16, 16], "stem_width": 8, "output_stride": 8}}
LAYERED = partial(TransformerDecoder, width=16, depth=2, heads=2, maps="all")


def test_what_a_test_hears_is_kept_for_other_scores(data, trainer, tmp_path):
    found = trainer()
    found.test(Captioning(**LITTLE), datamodule=data())
    kept = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert {Path(line["image"]).name for line in kept} == {f"{k}.png" for k in range(12, 20)}
    assert all(len(line["references"]) == 3 for line in kept)
    scores = evaluate([line["caption"] for line in kept], [line["references"] for line in kept])
    assert scores["cider_d"] == pytest.approx(float(found.callback_metrics["test/cider_d"]), abs=1e-6)


def test_predictions_are_sentences(data, trainer, tmp_path):
    said = trainer(Predictions()).predict(Captioning(**LITTLE), datamodule=data())
    rows = list(csv.reader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert rows[0] == ["image", "caption"]
    assert [row[1] for row in rows[1:]] == [sentence for batch in said for sentence in batch]
    assert {Path(row[0]).name for row in rows[1:]} == {f"{k}.png" for k in range(12, 20)}


def test_a_prediction_looks_at_images_where_maps_are_cached(data, trainer, tmp_path):
    said = []
    for cache in (None, str(tmp_path / "cache")):
        torch.manual_seed(0)
        said.append(trainer().predict(Captioning(**LITTLE), datamodule=data(cache=cache)))
    assert said[0] == said[1]
    assert sum(map(len, said[0])) == 8


def test_canvases_that_come_once_have_nothing_to_score_samples_by(fit):
    with pytest.raises(ValueError, match="must not be self_critical on DescribedCanvas, where"):
        fit(Captioning(**LITTLE | TINY | {"learning": "self_critical", "start": "anywhere"}), of=digits())


@pytest.mark.parametrize(
    "options",
    [{}, {"attention": partial(MultiHeadAttention, heads=2)}, {"attention": HardAttention}, {"decoder": LAYERED}],
    ids=["additive", "heads", "hard", "layers"],
)
def test_what_is_named_is_looked_for_in_its_box(options):
    task, _ = built(digits, **TINY | options)
    task.model.eval()
    data = task.trainer.datamodule
    batch = next(iter(data.val_dataloader()))
    task.hear(batch, "val")
    maps = task.model.told(batch.images, batch.words[:, :, :-1]).maps
    maps = getattr(maps, "probabilities", maps)
    named = 0
    for b, heard in enumerate(task.heard["val"]):
        expected = []
        for t, word in enumerate(data.vocabulary.encode(batch.references[b][0])):
            if word >= data.vocabulary.index["zero"]:
                weights = maps[b, 0, t].reshape(-1, 4, 8).mean(0)
                row, column = divmod(int(weights.argmax()), 8)
                x0, y0, x1, y1 = batch.boxes[b, 0, t].tolist()
                expected.append(x0 <= 8 * column + 4 < x1 and y0 <= 8 * row + 4 < y1)
        assert heard.pointed == expected
        named += len(expected)
    assert named == sum(len(said.split()) > 2 for (said,) in batch.references) + 8
    assert [heard.references for heard in task.heard["val"]] == batch.references


def test_exact_sentences_and_peaks_in_boxes_are_shares():
    task, _ = built(digits, **TINY)
    logged = {}
    task.log, task.log_dict = lambda name, value, **_: logged.update({name: value}), logged.update
    task.heard["val"] = [Heard("1", "a two", ["a two"], [True]), Heard("2", "a one", ["a two"], [False])]
    task.heard["val"] += [Heard("3", "a two left of a one", ["a two left of a one"], [True, True])]
    task.compare("val")
    assert logged["val/exact"] == pytest.approx(2 / 3)
    assert logged["val/grounded"] == 0.75


@pytest.mark.slow
def test_a_test_has_canvases_with_more_digits_beside(fit):
    logged, losses = [], Losses()
    for decoder in (SMALL, partial(PooledDecoder, hidden=8, embedding=8)):
        of = digits()
        task = Captioning(**LITTLE | TINY | {"decoder": decoder, "optimizer": partial(torch.optim.Adam, lr=2e-2)})
        found = fit(task, losses, of=of, max_epochs=3, check_val_every_n_epoch=3)
        metrics = {*found.callback_metrics}
        found.test(task, datamodule=of, verbose=False)
        logged.append(metrics | {*found.callback_metrics})
    attends, pools = logged
    assert losses.all[17]["train/loss"] < 0.9 * losses.all[0]["train/loss"]
    assert {"val/exact", "val/grounded", "test/exact", "test/grounded"} <= attends
    assert {"test_more/exact", "test_more/grounded", "test_more/cider_d"} <= attends
    assert {"val/exact", "test/exact", "test_more/exact"} <= pools
    assert not [name for name in pools if "grounded" in name]


# --- checkpoints and bad input ----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_its_words(data, tmp_path):
    task, batch = built(data)
    visattn.save(task.model, tmp_path / "mine", **task.described)
    model = visattn.load(tmp_path / "mine")
    assert model.vocabulary.decode(batch.words[0, 0].tolist()) == task.vocabulary.decode(batch.words[0, 0].tolist())
    assert f"Vocabulary: {len(task.vocabulary)} words" in (tmp_path / "mine" / "card.md").read_text()
    config = tmp_path / "mine" / "config.json"
    config.write_text(config.read_text().replace('"words":', '"letters":'))
    with pytest.raises(CheckpointError, match="its vocabulary cannot be read: state must be that of a vocabulary"):
        visattn.load(tmp_path / "mine")
    task.vocabulary.known.append("more")
    with pytest.raises(CheckpointError, match="vocabulary must have the words of the model"):
        visattn.save(task.model, tmp_path / "other", **task.described)


def test_words_of_others_are_refused(fit, data, tmp_path, photos):
    fit(Captioning(**LITTLE), max_epochs=1)
    text = (photos.parent / "captions.csv").read_text()
    (photos.parent / "captions.csv").write_text(text.replace("square", "circle"))
    with pytest.raises(ValueError, match="start must have the words of the data"):
        fit(Captioning(**LITTLE | {"start": str(tmp_path / "checkpoints" / "last.ckpt")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: ["dog", *words[1:]], "word 2 is 'a' there and 'dog' here"),
        (lambda words: [*words[:2], *words[2:][::-1]], "word 4 is 'is' there and 'white' here"),
        (lambda words: words[:-1], "word 10 is 'white' there and absent here"),
    ],
    ids=["other", "order", "fewer"],
)
def test_a_checkpoint_of_other_words_is_refused(fit, data, trainer, tmp_path, change, message):
    fit(Captioning(**LITTLE), max_steps=1)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    others = data()
    others.setup()
    words = [*others.vocabulary.known]
    for run in ("fit", "test"):
        again = data()
        again.vocabulary = Words(change(words))
        with pytest.raises(ValueError, match=f"the checkpoint has other words than the data: {message}"):
            getattr(trainer(max_epochs=2), run)(Captioning(**LITTLE), datamodule=again, ckpt_path=last)
    cut = data(tokens="given")
    with pytest.raises(ValueError, match="than the data: captions are cut into the same words in another way"):
        trainer(max_epochs=2).fit(Captioning(**LITTLE), datamodule=cut, ckpt_path=last)


TWO = partial(MultiHeadAttention, heads=2)


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        ({}, {"decoder": partial(SMALL, initial="last")}, ("decoder.initial", "mean", "last")),
        ({"attention": TWO}, {"attention": partial(TWO, heads=4)}, ("decoder.attention.heads", 2, 4)),
        (
            {"attention": HardAttention},
            {"attention": partial(HardAttention, temperature=0.5)},
            ("decoder.attention.temperature", 1.0, 0.5),
        ),
        (
            {"attention": HEADS},
            {"attention": partial(HardAttention, attention=MultiHeadAttention)},
            ("decoder.attention.attention.heads", 2, 8),
        ),
        ({"decoder": LAYERS}, {"decoder": partial(LAYERS, scaled=True)}, ("decoder.scaled", False, True)),
        ({"decoder": DILATED}, {"decoder": partial(DILATED, dilations=(1, 3))}, ("decoder.dilations", [1, 2], [1, 3])),
        ({"placed": True}, {}, ("placed", True, False)),
        ({"layers": 1, "heads": 2}, {"layers": 1, "heads": 4}, ("heads", 2, 4)),
        ({"heads": 2}, {"heads": 4}, None),
        ({"dropout": 0.1, "decoder": partial(SMALL, dropout=0.5)}, {}, None),
        ({"decoder": LAYERS}, {"decoder": partial(LAYERS, maps="all", dropout=0.3)}, None),
        ({"attention": HEADS}, {"attention": partial(HEADS, expected=0.5, evaluation="argmax")}, None),
        ({"attention": MultiHeadAttention}, {"attention": partial(MultiHeadAttention, width=24, heads=8)}, None),
    ],
)
def test_options_that_change_what_is_computed_are_those_of_the_checkpoint(data, tmp_path, trained, asked, message):
    of, task = built(data, **trained)[0], built(data, **asked)[0]
    content = {"visattn": describe(of.model, **of.described), "state_dict": of.state_dict()}
    visattn.save(of.model, tmp_path / "mine", **of.described)
    if message is None:
        task.on_load_checkpoint(content)
        task.begin_with(str(tmp_path / "mine"))
        assert all(torch.equal(p, task.model.state_dict()[name]) for name, p in of.model.state_dict().items())
        return
    (name, there, here), path = message, tmp_path / "mine"
    before = {name: p.clone() for name, p in task.model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(f"the checkpoint holds {name} {there!r}, the model has {here!r}")):
        task.on_load_checkpoint(content)
    expected = f"start must have {name} {here!r} as the model has, {path} has {there!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        task.begin_with(str(path))
    assert all(torch.equal(p, before[name]) for name, p in task.model.state_dict().items())


def test_a_run_is_resumed_and_tested_with_the_options_it_had(fit, data, trainer, tmp_path):
    fit(Captioning(**LITTLE), max_steps=1)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    other = LITTLE | {"decoder": partial(SMALL, initial="last")}
    message = "the checkpoint holds decoder.initial 'mean', the model has 'last'"
    for run in ("fit", "test"):
        with pytest.raises(ValueError, match=message):
            getattr(trainer(max_epochs=2), run)(Captioning(**other), datamodule=data(), ckpt_path=last)
    other = LITTLE | {"decoder": partial(SMALL, dropout=0.3), "dropout": 0.1}
    trainer(max_epochs=2, limit_val_batches=0).fit(Captioning(**other), datamodule=data(), ckpt_path=last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet10x"}, "backbone 'resnet10x' is not known to timm; close: "),
        ({"learning": "reward"}, "learning must be cross_entropy or self_critical or wake_sleep, got 'reward'"),
        ({"explored": "greedy"}, "explored must be chance or beam, got 'greedy'"),
        ({"baseline": "none"}, "baseline must be greedy or leave_one_out, got 'none'"),
        ({"target": "two"}, "target must be one or length, got 'two'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"longest": 0}, "longest must be at least 1, got 0"),
        ({"learning": "self_critical", "samples": 1}, "samples must be at least 2 for leave_one_out"),
        ({"learning": "wake_sleep", "samples": 1}, "samples must be at least 2 for wake_sleep"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"doubly": -1.0}, "doubly must not be negative, got -1.0"),
        ({"cross_entropy_factor": -1.0}, "cross_entropy_factor must not be negative, got -1.0"),
    ],
)
def test_refuses_options_out_of_range(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Captioning(**LITTLE | options)


@pytest.mark.slow
def test_what_is_inserted_in_a_frozen_backbone_learns_and_is_saved(fit, data, tmp_path):
    task = Captioning(**LITTLE | {"inserted": CBAM, "at": "stages", "gate": None})
    first = {}

    class Note(pl.Callback):
        def on_train_start(self, trainer, task):
            first.update({name: p.detach().clone() for name, p in task.model.backbone.named_parameters()})

    fit(task, Note(), max_epochs=1)
    assert len(visattn.insertions(task.model)) == 4
    changed = {name for name, p in task.model.backbone.named_parameters() if not torch.equal(p, first[name])}
    assert any("layer4" in name for name in changed)
    assert all(name.startswith("visattn.") for name in changed)
    again = visattn.load(tmp_path / "checkpoints" / "last.ckpt")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again.features(images), task.model.eval().features(images))
    saved = visattn.load(visattn.save(task.model, tmp_path / "saved"))
    torch.testing.assert_close(saved.features(images), again.features(images))
    with pytest.raises(ValueError, match="cache must be left out where the backbone, or what is inserted"):
        fit(Captioning(**LITTLE | {"inserted": CBAM}), of=data(cache=str(tmp_path / "cache")))

    begun = Captioning(**LITTLE | {"inserted": CBAM, "at": "stages", "gate": None, "start": str(tmp_path / "saved")})
    fit(begun, max_epochs=0)
    torch.testing.assert_close(begun.model.eval().features(images), again.features(images))
    for inserted in (None, SqueezeExcitation):
        name = inserted and inserted.__name__
        with pytest.raises(ValueError, match=f"inserted must be what .* has inserted, CBAM, got {name}"):
            fit(Captioning(**LITTLE | {"inserted": inserted, "start": str(tmp_path / "saved")}), max_epochs=0)


@pytest.mark.slow
def test_something_is_inserted_into_a_captioner_that_was_trained_without(fit, tmp_path):
    task = Captioning(**LITTLE)
    fit(task, max_epochs=1)
    visattn.save(task.model, tmp_path / "saved", **task.described)
    begun = Captioning(**LITTLE | {"inserted": CBAM, "at": "stages", "start": str(tmp_path / "saved")})
    fit(begun, max_epochs=0, default_root_dir=tmp_path / "begun")
    assert len(visattn.insertions(begun.model)) == 4
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(begun.model.eval().features(images), task.model.eval().features(images))


def test_what_regions_do_not_depend_on_asks_for_no_gradient(data):
    task, batch = built(data, backbone="mobilenetv3_small_050", freeze_backbone=False)  # its head has a convolution
    task.training_loss(batch).backward()
    left = {name for name, p in task.model.backbone.named_parameters() if not p.requires_grad}
    assert left == {"conv_head.weight", "conv_head.bias"}
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_channels_lie_last_in_what_the_backbone_makes_and_tell_the_same(data):
    losses = []
    for last in (False, True):
        torch.manual_seed(0)
        task, batch = built(data, backbone_args={"output_stride": 8}, channels_last=last)
        made = task.features(batch.images)
        assert made.is_contiguous(memory_format=torch.channels_last) == last
        losses.append(task.training_loss(batch).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_cache_is_for_a_backbone_that_stays(fit, data, tmp_path):
    with pytest.raises(
        ValueError, match="cache must be left out where the backbone, or what is inserted in it, learns"
    ):
        fit(Captioning(**LITTLE | {"freeze_backbone": False}), of=data(cache=str(tmp_path / "cache")))


def test_maps_are_made_of_the_backbone_that_a_checkpoint_has(fit, data, trainer, tmp_path):
    fit(Captioning(**LITTLE, freeze_backbone=False), max_epochs=1)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    found = []
    for options in ({}, {"cache": str(tmp_path / "cache")}):
        of = data(**options)
        task = Captioning(**LITTLE)
        found.append(trainer().test(task, datamodule=of, ckpt_path=last))
    assert found[0] == found[1]
    plain = data()
    plain.setup()
    images, maps = (next(iter(each.val_dataloader())).images for each in (plain, of))
    with torch.no_grad():
        torch.testing.assert_close(maps, task.model.features(images), rtol=1e-3, atol=1e-3)


def test_maps_of_a_backbone_of_other_options_are_refused(fit, data, tmp_path):
    cache = str(tmp_path / "cache")
    torch.manual_seed(0)
    fit(Captioning(**LITTLE), of=data(cache=cache), max_steps=1)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"holds other maps, .*: backbone_args is None, not {'output_stride': 8}"):
        fit(Captioning(**LITTLE | FINE), of=data(cache=cache), max_steps=1)


def test_a_test_reads_other_data_by_the_words_of_the_checkpoint(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--task Captioning --model.backbone resnet10t --model.width 16 --data.size 32 --data.min_count 1"
    options += f" --data.images {photos} --data.batch_size 4 --data.workers 0 --trainer.accelerator cpu"
    options += " --trainer.enable_progress_bar false --trainer.max_epochs 1 --trainer.default_root_dir runs"
    run_cli(["fit", "--data.captions", "captions.csv", *options.split(), "--trainer.limit_val_batches", "0"])
    rows = [f"{k}.png,a strange {list(COLOURS)[k % 4]} box,test" for k in range(4)]
    (tmp_path / "others.csv").write_text("\n".join(["image,caption,split", *rows]))
    run_cli(["test", "--data.captions", "others.csv", *options.split(), "--ckpt_path", "last"])
    assert "test/cider_d" in capsys.readouterr().out


def test_needs_to_be_told_the_words():
    with pytest.raises(ValueError, match="the data must say which words there are"):
        Captioning(**LITTLE).configure_model()
