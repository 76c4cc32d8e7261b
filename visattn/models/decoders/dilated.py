"""Van den Oord et al.: WaveNet: A Generative Model for Raw Audio (2016), on words and regions."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from visattn.attention.memory.core import MemoryAttention, Prepared, fits
from visattn.attention.memory.multiplicative import MultiplicativeAttention
from visattn.models.decoders.core import Embedding, First
from visattn.models.decoders.parallel import LayeredDecoder, Maps, recent
from visattn.models.decoders.recurrent import summary
from visattn.models.network import at_least_one

Unit = Literal["gate", "bottleneck"]


class Told(NamedTuple):
    """A memory made ready, for each layer."""

    regions: list[Prepared | None]
    means: list[Float[Tensor, "b 1 1 g"] | None]
    """What the mean region adds to a convolution."""
    images: Float[Tensor, "b 0"]
    """How many there are, and of which type."""


State = list[Float[Tensor, "b r _ c"]]


class DilatedDecoder(LayeredDecoder):
    r"""Convolve words that are ever further apart, and let the image gate what comes of it.

    .. math:: f_t = \sum_{j=1}^k W_f^j x_{t-(k-j)\delta} + C_f \bar v + L_f z_t, \quad
        u = \tanh f \odot \sigma(g), \quad x \leftarrow x + W_r u, \quad s \leftarrow s + W_s u, \\
        p(y_t) = \operatorname{softmax}(W_o \operatorname{ReLU}(W_1 \operatorname{ReLU} s_t))

    and :math:`g` as :math:`f`, with weights of its own, in each layer of dilation :math:`\delta`. As in Deep Voice
    (arXiv:1702.07825), a layer is conditioned on what holds for all steps, the mean region :math:`\bar v`, or for this
    one, :math:`z_t`: what its input :math:`x_t` reads from the regions. A word is seen by :attr:`field` steps.

    With the ``"bottleneck"`` of ByteNet (arXiv:1610.10099) a layer is

    .. math:: x \leftarrow x + W_3 \operatorname{ReLU} \operatorname{LN} \bigl(f(\operatorname{ReLU} \operatorname{LN}
        W_2 \operatorname{ReLU} \operatorname{LN} x)\bigr), \quad s = \operatorname{LN} x

    whose convolution is half as wide as :math:`x`.

    Differs from the papers: WaveNet's audio is conditioned on signals that are given for each step; ByteNet's words on
    one source word each.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory; None: the decoder does not.
        width: Features of a word, and of a layer.
        kernel_size: Words :math:`k` that a convolution sees.
        dilations: How many words they are apart in each layer.
        unit: ``"gate"`` as in WaveNet, or ``"bottleneck"`` as in ByteNet.
        mean: Whether each layer is told the mean region.
        maps: Whether the ``"last"`` layer says where it looked, or ``"all"`` do, in an axis behind the steps.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number of the input of a layer, and of what words are said from.

    Raises:
        ValueError: If an option is out of its range, nothing tells of the image, or the attention depends on earlier
            looks.

    Example:
        >>> decoder = DilatedDecoder(100, 32, width=64)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape, decoder.field
        (torch.Size([2, 5, 12, 100]), 63)
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] | None = MultiplicativeAttention,
        width: int = 512,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 2, 4, 8, 16),
        unit: Unit = "gate",
        mean: bool = False,
        maps: Maps = "last",
        first: First = "begin",
        dropout: float = 0.1,
    ):
        super().__init__(vocabulary, memory, depth=len(dilations), placed=False, maps=maps)
        at_least_one(width=width, kernel_size=kernel_size)
        if min(dilations, default=0) < 1:
            raise ValueError(f"dilations must be some of at least 1 each, got {tuple(dilations)}")
        if unit not in get_args(Unit):
            raise ValueError(f"unit must be {' or '.join(get_args(Unit))}, got {unit!r}")
        if unit == "bottleneck" and width % 2:
            raise ValueError(f"width must be even for a bottleneck of half of it, got {width}")
        if attention is None and not mean:
            raise ValueError("attention or mean must tell of the image, got attention=None and mean=False")
        self.kernel_size, self.dilations = kernel_size, tuple(dilations)
        self.words = Embedding(vocabulary, width, first=first)
        self.layers = nn.ModuleList()
        for n in range(len(dilations)):
            looks = None if attention is None else self.carried(attention(width, memory), width)
            last = n + 1 == len(dilations)
            layer = Gate(width, kernel_size, last=last) if unit == "gate" else Bottleneck(width, kernel_size)
            layer.condition(looks, memory if mean else 0)
            self.layers.append(layer)
        self.dropout = nn.Dropout(dropout)
        norm = nn.LayerNorm(width) if unit == "bottleneck" else nn.Identity()
        self.join = nn.Sequential(norm, nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.out = nn.Linear(width, vocabulary)

    @property
    def field(self) -> int:
        """How many words back the next one depends on."""
        return 1 + (self.kernel_size - 1) * sum(self.dilations)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Told:
        fits(memory, self.holds, size)
        mean = summary(memory, mask)[:, None, None]
        regions = [
            None if each.attention is None else each.attention.prepare(memory, mask, size) for each in self._each()
        ]
        return Told(
            regions, [None if each.mean is None else each.mean(mean) for each in self._each()], memory[:, 0, :0]
        )

    def begin(self, prepared: Told, count: int) -> State:
        images = prepared.images
        lengths = [(self.kernel_size - 1) * dilation for dilation in self.dilations]
        sizes = zip(lengths, [each.inner for each in self._each()], strict=True)
        return [images.new_zeros(images.shape[0], count, *size) for size in sizes]

    def turn(
        self,
        vectors: Float[Tensor, "b r t e"],
        prepared: Told,
        state: State,
        choice: Int[Tensor, "b r t *looks"] | None = None,
    ) -> tuple[Float[Tensor, "b r t e"], Any, State]:
        x, total = vectors, torch.zeros_like(vectors)
        maps, after = [], []
        everything = zip(self._each(), *prepared[:2], state, self.dilations, strict=True)
        for n, (layer, regions, mean, past, dilation) in enumerate(everything):
            windows, inputs = recent(layer.enter(self.dropout(x)), past, self.kernel_size, dilation)
            found = layer.filters(windows)
            if mean is not None:
                found = found + mean
            where = None
            if regions is not None:
                read, where = self.look(n, layer.attention, x, regions, choice)
                found = found + layer.read(read)
            x, total = layer.leave(x, total, found)
            after.append(inputs)
            maps.append(where)
        return self.dropout(self.join(total)), self.seen(maps), after

    def write(self, features: Float[Tensor, "*b e"]) -> Float[Tensor, "*b v"]:
        return self.out(features)

    def _each(self) -> list[Any]:
        return list(self.layers)


class Layer(nn.Module):
    """A dilated convolution, and what it is conditioned on.

    Args:
        inner: Features that it convolves.
        outer: Features that come of it.
        kernel_size: Words that it sees.
    """

    attention: MemoryAttention | None
    read: nn.Linear | None
    mean: nn.Linear | None

    def __init__(self, inner: int, outer: int, kernel_size: int):
        super().__init__()
        self.inner, self.outer = inner, outer
        self.filters = nn.Linear(kernel_size * inner, outer)

    def condition(self, attention: MemoryAttention | None, mean: int) -> None:
        """Add what is read by attention, and a mean region of so many features, if any."""
        self.attention = attention
        self.read = None if attention is None else nn.Linear(attention.features, self.outer, bias=False)
        self.mean = nn.Linear(mean, self.outer, bias=False) if mean else None

    def enter(self, x: Float[Tensor, "b r t e"]) -> Float[Tensor, "b r t c"]:
        """Return what is convolved."""
        return x

    def leave(
        self, x: Float[Tensor, "b r t e"], total: Float[Tensor, "b r t e"], found: Float[Tensor, "b r t g"]
    ) -> tuple[Float[Tensor, "b r t e"], Float[Tensor, "b r t e"]]:
        """Return the input of the next layer, and what words are said from, by what the convolution found."""
        raise NotImplementedError


class Gate(Layer):
    """The unit of WaveNet: one half of what is found, gated by the other.

    Args:
        width: Features of the layer.
        kernel_size: Words that the convolution sees.
        last: Whether no layer follows.
    """

    def __init__(self, width: int, kernel_size: int, *, last: bool):
        super().__init__(width, 2 * width, kernel_size)
        self.residual = None if last else nn.Linear(width, width)
        self.skip = nn.Linear(width, width)

    def leave(
        self, x: Float[Tensor, "b r t e"], total: Float[Tensor, "b r t e"], found: Float[Tensor, "b r t g"]
    ) -> tuple[Float[Tensor, "b r t e"], Float[Tensor, "b r t e"]]:
        filtered, gate = found.chunk(2, 3)
        unit = filtered.tanh() * gate.sigmoid()
        return x if self.residual is None else x + self.residual(unit), total + self.skip(unit)


class Bottleneck(Layer):
    """The unit of ByteNet: a convolution of half the features, between layers from and to all of them.

    Args:
        width: Features of the layer.
        kernel_size: Words that the convolution sees.
    """

    def __init__(self, width: int, kernel_size: int):
        half = width // 2
        super().__init__(half, half, kernel_size)
        self.narrow = nn.Sequential(
            nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, half), nn.LayerNorm(half), nn.ReLU()
        )
        self.widen = nn.Sequential(nn.LayerNorm(half), nn.ReLU(), nn.Linear(half, width))

    def enter(self, x: Float[Tensor, "b r t e"]) -> Float[Tensor, "b r t c"]:
        return self.narrow(x)

    def leave(
        self, x: Float[Tensor, "b r t e"], total: Float[Tensor, "b r t e"], found: Float[Tensor, "b r t g"]
    ) -> tuple[Float[Tensor, "b r t e"], Float[Tensor, "b r t e"]]:
        x = x + self.widen(found)
        return x, x
