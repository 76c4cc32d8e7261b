"""Learn to glance and to focus: what is seen first, where to look then, and both together, trained by Lightning."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from visattn.attention.core import softmax, wide
from visattn.checkpoint import load
from visattn.data.canvas import Canvas
from visattn.data.images import Images
from visattn.models.glance_focus import GlanceFocus
from visattn.models.looker import Rollout
from visattn.tasks.base import found_class
from visattn.tasks.looking import Looking, discounted
from visattn.tasks.run import RunError

MakeGlanceFocus = Callable[[Any], GlanceFocus]
Stage = Literal["random", "policy", "finetune"]


class Focusing(Looking):
    r"""Train a network to glance at an image and then at parts of it, in three stages (arXiv:2010.05300).

    Each is a training of its own, which starts from the one before:

    - ``"random"``: backbones and classifier, on crops from anywhere, by the mean cross entropy :math:`L` of what is
      said after each glimpse, and of what is said of each glimpse alone, :math:`L + \lambda L'`;
    - ``"policy"``: only where to look, by proximal policy optimisation (arXiv:1707.06347), with the reward
      :math:`r_t` of an action the rise of the true class's probability by the glimpse that it chose:

      .. math:: -\min\bigl(\rho_t A_t, \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t\bigr)
          + c_V (V_t - R_t)^2 - c_H H_t, \quad \rho_t = \frac{\pi(a_t)}{\pi_{old}(a_t)}, \quad
          R_t = \sum_{s \ge t} \gamma^{s - t} r_s, \quad A_t = R_t - V_t

      all else stays as it is, in evaluation mode;
    - ``"finetune"``: backbones and classifier as at first, on crops that the policy, which stays as it is, draws.

    A validation looks by the mean of the policy; in the first stage, where there is none yet, anywhere. Otherwise it,
    and a test, are those of :class:`~visattn.tasks.Looking`; both log how many glimpses are taken, and how many
    multiplications, where the network stops when it is sure.

    Args:
        network: :class:`~visattn.models.GlanceFocus` with its options. Classes and channels come from the data, unless
            they are among the options.
        stage: What is trained, as above.
        start: Folder or checkpoint of the stage before; needed by a training of any but the first.
        pretrained: Whether the backbones start with their trained weights, where nothing else is to ``start`` from.
        rollouts: How often each image is looked at in a step.
        auxiliary_factor: Weight :math:`\lambda`; the paper's code has 1, for mobile networks 5.
        discount: How much less a reward counts for the action before, :math:`\gamma`.
        clip: How far a probability may change before it no longer pays, :math:`\epsilon`.
        epochs: How many steps are made on the same roll-out.
        value_factor: Weight :math:`c_V` of what guesses the return.
        entropy_factor: Weight :math:`c_H` of the policy's entropy, which is to be great.
        optimizer: An optimizer with its options; left out, AdamW.
        schedule: A schedule of torch with its options, stepped after every epoch; left out, the rate rises linearly
            and falls to zero along a cosine, step by step.
        warmup: Share of all steps in which the learning rate rises, without ``schedule``.

    Raises:
        ValueError: If an option is out of its range, or does not fit the others or the network.
    """

    data = (Images, Canvas)  # type: ignore[assignment]

    def __init__(
        self,
        network: MakeGlanceFocus,
        *,
        stage: Stage = "random",
        start: str | None = None,
        pretrained: bool = False,
        rollouts: int = 1,
        auxiliary_factor: float = 1.0,
        discount: float = 0.7,
        clip: float = 0.2,
        epochs: int = 1,
        value_factor: float = 0.5,
        entropy_factor: float = 0.01,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        warmup: float = 0.05,
    ):
        super().__init__(
            network,
            pretrained=pretrained,
            rollouts=rollouts,
            entropy_factor=entropy_factor,
            optimizer=optimizer,
            schedule=schedule,
            warmup=warmup,
        )
        if not issubclass(found_class(network), GlanceFocus):
            raise ValueError(f"network must be GlanceFocus, got {network!r}")
        if stage not in get_args(Stage):
            raise ValueError(f"stage must be one of {', '.join(get_args(Stage))}, got {stage!r}")
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {discount}")
        if not 0 < clip < 1:
            raise ValueError(f"clip must lie between 0 and 1, got {clip}")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        for name, factor in (("auxiliary_factor", auxiliary_factor), ("value_factor", value_factor)):
            if factor < 0:
                raise ValueError(f"{name} must not be negative, got {factor}")
        self.hparams.clear()  # of what is no option here
        self.save_hyperparameters(ignore=["_instantiator"])
        self.remember(network=network)
        self.validates = "random" if stage == "random" else "mean"
        self.explored: tuple[Tensor, ...] | None = None

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        stage, start = self.hparams["stage"], self.hparams["start"]
        fits = self._trainer is not None and self._trainer.state.fn == "fit"
        if fits and stage != "random" and start is None:
            raise ValueError(f"start must be the folder or checkpoint of the stage before for stage {stage}, got None")
        self.pretrained = self.pretrained and start is None
        super().configure_model()
        if fits and start is not None:
            labels = getattr(load(start, into=self.model), "labels", None)
            if None not in (labels, self.labels) and labels != self.labels:
                raise ValueError(f"start must have the labels of the data, {self.labels}, got {labels}")
        self.model.requires_grad_(False)
        for module in self._trained():
            module.requires_grad_(True)
        self.train(self.training)

    def _trained(self) -> tuple[nn.Module, ...]:
        model = self.model
        if self.hparams["stage"] == "policy":
            return (model.locator,)
        return model.backbones, model.classifier, model.auxiliary

    def train(self, mode: bool = True) -> "Focusing":
        super().train(mode)
        if mode and hasattr(self, "model"):
            self.model.eval()
            for module in self._trained():
                module.train()
        return self

    # --- learning -----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        epochs, batches = self.hparams["epochs"], self.trainer.accumulate_grad_batches
        if epochs > 1 and batches > 1:
            raise ValueError(f"accumulate_grad_batches must be 1 where a roll-out has {epochs} epochs, got {batches}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.explored = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for _ in range(self.hparams["epochs"] if self.hparams["stage"] == "policy" else 1):
            super().optimizer_step(*args, **kwargs)

    def training_loss(self, batch: Sequence[Tensor]) -> Tensor:
        h, (images, targets) = self.hparams, batch[:2]
        targets = targets.repeat_interleave(h["rollouts"])
        if h["stage"] == "policy":
            return self.policy_loss(images, targets)
        looks = self.model.look(images, rollouts=h["rollouts"], policy="random" if h["stage"] == "random" else "sample")
        after, alone = (cross_entropy(logits, targets) for logits in (looks.logits, self.model.guess(looks.features)))
        self.log_dict({"train/cross_entropy": after.detach(), "train/auxiliary": alone.detach()})
        return after + h["auxiliary_factor"] * alone

    def policy_loss(self, images: Float[Tensor, "b c h w"], targets: Int[Tensor, "m"]) -> Tensor:
        """Return the loss of what the policy did on images; they are looked at once, however often it is asked."""
        h = self.hparams
        if self.explored is None:
            self.explored = self.explore(images, targets)
        maps, actions, before, returns = self.explored
        log_probs, entropies, values = self.model.judge(maps, actions)
        advantages = returns - values.detach()
        ratios = (log_probs - before).exp()
        gains = torch.minimum(ratios * advantages, ratios.clamp(1 - h["clip"], 1 + h["clip"]) * advantages)
        loss = -gains.mean() + h["value_factor"] * (values - returns).square().mean()
        return loss - h["entropy_factor"] * entropies.mean()

    @torch.no_grad()
    def explore(self, images: Float[Tensor, "b c h w"], targets: Int[Tensor, "m"]) -> tuple[Tensor, ...]:
        """Look at images, and return what the policy saw, its actions, how likely these were, and their returns."""
        looks = self.model.look(images, rollouts=self.hparams["rollouts"])
        log_probs, _, _ = self.model.judge(looks.maps, looks.actions)
        probabilities = softmax(looks.logits)
        truth = probabilities.gather(-1, targets[:, None, None].expand(-1, probabilities.shape[1], 1))[..., 0]
        if not truth.isfinite().all():
            raise RunError(f"reward is not finite at step {self.global_step} (epoch {self.current_epoch})")
        self.log("train/reward", (truth[:, -1] - truth[:, 0]).mean())
        return looks.maps, looks.actions, log_probs, discounted(truth.diff(dim=1), self.hparams["discount"])

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def report(self, rollout: Rollout, targets: Int[Tensor, "m s"], stage: str) -> Bool[Tensor, "m s"]:
        if rollout.halting is not None:
            costs = rollout.halting @ rollout.halting.new_tensor(self.model.macs)
            self.log(f"{stage}/macs", costs.mean(), sync_dist=True, batch_size=len(targets))
        return super().report(rollout, targets, stage)


def cross_entropy(logits: Float[Tensor, "m t k"], targets: Int[Tensor, "m"]) -> Float[Tensor, ""]:
    """Return the mean cross entropy after all glimpses."""
    return F.cross_entropy(wide(logits).flatten(0, 1), targets.repeat_interleave(logits.shape[1]))
