"""Attention modules for computer vision, put into any timm backbone."""

from typing import TYPE_CHECKING, Any

from visattn import attention
from visattn.attention import *  # noqa: F403
from visattn.record import record
from visattn.surgery import Site, insert, insertions, remove, restore, sites
from visattn.version import __version__ as __version__

if TYPE_CHECKING:
    from visattn.checkpoint import load, save

__all__ = [*attention.__all__, "Site", "insert", "insertions", "load", "record", "remove", "restore", "save", "sites"]


def __getattr__(name: str) -> Any:
    if name in ("load", "save"):  # lazy: they need timm, which takes seconds to import
        from visattn import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'visattn' has no attribute {name!r}")
