"""Other weights in place of those that a module has found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from visattn.attention.base import Attention
from visattn.attention.memory.core import MemoryAttention


@contextmanager
def replaced(attention: Attention, change: Callable[[Any], Any]) -> Iterator[None]:
    """Let attention read with other weights than its own.

    It holds for any module, since what a module takes from a map follows from its weights alone: ``forward`` becomes
    ``read`` with what ``change`` makes of ``attend``. :func:`visattn.record` then records the changed weights. What
    attention on a memory remembers of its looks stays its own.

    Args:
        attention: The module.
        change: Called with what the module attends to; returns what it reads with instead, of the same form.

    Example:
        >>> from visattn import SpatialGate
        >>> gate, x = SpatialGate(8), torch.randn(1, 8, 4, 4)
        >>> with replaced(gate, torch.zeros_like):
        ...     gate(x).any().item()
        False
    """
    own: Callable[..., Any] = attention.attend
    remembers = isinstance(attention, MemoryAttention)

    def attend(*inputs: Any, **options: Any) -> Any:
        looked = own(*inputs, **options)
        return (change(looked[0]), looked[1]) if remembers else change(looked)

    before = dict(vars(attention))
    base: Any = MemoryAttention if remembers else Attention
    vars(attention).update(attend=attend, forward=partial(base.forward, attention))
    try:
        yield
    finally:
        for name in ("attend", "forward"):
            del vars(attention)[name]
            vars(attention).update({name: before[name]} if name in before else {})
