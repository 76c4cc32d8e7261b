"""Say what is in a picture: a backbone of timm and a decoder that looks at its map, trained by Lightning."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from visattn import attention as zoo
from visattn.attention.base import Attention
from visattn.attention.memory.core import MemoryAttention
from visattn.attention.memory.hard import HardAttention, HardWeights
from visattn.data.captions import CaptionBatch, Captions, ReferenceBatch
from visattn.data.described import DescribedCanvas
from visattn.data.features import digest, wait
from visattn.data.vocabulary import Vocabulary
from visattn.metrics.cider import CiderD
from visattn.metrics.evaluation import evaluate
from visattn.metrics.pointing import points_into
from visattn.models import decoders
from visattn.models.captioner import Captioner
from visattn.models.decoders import Decoder, Said, Sentences, ShowAttendAndTell, sample
from visattn.models.decoders.search import without
from visattn.models.proposal import Proposal, draw
from visattn.surgery import insert, insertions
from visattn.tasks.base import Task, found_class, known_to_timm, mean_over_ranks, plainly, trained_weights, unlike
from visattn.tasks.importance import importance
from visattn.tasks.regions import RegionTask, averaged, not_negative
from visattn.tasks.run import RunError, folder

MakeAttention = Callable[[int], Attention]
MakeDecoder = Callable[[int, int], Decoder]
MakeMemoryAttention = Callable[[int, int], MemoryAttention]
Learning = Literal["cross_entropy", "self_critical", "wake_sleep"]
Baseline = Literal["greedy", "leave_one_out"]
Explored = Literal["chance", "beam"]
Spread = Literal["one", "length"]


class Heard(NamedTuple):
    """What was said about an image."""

    name: str
    said: str
    references: list[str]
    pointed: list[bool] | None
    """Whether each word that names something was read there; None where nobody knows."""


class Captioning(RegionTask):
    r"""Train a captioner to say what is in a picture.

    By cross entropy, the mean over the true words of all processes; or, self-critically (arXiv:1612.00563), by the
    CIDEr-D :math:`R` of sentences that it says,

    .. math:: \nabla = -\sum_n (R_n - b_n)\, \nabla \log p(w_n) \Big/ \sum_n |w_n|

    where :math:`b` is that of its greedy sentence, or of the image's other sentences; some of the cross entropy may be
    added. An attention that picks regions (arXiv:1502.03044) is taught by what its picks make likely,
    :math:`\log p(w \mid s)` less its moving average, and in self-critical learning by :math:`R_n - b_n` as well as
    words; or by wake-sleep learning (arXiv:1509.06812), in which a :class:`~visattn.models.proposal.Proposal` that
    knows the caption says where to look, and its draws count by how well they go with words and attention.

    A validation says what it sees, by a beam, and compares it with what people said. A test also writes all sentences,
    an image a line, to ``test.jsonl`` in the folder of the run.

    Args:
        backbone: Name of a timm model; also ``local-dir:FOLDER`` and ``hf-hub:NAME``.
        pretrained: Whether the backbone starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``.
        channels_last: Whether the backbone's maps lie in memory with the channels last: faster on most GPUs, and for
            small networks on a processor.
        freeze_backbone: Whether the backbone stays as it is, in evaluation mode. With ``data.cache``, its maps are made
            once.
        inserted: What to insert into the backbone: an attention class with its options. It learns.
        at: Where, in the grammar of ``visattn.sites``; left out, where the module's paper puts it.
        gate: ``"identity"`` leaves the output of the backbone unchanged at first; None inserts as in the paper.
        decoder: What tells, with its options; left out, :class:`~visattn.models.decoders.ShowAttendAndTell`.
        attention: What the decoder looks with, with its options; left out, the decoder's own.
        width: Features of a region; left out, as many as the backbone has.
        placed: Whether regions are told their rows and columns, by sines and cosines that are added to them.
        layers: How many transformer blocks the regions go through.
        heads: How many heads their attention has.
        dropout: Probability to drop a number of a region.
        label_smoothing: Share of the target that is spread over all words.
        scheduled: Probability, at the end of the training, that a word is read as the captioner would have said it
            (arXiv:1506.03099); it rises linearly. Decoders that take all steps at once draw each after the words of the
            caption.
        doubly: Weight of :math:`\sum_i (\tau - \sum_t a_{ti})^2`, by which all regions are looked at alike.
        target: What :math:`\tau` is: ``"one"`` as in the paper, or the ``"length"`` of the caption over the number of
            regions, which the weights can reach.
        penalty_factor: Weight of the penalty that the attention itself has on its weights.
        learning: ``"cross_entropy"``; ``"self_critical"``, which is for a captioner that was trained already; or
            ``"wake_sleep"``, for an attention that picks regions.
        start: Folder or checkpoint of a captioner to start from, of the same words and options; dropout may be another.
        samples: How many sentences are said about an image; or by how many draws of regions each caption is read, in
            wake-sleep learning.
        explored: Whether those sentences are said by ``"chance"``, or are the best of a ``"beam"`` (arXiv:1912.08226),
            which are like those that are said in the end.
        baseline: ``"greedy"`` or ``"leave_one_out"``.
        cross_entropy_factor: Weight of the cross entropy in self-critical learning, which has none in the paper.
        policy_factor: Weight of what teaches picks.
        entropy_factor: Weight of the entropy of picks, which is to be great.
        beam: How many beginnings an evaluation keeps.
        alpha: By which power of its length an evaluation divides the log-probability of a sentence.
        longest: How many words are said at most.
        optimizer: An optimizer with its options; left out, AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch; left out, the rate rises linearly
            and falls to zero along a cosine, step by step.
        warmup: Share of all steps in which the learning rate rises, without ``schedule``.

    Raises:
        ValueError: If timm knows no such backbone, or an option is out of its range or does not fit the others.
    """

    data = (Captions, DescribedCanvas)
    monitor = "val/cider_d"
    columns = ("caption",)
    """What a prediction says beside the name of an image."""
    classes = Task.classes | {"decoder": decoders, "attention": zoo, "inserted": zoo}
    asks = "decoder"

    def __init__(
        self,
        backbone: str = "mobilenetv2_100",
        *,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        channels_last: bool = False,
        freeze_backbone: bool = True,
        inserted: MakeAttention | None = None,
        at: str | None = None,
        gate: Literal["identity"] | None = "identity",
        decoder: MakeDecoder | None = None,
        attention: MakeMemoryAttention | None = None,
        width: int | None = None,
        placed: bool = False,
        layers: int = 0,
        heads: int = 8,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        scheduled: float = 0.0,
        doubly: float = 0.0,
        target: Spread = "one",
        penalty_factor: float = 1.0,
        learning: Learning = "cross_entropy",
        start: str | None = None,
        samples: int = 5,
        explored: Explored = "chance",
        baseline: Baseline = "leave_one_out",
        cross_entropy_factor: float = 0.0,
        policy_factor: float = 0.1,
        entropy_factor: float = 0.002,
        beam: int = 3,
        alpha: float = 0.7,
        longest: int = 20,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        warmup: float = 0.05,
    ):
        super().__init__(optimizer, schedule, pretrained)
        known_to_timm(backbone)
        named = (("learning", learning, Learning), ("explored", explored, Explored), ("baseline", baseline, Baseline))
        for name, given, kinds in named:
            if given not in get_args(kinds):
                raise ValueError(f"{name} must be {' or '.join(get_args(kinds))}, got {given!r}")
        if target not in get_args(Spread):
            raise ValueError(f"target must be {' or '.join(get_args(Spread))}, got {target!r}")
        for name, count in (("samples", samples), ("beam", beam), ("longest", longest)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        compares = {"self_critical": baseline, "wake_sleep": learning}.get(learning)
        if compares in ("leave_one_out", "wake_sleep") and samples < 2:
            raise ValueError(f"samples must be at least 2 for {compares}, which compares them, got {samples}")
        for name, share in (("label_smoothing", label_smoothing), ("scheduled", scheduled), ("warmup", warmup)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {share}")
        factors = {"doubly": doubly, "penalty_factor": penalty_factor, "policy_factor": policy_factor, "alpha": alpha}
        factors |= {"cross_entropy_factor": cross_entropy_factor, "entropy_factor": entropy_factor}
        not_negative(**factors)
        self.save_hyperparameters(ignore=["_instantiator"])
        self.decoder, self.attention, self.inserted = decoder or ShowAttendAndTell, attention, inserted
        self.remember(decoder=self.decoder, attention=attention, inserted=inserted)
        self.heard: dict[str, list[Heard]] = defaultdict(list)
        self.register_buffer("average", torch.zeros(()))

    # --- the network --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        h, data = self.hparams, getattr(self._trainer, "datamodule", None)
        self.preprocess, self.vocabulary = getattr(data, "preprocess", None), getattr(data, "vocabulary", None)
        if self.vocabulary is None:
            raise ValueError("the data must say which words there are")
        make = plainly(self.decoder, "decoder")
        if self.attention is not None:
            make = partial(make, attention=plainly(self.attention, "attention"))
        options: Any = {
            name: h[name] for name in ("backbone", "backbone_args", "width", "placed", "layers", "heads", "dropout")
        }
        with trained_weights(h["backbone"]):
            self.model = Captioner(
                len(self.vocabulary),
                end=self.vocabulary.end,
                unknown=self.vocabulary.unknown,
                pretrained=h["pretrained"],
                decoder=make,
                **options,
            )
        fits = self._trainer is not None and self._trainer.state.fn == "fit"
        if h["learning"] == "self_critical" and fits:
            if not hasattr(data, "references"):
                kind = type(data).__name__
                raise ValueError(f"learning must not be self_critical on {kind}, where no image is captioned twice")
            if h["start"] is None:
                raise ValueError("start must be a trained captioner for self_critical learning, got None")
        if fits and h["start"] is not None:
            self.begin_with(h["start"])
        if self.inserted is not None and not insertions(self.model):
            size = getattr(data, "input_size", None)
            insert(self.model.backbone, self.inserted, at=h["at"], gate=h["gate"], input_size=size)
        if h["channels_last"]:
            self.model.backbone.to(memory_format=torch.channels_last)  # maps follow the weights
        if h["doubly"] and not any(isinstance(module, MemoryAttention) for module in self.model.decoder.modules()):
            raise ValueError(f"doubly must be 0 for {type(self.model.decoder).__name__}, which looks nowhere")
        if h["learning"] == "wake_sleep":
            look = getattr(self.model.decoder, "attention", None)
            if not isinstance(look, HardAttention) or getattr(look.attention, "heads", 1) > 1:
                kind = type(self.model.decoder if look is None else look).__name__
                raise ValueError(f"attention must pick one region a word for wake_sleep learning, got {kind}")
            self.proposal = Proposal(len(self.vocabulary), self.model.width)
        if h["freeze_backbone"]:
            self.model.backbone.requires_grad_(False)
            for module in self._trained():
                module.requires_grad_(True)
        else:
            self.model.freeze_unread()
        self.train(self.training)
        self.cached = bool(getattr(data, "cache", None))
        if self.cached:
            self.keep(data)

    def beside(self) -> dict[str, nn.Module]:
        return {"proposal": self.proposal} if self.hparams["learning"] == "wake_sleep" else {}

    def begin_with(self, start: str) -> None:
        """Take over the weights of a captioner of the same words and options, and what is inserted in it."""
        from visattn.checkpoint import description, load

        known, own = description(start), self.vocabulary
        words = known["vocabulary"] and Vocabulary.load(known["vocabulary"])
        if own is not None and words is not None and words != own:
            difference = unlike(words, own)
            raise ValueError(f"start must have the words of the data, {start} has others: {difference}")
        if known["model"] and (found := self.contradiction(known["model"]["arguments"])):
            name, other, mine = found
            raise ValueError(f"start must have {name} {mine!r} as the model has, {start} has {other!r}")
        load(start, into=self.model)
        self.model.vocabulary = own
        there = {type(each.attention).__name__ for each in insertions(self.model)}
        here = set() if self.inserted is None else {found_class(self.inserted).__name__}
        if there and there != here:
            asked = ", ".join(here) or "None"
            raise ValueError(f"inserted must be what {start} has inserted, {', '.join(sorted(there))}, got {asked}")

    def keep(self, data: Any) -> None:
        """Have the maps of the frozen backbone made when batches of them are asked for, or read where that was done."""
        if not self.hparams["freeze_backbone"] or self.inserted is not None:
            raise ValueError("cache must be left out where the backbone, or what is inserted in it, learns")
        strategy: Any = self._trainer.strategy  # type: ignore[union-attr]

        def make() -> None:
            model = self.model.to(strategy.root_device)
            about = {"encoder": self.hparams["backbone"], "weights": digest(model.backbone.state_dict())}
            if self.hparams["backbone_args"]:
                about["backbone_args"] = self.hparams["backbone_args"]

            @torch.no_grad()
            def look(images: Tensor) -> Tensor:
                return model.features(images.to(strategy.root_device))

            if strategy.is_global_zero:
                data.fill(look, **about)
            else:
                wait(data.cache)
            strategy.barrier()
            if not strategy.is_global_zero:
                data.fill(look, **about)

        if strategy.restore_checkpoint_after_setup:
            make()  # before it is divided, of which one process alone could make none
        else:
            data.wanted = make  # once a checkpoint has given its weights

    def train(self, mode: bool = True) -> "Captioning":
        super().train(mode)
        if hasattr(self, "model") and self.hparams["freeze_backbone"]:
            self.model.backbone.eval()
            for module in self._trained():
                module.train(mode)
        return self

    def _trained(self) -> Iterator[nn.Module]:
        """What learns in a backbone that stays as it is."""
        for each in insertions(self.model):
            yield each
            yield each.attention

    def features(self, images: Tensor) -> Tensor:
        """Return maps of the backbone, of images or of what was made of them before."""
        return images if self.cached else self.model.features(images)

    # --- learning -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self.hparams["learning"] == "self_critical":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.scorer = CiderD(data.references("train"), end=self.model.end)

    def training_loss(self, batch: CaptionBatch) -> Tensor:
        features = self.features(batch.images)
        memory, size = self.model.regions(features)
        prepared = self.model.decoder.prepare(memory, None, size)
        critical = self.hparams["learning"] == "self_critical"
        if critical and not self.hparams["cross_entropy_factor"]:
            return self.critical_loss(features, prepared, batch)
        words = self.read_words(prepared, batch.words[:, :, :-1])
        there = torch.arange(batch.words.shape[2], device=self.device) < batch.lengths[..., None]
        if self.hparams["learning"] == "wake_sleep":
            return self.wake_sleep_loss(prepared, memory, batch, words, there)
        said = self.model.decoder(prepared, words, batch.lengths)
        nats = self.nats(said, batch.words, there, self.hparams["label_smoothing"])
        loss = nats.sum() / shared(there.sum())
        self.log("train/cross_entropy", loss)
        if critical:
            return self.critical_loss(features, prepared, batch) + self.hparams["cross_entropy_factor"] * loss
        loss = loss + self.looking_loss(said.maps, there)
        if not isinstance(said.maps, HardWeights):
            return loss
        gain = self.gain(-nats.detach().sum(2) / there.sum(2).clamp_min(1))  # of a caption, by its length
        return loss + self.picking_loss(said.maps, there, gain, shared(there.sum()))

    def nats(
        self,
        said: Said,
        words: Int[Tensor, "b r t"],
        there: Bool[Tensor, "b r t"],
        smoothing: float = 0.0,
        never: Sequence[int] = (),
    ) -> Float[Tensor, "b r t"]:
        """Return the cross entropy of each word among those that are said, zero where there is none."""
        logits = without(self.model.decoder.write(said.features[there]), never)
        each = F.cross_entropy(logits, words[there], label_smoothing=smoothing, reduction="none")
        return torch.zeros_like(there, dtype=each.dtype).masked_scatter(there, each)

    def read_words(self, prepared: Any, words: Int[Tensor, "b r t"]) -> Int[Tensor, "b r t"]:
        """Return the words that are read: those of captions, some replaced by what would have been said."""
        steps = self.trainer.estimated_stepping_batches
        share = self.hparams["scheduled"] * min(1.0, self.global_step / max(1.0, float(steps)))
        if not share or not words.shape[2]:
            return words
        own = torch.rand(words.shape, device=words.device) < share
        decoder: Decoder = self.model.decoder
        with torch.no_grad():
            if decoder.parallel:
                logits = decoder.write(decoder(prepared, words).features[:, :, :-1])
                return torch.where(own, drawn(logits, self.model.never), words)
            state, last, read = decoder.begin(prepared, words.shape[1]), None, []
            for t in range(words.shape[2]):
                features, _, state = decoder.step(last, prepared, state)
                said = drawn(decoder.write(features), self.model.never)
                last = torch.where(own[:, :, t], said, words[:, :, t])
                read.append(last)
        return torch.stack(read, 2)

    def looking_loss(self, maps: Any, there: Bool[Tensor, "b r t"]) -> Tensor:
        """Return what is asked of the weights themselves, where there are words."""
        if maps is None:
            return torch.zeros((), device=self.device)
        loss = self.penalty_loss(maps, there)
        return loss + self.hparams["doubly"] * self.unevenness(maps, there) if self.hparams["doubly"] else loss

    def wake_sleep_loss(
        self,
        prepared: Any,
        memory: Float[Tensor, "b l d"],
        batch: CaptionBatch,
        words: Int[Tensor, "b r t"],
        there: Bool[Tensor, "b r s"],
    ) -> Tensor:
        """Return the loss of captions read from proposed regions, by how well these go with words and attention."""
        samples = self.hparams["samples"]
        proposed = self.proposal(memory.detach(), batch.words, batch.lengths)
        drawn = draw(proposed.detach().unsqueeze(2).expand(-1, -1, samples, -1, -1))
        known = proposed.gather(-1, drawn.movedim(2, -1)).movedim(-1, 2)
        known = (known * there[:, :, None]).sum(-1)

        words, right, lengths, there = (
            x.repeat_interleave(samples, 1) for x in (words, batch.words, batch.lengths, there)
        )
        said = self.model.decoder(prepared, words, lengths, drawn.flatten(1, 2))
        likely = -self.nats(said, right, there).sum(2).unflatten(1, (-1, samples))
        prior = said.maps.log_probability(there).sum(2).unflatten(1, (-1, samples))
        share, more = importance(likely.detach(), prior.detach(), known.detach())
        count = shared(there.sum())
        self.log("train/cross_entropy", -likely.detach().sum() / count)
        self.log("train/effective_samples", (samples**2 / share.square().sum(-1)).mean())
        loss = -(share * (likely + known) + more * prior).sum() / count
        return loss + self.looking_loss(said.maps, there) + self.entropy_loss(said.maps, there, count)

    def unevenness(self, maps: Any, there: Bool[Tensor, "b r t"]) -> Tensor:
        """Return how far regions are from being looked at alike, in the mean over captions."""
        total = (averaged(maps) * there[..., None]).sum(2)
        count = there.sum(2, keepdim=True) / total.shape[-1] if self.hparams["target"] == "length" else 1.0
        return (count - total).square().sum(-1).mean()

    def critical_loss(self, features: Tensor, prepared: Any, batch: CaptionBatch) -> Tensor:
        """Return the loss of sentences that are said, by their CIDEr-D."""
        h, decoder = self.hparams, self.model.decoder
        never = self.model.never  # else it would learn to say what it does not know, where people do
        learns = any(module.training for module in self.model.backbone.modules())
        still = None if learns else features.detach()  # what an evaluation has as well
        choice = {}
        if h["explored"] == "beam":
            found = self.best(batch.images, still, width=h["samples"], alpha=h["alpha"])
        else:
            found = sample(decoder, prepared, end=self.model.end, count=h["samples"], longest=h["longest"], never=never)
            if isinstance(found.maps, HardWeights):
                choice = {"choice": found.maps.choice}  # what the sentences were said by
        reward = self.rewards(found, batch.indices)
        if h["baseline"] == "greedy":
            expected = self.rewards(self.best(batch.images, still, width=1), batch.indices)
        else:
            expected = (reward.sum(1, keepdim=True) - reward) / (h["samples"] - 1)
        if not reward.isfinite().all():
            raise RunError(f"reward is not finite at step {self.global_step} (epoch {self.current_epoch})")
        there = torch.arange(found.words.shape[2], device=self.device) < found.lengths[..., None]
        said = decoder(prepared, found.words[:, :, :-1], found.lengths, **choice)
        nats = self.nats(said, found.words, there, never=never)
        self.log_dict({"train/reward": reward.mean(), "train/length": found.lengths.float().mean()})
        advantage, count = reward - expected, shared(there.sum())
        loss = (advantage[..., None] * nats).sum() / count + self.looking_loss(said.maps, there)
        if not isinstance(said.maps, HardWeights):
            return loss
        return loss + self.picking_loss(said.maps, there, advantage, count)

    @torch.no_grad()
    def best(self, images: Tensor, features: Tensor | None = None, **options: Any) -> Sentences:
        """Return the likeliest sentences about images, as they would be said in the end: nothing is dropped.

        Args:
            images: The images.
            features: Their maps as an evaluation has them, where these are known.
            options: As of :meth:`~visattn.models.Captioner.say`.
        """
        self.eval()
        ready = self.model.ready(self.features(images) if features is None else features)
        found = self.model.say(ready, longest=self.hparams["longest"], **options)
        self.train()
        return found

    def rewards(self, found: Sentences, images: Int[Tensor, "b"]) -> Float[Tensor, "b n"]:
        """Return the CIDEr-D of sentences about images."""
        scores = self.scorer(found.words.cpu(), images.cpu())
        return torch.from_numpy(scores).to(found.log_probs)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def tell(self, prepared: Any) -> Sentences:
        """Return what is said about images that were made ready."""
        h = self.hparams
        return self.model.say(prepared, width=h["beam"], alpha=h["alpha"], longest=h["longest"])

    def texts(self, found: Sentences) -> list[str]:
        """Return the best sentence about each image in words."""
        assert self.vocabulary is not None
        return [self.vocabulary.decode(words) for words in found.words[:, 0].tolist()]

    def validation_step(self, batch: ReferenceBatch, batch_idx: int) -> None:
        self.hear(batch, "val")

    def test_step(self, batch: ReferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.hear(batch, "test_more" if dataloader_idx else "test")

    def on_validation_epoch_end(self) -> None:
        self.compare("val")

    def on_test_epoch_end(self) -> None:
        for stage in [*self.heard]:
            self.compare(stage)

    def hear(self, batch: ReferenceBatch, stage: str) -> None:
        """Note what is said about images, and where their references were read."""
        features = self.features(batch.images)
        prepared = self.model.ready(features)
        pointed: list[Any] = [None] * len(batch.names)
        if batch.words is not None and batch.boxes is not None:
            maps = self.model.decoder(prepared, batch.words[:, :, :-1]).maps
            pointed = self.pointed(maps, batch, (features.shape[2], features.shape[3]))
        texts = self.texts(self.tell(prepared))
        self.heard[stage] += map(Heard, batch.names, texts, batch.references, pointed)

    def pointed(self, maps: Any, batch: ReferenceBatch, size: tuple[int, int]) -> list[list[bool]]:
        """Say of each image whether the words of its references that name something were read there."""
        if maps is None:  # the decoder looks nowhere
            return [[] for _ in batch.names]
        assert batch.boxes is not None
        names = batch.boxes.any(-1)
        found = points_into(averaged(maps), batch.boxes, size, (batch.images.shape[2], batch.images.shape[3]))
        return [inside[there].tolist() for inside, there in zip(found, names, strict=True)]

    def compare(self, stage: str) -> None:
        """Log how near all that was said comes to what people said."""
        mine = self.heard.pop(stage, [])
        everything = [mine]
        if self.trainer.world_size > 1:
            everything = [[] for _ in range(self.trainer.world_size)]
            dist.all_gather_object(everything, mine)
        found = {one.name: one for several in everything for one in several}.values()  # each image once
        scores = evaluate([one.said for one in found], [one.references for one in found])
        words = sum(len(one.said.split()) for one in found) / max(1, len(found))
        self.log_dict({f"{stage}/{name}": value for name, value in scores.items() if name != "cider_d"})
        self.log(f"{stage}/cider_d", scores["cider_d"], prog_bar=True)
        self.log(f"{stage}/words", words)
        known = [one for one in found if one.pointed is not None]
        if known:
            self.log(f"{stage}/exact", share([one.said in one.references for one in known]), prog_bar=True)
        if pointed := [each for one in known for each in one.pointed or []]:
            self.log(f"{stage}/grounded", share(pointed), prog_bar=True)
        if stage != "val" and self.trainer.is_global_zero:
            self.keep_said(folder(self.trainer) / f"{stage}.jsonl", found)

    def keep_said(self, file: Path, found: Iterable[Heard]) -> None:
        """Write what was said about each image, beside what people said."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as opened:
            for one in found:
                line = {"image": one.name, "caption": one.said, "references": one.references}
                opened.write(f"{json.dumps(line, ensure_ascii=False)}\n")

    def predict_step(self, batch: Any, batch_idx: int) -> list[str]:
        """Return the sentences."""
        images = batch[0] if isinstance(batch, (list, tuple)) else batch  # never maps of them
        return self.texts(self.tell(self.model.prepare(images)))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def described(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary, "transform": self.preprocess, "task": "captioning"}


def shared(words: Tensor) -> Tensor:
    """Return how many words a process has on average, by which each divides its sums."""
    return mean_over_ranks(words.float()).clamp_min(1)


def drawn(logits: Float[Tensor, "b r *t v"], never: Sequence[int]) -> Int[Tensor, "b r *t"]:
    """Draw words as likely as they are, but for those that are never said."""
    each = without(logits, never).softmax(-1).flatten(0, -2).multinomial(1)
    return each.view(logits.shape[:-1])


def share(held: list[bool]) -> float:
    """Return the share of what is true."""
    return sum(held) / len(held)
