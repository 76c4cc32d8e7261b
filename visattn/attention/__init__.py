"""Attention modules: pure ``nn.Module`` classes, one paper a file. ``__all__`` is the index, family by family."""

from visattn.attention import channel, kernel, memory, pairs, pairwise, pooling, sampling, spatial
from visattn.attention.base import Attention
from visattn.attention.channel import *  # noqa: F403
from visattn.attention.kernel import *  # noqa: F403
from visattn.attention.memory import *  # noqa: F403
from visattn.attention.pairs import *  # noqa: F403
from visattn.attention.pairwise import *  # noqa: F403
from visattn.attention.pooling import *  # noqa: F403
from visattn.attention.sampling import *  # noqa: F403
from visattn.attention.spatial import *  # noqa: F403

__all__ = [
    "Attention",
    *channel.__all__,
    *spatial.__all__,
    *pairwise.__all__,
    *kernel.__all__,
    *pooling.__all__,
    *pairs.__all__,
    *sampling.__all__,
    *memory.__all__,
]
