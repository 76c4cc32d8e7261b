"""What every attention module is: it says where it looks, and what it takes from there."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import nn


class Built(nn.Module):
    """A module that remembers how it was built."""

    arguments: dict[str, Any]
    """The arguments this module was constructed with, by name: what a checkpoint needs to build it again."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Built":
        module = super().__new__(cls)
        try:
            bound = inspect.signature(cls).bind(*args, **kwargs).arguments
        except TypeError:  # copy and pickle make an empty shell; else __init__ is about to raise the clearer error
            bound = {}
        object.__setattr__(module, "arguments", dict(bound))
        return module


class Attention(Built):
    r"""A weighted sum whose weights depend on what is looked at.

    A subclass writes :meth:`attend` (where it looks: the weights, a tensor or a ``NamedTuple`` of tensors) and
    :meth:`read` (what it takes from there). Their shapes stand in their signatures. A subclass may overwrite
    :meth:`forward` where a fused form is faster or leaner; it stays equal to ``read(attend)``.

    Where :meth:`read` has a neutral value of the weights, at which it returns its input (1 for a product), the class
    says so in :attr:`neutral`; a gate can then be folded into the weights.
    """

    paper: ClassVar[str]
    """Where the module was published, such as ``"arXiv:1807.06521"``."""

    place: ClassVar[str | tuple[str, ...] | None] = None
    """Where its paper puts it, in the grammar of ``insert(at=…)``; None: used inside models only."""

    neutral: ClassVar[float | None] = None
    """The value of all weights at which ``read(x, weights=…)`` is ``x``; None where there is none."""

    replaces: ClassVar[Literal["convolution", "pool"] | None] = None
    """What it can take the place of. A convolution's substitute may also read the output of a module, as others do."""

    queried: ClassVar[bool] = False
    """Are the weights asked for by a query, or do they follow from what is weighed alone (bottom-up)?"""

    locations: ClassVar[bool] = False
    """Does it choose where on the map to sample, or weigh the items it is given?"""

    hard: ClassVar[bool] = False
    """Does it pick instead of mixing?"""

    @property
    def identity_at_init(self) -> bool:
        """Does a fresh module return its input?"""
        return False

    attend: Callable[..., Any]
    """``attend(*inputs)`` returns the weights: where the module looks."""

    read: Callable[..., Any]
    """``read(*inputs, weights=weights)`` returns what the module takes from where the weights point."""

    def forward(self, *inputs: Any) -> Any:
        return self.read(*inputs, weights=self.attend(*inputs))
