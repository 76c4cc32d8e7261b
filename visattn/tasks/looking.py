"""Learn where to look: networks that choose what they see of an image, trained by Lightning."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import timm
import torch
from jaxtyping import Bool, Float, Int
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection

from visattn import models
from visattn.attention.core import wide
from visattn.data.canvas import Canvas
from visattn.data.images import Images
from visattn.data.transforms import Preprocess
from visattn.models.glance_focus import GlanceFocus
from visattn.models.looker import Looker, Policy, Rollout
from visattn.models.policy import GaussianPolicy
from visattn.models.recurrent_attention import RecurrentAttention
from visattn.tasks.base import Task, found_class, mean_over_ranks, trained_weights
from visattn.tasks.importance import importance
from visattn.tasks.recognition import Recognition
from visattn.tasks.run import RunError

MakeLooker = Callable[[Any], Looker]
Reward = Literal["correct", "probability", "log_probability", "rise"]
Baseline = Literal["none", "average", "learned", "leave_one_out"]
Learning = Literal["reinforce", "wake_sleep"]
DECAY = 0.99  # of the moving average, in a step
SAMPLES = 10  # roll-outs of which a test averages the probabilities


class Looking(Recognition):
    r"""Train a network to look at an image place after place, and to say what it shows.

    What is seen is learned by the cross entropy after the last glimpse, and where to look by rewards :math:`R`:

    .. math:: \nabla = -\frac1M \sum_m \Bigl[\nabla \log p(y \mid a^m)
        + \lambda \sum_t (R^m_t - b^m_t)\, \nabla \log \pi(a^m_t)\Bigr]

    over :math:`M` roll-outs (arXiv:1406.6247). Wake-sleep learning (arXiv:1509.06812) learns from no reward, which is
    only logged: roll-outs count by how well they explain the answer, :math:`w^m \propto p(y \mid a^m)\, \pi(a^m) /
    q(a^m)`, less what they count without it,

    .. math:: \nabla = -\sum_m \Bigl[w^m \nabla \log p(y \mid a^m)
        + \lambda \bigl(w^m - \tilde w^m\bigr) \nabla \log \pi(a^m) + \lambda\, w^m \nabla \log q(a^m)\Bigr],
        \quad \tilde w^m \propto \pi(a^m) / q(a^m)

    where :math:`q` draws the actions: the policy itself, or what an ``informed`` network tells the answer.

    Where several targets are named one after another (arXiv:1412.7755), :math:`p(y \mid a)` is that of all of them. An
    action has the rewards of its own target and of later ones, up to the first that is named wrong: what follows has no
    reward, and teaches the policy nothing. Differs from the paper: the cross entropy goes on there.

    A validation looks once, each action being the mean of the policy. A test does so from several first locations, and
    reports the mean (``test/top1``), the worst and the best of them; one roll-out by chance (``top1_sampled``), the
    mean probabilities of ten (``top1_M10``), and, to compare with, locations by chance alone (``top1_random``) and
    always at the centre (``top1_centre``). Several targets must all be named right; ``val/top1_target`` and
    ``test/top1_target`` count each of them. Both draw the same numbers every time.

    Args:
        network: The network with its options; left out, :class:`~visattn.models.RecurrentAttention`. Classes, targets,
            channels and size of its input come from the data, unless they are among the options.
        pretrained: Whether its encoder starts with its trained weights.
        rollouts: How often each image is looked at in a step, :math:`M`.
        reward: 1 for the ``"correct"`` class as in the paper, else 0; the ``"probability"`` of the true class, or its
            ``"log_probability"``; or its ``"rise"`` by each glimpse, of which an action has those that come later. The
            last two are for one target.
        discount: What a rise is worth to an action one glimpse earlier; 0: an action has only the rise by its own
            glimpse, 1: all that come later.
        baseline: What is subtracted from the reward: ``"none"``, its moving ``"average"``, what the network has
            ``"learned"`` to expect, or the mean of the image's other roll-outs, ``"leave_one_out"``.
        learning: ``"reinforce"`` or ``"wake_sleep"``.
        policy_factor: Weight :math:`\lambda` in the loss of what teaches the policy; steps are summed.
        entropy_factor: Weight of the policy's entropy, summed over the steps, which is to be great; it teaches a
            learned spread, and nothing else.
        every_step: Weight of the mean cross entropy after the earlier glimpses, which the paper does not have.
        ponder: Cost of a glimpse, for a network that halts by itself.
        draws: From how many first locations a test looks, if the network begins anywhere.
        optimizer: An optimizer with its options; left out, AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch; left out, the rate rises linearly
            and falls to zero along a cosine, step by step.
        warmup: Share of all steps in which the learning rate rises, without ``schedule``.

    Raises:
        ValueError: If an option is out of its range, or does not fit the others or the network.
    """

    data = (Canvas, Images)
    monitor = "val/top1"
    classes = Task.classes | {"network": models}
    validates: Policy = "mean"
    """By which policy a validation looks."""

    average: Tensor

    def __init__(
        self,
        network: MakeLooker | None = None,
        *,
        pretrained: bool = False,
        rollouts: int = 1,
        reward: Reward = "correct",
        discount: float = 1.0,
        baseline: Baseline = "learned",
        learning: Learning = "reinforce",
        policy_factor: float = 0.01,
        entropy_factor: float = 0.0,
        every_step: float = 0.0,
        ponder: float = 0.0,
        draws: int = 8,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        warmup: float = 0.05,
    ):
        super().__init__(optimizer, schedule, pretrained)
        network = network or RecurrentAttention  # no default, whose options a command line would hand on to another
        if not issubclass(found_class(network), Looker):
            raise ValueError(f"network must be one that looks, such as RecurrentAttention, got {network!r}")
        if type(self) is Looking and issubclass(found_class(network), GlanceFocus):
            raise ValueError(f"network must not be GlanceFocus, which Focusing trains in stages, got {network!r}")
        for name, given, kinds in (("reward", reward, Reward), ("baseline", baseline, Baseline)):
            if given not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {given!r}")
        if learning not in get_args(Learning):
            raise ValueError(f"learning must be reinforce or wake_sleep, got {learning!r}")
        for name, count in (("rollouts", rollouts), ("draws", draws)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        compares = learning if learning == "wake_sleep" else baseline
        if compares in ("wake_sleep", "leave_one_out") and rollouts < 2:
            raise ValueError(f"rollouts must be at least 2 for {compares}, which compares them, got {rollouts}")
        factors = {"policy_factor": policy_factor, "entropy_factor": entropy_factor}
        for name, factor in (factors | {"every_step": every_step, "ponder": ponder}).items():
            if factor < 0:
                raise ValueError(f"{name} must not be negative, got {factor}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {warmup}")
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {discount}")
        if discount < 1 and reward != "rise":
            raise ValueError(f"discount must be 1 for a reward of {reward}, which comes at the end, got {discount}")
        self.save_hyperparameters(ignore=["_instantiator"])
        self.remember(network=network)
        if self.hparams["network"]["init_args"].get("pretrained"):
            raise ValueError("pretrained must be given beside the network, not as an option of it")
        self.network = network
        if baseline == "average":
            self.register_buffer("average", torch.zeros(()))

    def expects(self) -> Preprocess | None:
        """Return what the trained weights of the encoder expect of an image; None where it starts with none."""
        if not self.pretrained:
            return None
        with torch.device("meta"):  # only what it says of itself is asked, not its weights
            return Preprocess.of(timm.create_model(self._encoder()))

    def _encoder(self) -> str:
        """The name of the timm model that is in the network."""
        options = self.hparams["network"]["init_args"]
        name = options.get("encoder") or options.get("backbone")
        if not name:
            raise ValueError("pretrained must be false for a network without an encoder, got true")
        return name

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        known = self.read_data() | {"targets": getattr(getattr(self._trainer, "datamodule", None), "targets", 1)}
        options = self.options(self.network, known)
        make: Any = found_class(self.network)
        if self.pretrained and self._trainer is not None:
            with trained_weights(self._encoder()):
                self.model = make(**options | {"pretrained": True})  # a command line says that it is not
        else:  # without a trainer, or on the way to a checkpoint, the weights come from elsewhere
            self.model = make(**options)
        if self.model.informed and self.hparams["learning"] != "wake_sleep":
            raise ValueError("learning must be wake_sleep for a network that is informed, got 'reinforce'")
        if self.hparams.get("ponder") and not self.model.halts:
            raise ValueError(f"ponder must be 0 for a network that never halts, got {self.hparams['ponder']}")
        several = self.model.targets > 1
        if several and self.hparams["reward"] not in ("correct", "probability"):
            kind = self.hparams["reward"]
            raise ValueError(f"reward must be correct or probability for a network of several targets, got {kind!r}")
        self.num_classes = self.model.num_classes
        self.check_entries(labels=self.labels)

        def accuracies(*names: str) -> MetricCollection:
            return MetricCollection({name: MeanMetric() for name in names}, compute_groups=False)

        draws = self.hparams["draws"] if self.model.begins_anywhere else 1
        self.val_scores = accuracies("val/top1", *["val/top1_target"] * several)
        self.draws = accuracies(*(f"draw{k}" for k in range(draws)))
        kinds = ("sampled", f"M{SAMPLES}", "random", "centre", *["target"] * several)
        self.test_scores = accuracies(*(f"test/top1_{kind}" for kind in kinds))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, (list, tuple)) and len(batch) > 1 and isinstance(batch[1], Tensor):
            shape = (len(batch[1]), self.model.targets)[: 1 + (self.model.targets > 1)]
            if batch[1].shape != shape:
                raise ValueError(f"labels must be of shape {shape}, as the network names, got {tuple(batch[1].shape)}")
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    # --- learning -----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self.policies = [module for module in self.model.modules() if isinstance(module, GaussianPolicy)]
        self.steps = self.trainer.estimated_stepping_batches

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        for policy in self.policies:
            policy.narrow(self.global_step / self.steps)

    def training_loss(self, batch: Sequence[Tensor]) -> Tensor:
        h, rollouts = self.hparams, self.hparams["rollouts"]
        images, targets = batch[0], batch[1]
        rollout = self.model.rollout(images, rollouts=rollouts, answer=targets if self.model.informed else None)
        log_p, count = wide(rollout.logits).log_softmax(-1), self.model.targets
        glimpses = log_p.shape[1] // count  # for each target
        targets = columns(targets).repeat_interleave(rollouts, 0).repeat_interleave(glimpses, 1)
        truth = log_p.gather(-1, targets[..., None])[..., 0]
        stops = rollout.stops[:, -glimpses:].repeat(1, count)
        reward, returns, counts = self.returns(log_p.detach(), targets, stops.detach(), rollout.log_probs.shape[1])
        if not reward.isfinite().all():
            raise RunError(f"reward is not finite at step {self.global_step} (epoch {self.current_epoch})")

        likelihood = (stops * truth).sum(1)
        if h["learning"] == "wake_sleep":
            share, advantage = self.shares(rollout, likelihood.detach())
        else:
            share, advantage = torch.ones_like(likelihood), counts * (returns - self.expected(returns, rollout))
        loss = -(share * likelihood).mean() - h["policy_factor"] * (advantage * rollout.log_probs).sum(1).mean()
        if rollout.informed is not None:
            loss = loss - h["policy_factor"] * (share * rollout.informed.sum(1)).mean()
        if h["every_step"] and glimpses > 1:
            earlier = by_target(truth, count)[..., :-1].mean(-1).sum(1)
            loss = loss - h["every_step"] * (share * earlier).mean()
        if h["entropy_factor"]:
            loss = loss - h["entropy_factor"] * rollout.entropies.sum(1).mean()
        if h["ponder"]:
            loss = loss + h["ponder"] * rollout.expected_glimpses.mean()
        guess = (counts * (returns - rollout.baselines).square()).sum() / mean_over_ranks(counts.sum()).clamp_min(1)
        learns = h["baseline"] == "learned" and h["learning"] == "reinforce"
        self.log_dict({"train/reward": reward.mean(), "train/cross_entropy": -likelihood.detach().mean()})
        return loss + (guess if learns else 0 * guess)  # so all parameters have a gradient

    def returns(
        self, log_p: Float[Tensor, "m t k"], targets: Int[Tensor, "m t"], stops: Float[Tensor, "m t"], actions: int
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m a"], Float[Tensor, "m a"]]:
        """Return the reward of each roll-out, what of it comes after each action, and which actions count (1, else 0).

        Those do that are not behind a target that was named wrong.

        Args:
            log_p: Logarithms of the probabilities of classes after each glimpse.
            targets: What is to be named after each.
            stops: The probability that each is the last one for its target.
            actions: How many glimpses were chosen; these are the last ones.
        """
        kind, (_, steps, classes) = self.hparams["reward"], log_p.shape
        right = (log_p.argmax(-1) == targets).to(log_p)
        after = right if kind == "correct" else log_p.gather(-1, targets[..., None])[..., 0]
        after = after.exp() if kind in ("probability", "rise") else after

        def at_end(x: Tensor) -> Tensor:
            return by_target(stops * x, self.model.targets).sum(-1)

        def of_actions(x: Tensor) -> Tensor:
            return x.repeat_interleave(steps // self.model.targets, 1)[:, steps - actions :]

        counts = F.pad(at_end(right)[:, :-1].cumprod(1), (1, 0), value=1.0)
        rewards = counts * at_end(after)
        if kind == "rise":
            rises = after.diff(dim=1, prepend=torch.full_like(after[:, :1], 1 / classes))
            returns = discounted(discounted(stops) * rises, self.hparams["discount"])[:, steps - actions :]
        else:
            returns = of_actions(discounted(rewards))
        return rewards.sum(1), returns, of_actions(counts)

    def expected(self, returns: Float[Tensor, "m a"], rollout: Rollout) -> Float[Tensor, "*m a"]:
        """Return the baseline, of which no part is the reward that it is subtracted from."""
        kind = self.hparams["baseline"]
        if kind == "learned":
            return rollout.baselines.detach()
        if kind == "leave_one_out":
            each = returns.unflatten(0, (-1, self.hparams["rollouts"]))
            return ((each.sum(1, keepdim=True) - each) / (each.shape[1] - 1)).flatten(0, 1)
        if kind == "none":
            return torch.zeros_like(returns)
        average = self.average.clone()
        if returns.numel():
            self.average.lerp_(mean_over_ranks(returns.mean()).to(average), 1 - DECAY)
        return average.expand_as(returns)

    def shares(
        self, rollout: Rollout, likelihood: Float[Tensor, "m"]
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m 1"]]:
        """Return how much each roll-out counts, one on average, and how much more than without the answer."""
        prior = rollout.log_probs.detach().sum(1)
        drawn = prior if rollout.informed is None else rollout.informed.detach().sum(1)
        each = (x.unflatten(0, (-1, self.hparams["rollouts"])) for x in (likelihood, prior, drawn))
        share, more = importance(*each)
        return share.flatten(), more.flatten()[:, None]

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, targets = batch[0], columns(batch[1])
        with self.repeatable(batch_idx):
            rollout = self.model.rollout(images, policy=self.validates)
        right = self.report(rollout, targets, "val")
        update(self.val_scores, {"val/top1": right.all(1), "val/top1_target": right})
        self.log_dict(self.val_scores, prog_bar=True, batch_size=len(images))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, targets = batch[0], columns(batch[1])
        with self.repeatable(batch_idx):
            drawn = self.model.rollout(images, rollouts=len(self.draws), policy="mean")
            found = self.model.rollout(images, rollouts=SAMPLES)
            controls = {policy: self.model.rollout(images, policy=policy) for policy in ("random", "centre")}
        right = self.report(drawn, targets.repeat_interleave(len(self.draws), 0), "test")
        each = by_image(right.all(1), len(self.draws))
        update(self.draws, {f"draw{k}": hits for k, hits in enumerate(each.unbind(1))})
        several = by_image(wide(self.decisions(found)).softmax(-1), SAMPLES)
        seen = {"sampled": several[:, 0], f"M{SAMPLES}": several.mean(1)}
        seen |= {policy: self.decisions(rollout) for policy, rollout in controls.items()}
        named = {f"test/top1_{kind}": (said.argmax(-1) == targets).all(1) for kind, said in seen.items()}
        update(self.test_scores, named | {"test/top1_target": right})
        self.log_dict(self.test_scores, batch_size=len(images))

    def on_test_epoch_end(self) -> None:
        top1 = torch.stack([*self.draws.compute().values()])
        self.draws.reset()
        self.log_dict({"test/top1": top1.mean(), "test/top1_min": top1.min(), "test/top1_max": top1.max()})

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the probabilities."""
        return wide(self.forward(batch[0] if isinstance(batch, (list, tuple)) else batch)).softmax(-1)

    def decisions(self, rollout: Rollout) -> Float[Tensor, "m s k"]:
        """Return the logits of each target."""
        if self.model.targets == 1:
            return rollout.decision[:, None]
        return by_target(rollout.logits, self.model.targets)[:, :, -1]

    def report(self, rollout: Rollout, targets: Int[Tensor, "m s"], stage: str) -> Bool[Tensor, "m s"]:
        """Log the loss, and how many glimpses are taken, and return which targets are named right."""
        logits = self.decisions(rollout)
        loss = F.cross_entropy(wide(logits).flatten(0, 1), targets.flatten()) * targets.shape[1]
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))
        if rollout.halting is not None:
            glimpses = rollout.glimpses.float().mean()
            self.log(f"{stage}/glimpses", glimpses, sync_dist=True, batch_size=len(targets))
        return logits.argmax(-1) == targets

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def described(self) -> dict[str, Any]:
        """What ``visattn.save`` is told beside the network."""
        return {"labels": self.labels, "transform": self.preprocess, "task": "classification"}


def discounted(rewards: Float[Tensor, "m a"], discount: float = 1.0) -> Float[Tensor, "m a"]:
    """Return the reward of each action, and of those behind it, each counting less than the one before.

    Example:
        >>> discounted(torch.tensor([[1.0, 0.0, 4.0]]), 0.5)
        tensor([[2., 2., 4.]])
    """
    returns = list(rewards.unbind(1))
    for t in reversed(range(len(returns) - 1)):
        returns[t] = returns[t] + discount * returns[t + 1]
    return torch.stack(returns, 1)


def by_image(x: Tensor, rollouts: int) -> Tensor:
    """View rows as the roll-outs of each image."""
    return x.unflatten(0, (-1, rollouts))


def by_target(x: Tensor, targets: int) -> Tensor:
    """View glimpses as those for each target."""
    return x.unflatten(1, (targets, -1))


def columns(targets: Int[Tensor, "b *s"]) -> Int[Tensor, "b s"]:
    """View targets as columns, one where each image has one."""
    return targets[:, None] if targets.ndim == 1 else targets


def update(scores: MetricCollection, right: dict[str, Bool[Tensor, "*n"]]) -> None:
    """Count what is right, for those scores that there are."""
    for name in map(str, scores):
        scores[name].update(right[name].float())
