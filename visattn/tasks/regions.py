"""What is asked of where a network looks, by all tasks whose network asks the regions of an image."""

import inspect
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visattn import attention as zoo
from visattn.attention.memory.hard import HardWeights
from visattn.models import decoders
from visattn.tasks.base import Task, mean_over_ranks, plainly

DECAY = 0.9  # of the moving average, in a step
FREE = ("dropout", "expected", "evaluation", "maps", "width")
"""Options that weights fit with whatever they are: they hold in training or in evaluation alone, or choose what is
told; and widths, which the shapes of weights tell, whether they were left out or not."""


class RegionTask(Task):
    r"""A task whose network asks the regions of an image.

    Attention that picks regions is taught by what its picks lead to: by :math:`\log p(s)` of the picks, times how much
    better than expected that is.

    Among a subclass's arguments are ``layers``, ``penalty_factor``, ``policy_factor`` and ``entropy_factor``; where
    attention picks, it has a buffer ``average``.
    """

    asks: ClassVar[str]
    """What of the network asks the regions, as an argument of it."""

    average: Tensor
    """The moving average of how likely is what picks led to."""

    # --- learning -----------------------------------------------------------------------------------------------------

    def penalty_loss(self, maps: Any, there: Bool[Tensor, "b r t"]) -> Tensor:
        """Return what attention asks of its weights itself, where there are looks that count."""
        factor, loss = self.hparams["penalty_factor"], torch.zeros((), device=self.device)
        for module in getattr(self.model, self.asks).modules() if factor else ():
            if hasattr(module, "penalty"):
                loss = loss + module.penalty(probable(maps), there)
        return factor * loss

    def gain(self, likely: Float[Tensor, "b r"]) -> Float[Tensor, "b r"]:
        """Return how much likelier what is right was than it has been of late, which is noted."""
        with torch.no_grad():
            self.average.lerp_(mean_over_ranks(likely.mean()), 1 - DECAY)
        self.log("train/reward", likely.mean())
        return (likely - self.average).detach()

    def picking_loss(
        self, maps: HardWeights, there: Bool[Tensor, "b r t"], advantage: Float[Tensor, "b r"], count: Tensor | int
    ) -> Tensor:
        """Return what teaches picks.

        Args:
            maps: The picks of all looks.
            there: True at the looks that count.
            advantage: How much better than expected it was what the picks of a sentence led to.
            count: What sums are divided by.
        """
        picks = (advantage[..., None] * maps.log_probability(there)).sum() / count
        return self.entropy_loss(maps, there, count) - self.hparams["policy_factor"] * picks

    def entropy_loss(self, maps: HardWeights, there: Bool[Tensor, "b r t"], count: Tensor | int) -> Tensor:
        """Return what keeps picks from being always the same."""
        entropy = maps.entropy(there).sum() / count
        self.log("train/entropy", entropy.detach())
        return -self.hparams["entropy_factor"] * entropy

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        entry = checkpoint.get("visattn", {}).get("visattn", {}).get("model")
        if entry and (found := self.contradiction(entry["arguments"])):
            name, there, here = found
            raise ValueError(f"the checkpoint holds {name} {there!r}, the model has {here!r}")

    def contradiction(self, arguments: dict[str, Any]) -> tuple[str, Any, Any] | None:
        """Return the first option by which a network of such arguments computes otherwise: its name, there, and here.

        Options whose weights would not fit are among them.
        """
        names = (self.asks, "placed", *(["heads"] if self.hparams["layers"] else []))
        both = arguments, self.model.arguments
        there, here = ({k: v for n in names for k, v in chosen(n, each, type(self.model)).items()} for each in both)
        different = (name for name in there | here if there.get(name) != here.get(name))
        return next(((name, there.get(name), here.get(name)) for name in different), None)


def chosen(name: str, arguments: dict[str, Any], of: type) -> dict[str, Any]:
    """Return by name what an option is, and if that makes something, the options of it, but those that are free.

    Args:
        name: The option's name; what stands before a dot is what it is an option of.
        arguments: Those that were given, as they were or as a checkpoint holds them.
        of: The class that has the option.
    """
    option = name.rpartition(".")[2]
    made = arguments.get(option, inspect.signature(of).parameters[option].default)
    if isinstance(made, dict) and made.keys() == {"makes", "arguments"}:
        kind, given = made["makes"], made["arguments"]
        cls: Any = getattr(zoo, kind, None) or getattr(decoders, kind, None)
    elif isinstance(made, (type, partial)):
        cls, given = (plain := plainly(made, option)).func, plain.keywords
        kind = cls.__name__
    else:
        return {name: list(made) if isinstance(made, tuple) else made}
    found = {name: kind}
    for each in inspect.signature(cls).parameters.values() if cls else ():
        if each.kind is each.KEYWORD_ONLY and each.name not in FREE:
            found |= chosen(f"{name}.{each.name}", given, cls)
    return found


def not_negative(**factors: float) -> None:
    """Raise a ``ValueError`` that names what is negative."""
    for name, factor in factors.items():
        if factor < 0:
            raise ValueError(f"{name} must not be negative, got {factor}")


def probable(maps: Any) -> Any:
    """Return how likely each region is read from: the weights, or what picks are drawn from."""
    return maps.probabilities if isinstance(maps, HardWeights) else maps


def averaged(maps: Any) -> Float[Tensor, "b r t l"]:
    """Return how likely each region is read from, in the mean of heads, and of layers."""
    weights = probable(maps)
    return weights.flatten(3, -2).mean(3) if weights.ndim > 4 else weights
