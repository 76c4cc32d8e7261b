"""Gehring et al.: Convolutional Sequence to Sequence Learning (ICML 2017), its decoder, on regions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention.core import wide
from visattn.attention.memory.core import MemoryAttention, Prepared
from visattn.attention.memory.multiplicative import MultiplicativeAttention
from visattn.attention.pairwise.positions import sinusoid
from visattn.models.decoders.core import Embedding, First
from visattn.models.decoders.parallel import LayeredDecoder, Maps, recent
from visattn.models.decoders.recurrent import summary
from visattn.models.network import at_least_one

HALF = 0.5**0.5


class Told(NamedTuple):
    """A memory made ready."""

    regions: list[Prepared]
    """For each layer."""
    scale: Float[Tensor, "#b 1 1 1"]
    """What is read is multiplied by it."""
    mean: Float[Tensor, "b d"] | None
    """The mean of the regions."""


class State(NamedTuple):
    """What is kept from word to word."""

    steps: Int[Tensor, "b r"]
    """How many words there were."""
    inputs: list[Float[Tensor, "b r p c"]]
    """The last inputs of each layer."""


class ConvolutionalDecoder(LayeredDecoder):
    r"""Convolve the words so far, and look at the regions after each convolution.

    .. math:: x = W_1 [E y; \bar v], \quad
        u_t = \operatorname{GLU}\Bigl(b + \sum_{j=1}^k W^j x_{t-k+j}\Bigr), \quad
        q_t = \sqrt{\tfrac12} (E y_{t-1} + W_q u_t), \quad z_t = \sqrt l \sum_i a_{ti} v_i, \\
        x_t \leftarrow \sqrt{\tfrac12} \bigl(x_t + \sqrt{\tfrac12} (u_t + W_z z_t)\bigr), \quad
        p(y_t) = \operatorname{softmax}(W_o W_2 x_t)

    where :math:`a_t` is asked for by :math:`q_t` in each layer, and sees what earlier layers read. Directions and
    lengths of the weights :math:`W` but those of the words are learned apart (arXiv:1602.07868).

    By default as in Convolutional Image Captioning (arXiv:1711.09151), which tells each word the mean region
    :math:`\bar v`. With ``placed`` and without ``mean`` as in the paper: words are told their places, and what is read
    is :math:`\sqrt{1/2} (v_i + p_i)`, while queries are compared with :math:`v_i` alone.

    Differs from both: queries are compared with :math:`W v_i`, since no encoder makes regions as wide as words. From
    the paper: places are sines and cosines, of rows and columns for regions, where it learns them.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory.
        width: Features of a layer.
        embedding: Features of a word.
        depth: How many layers there are.
        kernel_size: Words :math:`k` that a convolution sees.
        mean: Whether each word is told the mean region.
        scaled: Whether what is read is multiplied by the root of the number of regions :math:`l`.
        placed: Whether words, and what is read of regions, are told their places.
        maps: Whether the ``"last"`` layer says where it looked, or ``"all"`` do, in an axis behind the steps.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number of a word, of the input of a layer, and of what words are said from.

    Raises:
        ValueError: If an option is out of its range, or the attention depends on earlier looks.

    Example:
        >>> decoder = ConvolutionalDecoder(100, 32, width=64)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape
        torch.Size([2, 5, 12, 100])
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = MultiplicativeAttention,
        width: int = 512,
        embedding: int = 512,
        depth: int = 3,
        kernel_size: int = 5,
        mean: bool = True,
        scaled: bool = True,
        placed: bool = False,
        maps: Maps = "last",
        first: First = "begin",
        dropout: float = 0.1,
    ):
        super().__init__(vocabulary, memory, depth=depth, placed=placed, maps=maps)
        at_least_one(width=width, embedding=embedding, depth=depth, kernel_size=kernel_size)
        if placed and embedding % 2:
            raise ValueError(f"embedding must be even for words to be told their places, got {embedding}")
        self.kernel_size, self.mean, self.scaled = kernel_size, mean, scaled
        self.words = Embedding(vocabulary, embedding, first=first)
        self.attentions = nn.ModuleList(self.carried(attention(embedding, memory), embedding) for _ in range(depth))
        self.enter = NormedLinear(embedding + memory * mean, width, gain=1 - dropout)
        self.filters = nn.ModuleList(
            NormedLinear(kernel_size * width, 2 * width, gain=4 * (1 - dropout)) for _ in range(depth)
        )
        self.asks = nn.ModuleList(NormedLinear(width, embedding) for _ in range(depth))
        self.reads = nn.ModuleList(NormedLinear(each.features, width) for each in self._looks())
        self.leave = NormedLinear(width, embedding)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(embedding, vocabulary)

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Told:
        regions = [each.prepare(memory, mask, size) for each in self._looks()]
        if self.placed:
            placed = HALF * self.placing(memory, size)
            regions = [
                each._replace(values=attention.prepare(placed, mask, size).values)
                for attention, each in zip(self._looks(), regions, strict=True)
            ]
        count = memory.new_full((1,), memory.shape[1]) if mask is None else mask.sum(1).to(memory.dtype)
        scale = count**0.5 if self.scaled else torch.ones_like(count)
        return Told(regions, scale[:, None, None, None], summary(memory, mask) if self.mean else None)

    def begin(self, prepared: Told, count: int) -> State:
        values = prepared.regions[0].values
        past = values.new_zeros(values.shape[0], count, self.kernel_size - 1, self.enter.bias.shape[0])
        words = torch.zeros(past.shape[:2], dtype=torch.long, device=past.device)
        return State(words, [past] * len(prepared.regions))

    def turn(
        self,
        vectors: Float[Tensor, "b r t e"],
        prepared: Told,
        state: State,
        choice: Int[Tensor, "b r t *looks"] | None = None,
    ) -> tuple[Float[Tensor, "b r t e"], Any, State]:
        shape = vectors.shape[:3]
        if self.placed:
            places = state.steps[:, :, None] + torch.arange(shape[2], device=vectors.device)
            vectors = vectors + sinusoid(places.flatten().to(wide(vectors).dtype), vectors.shape[3]).view_as(vectors)
        vectors = self.dropout(vectors)
        x = vectors
        if prepared.mean is not None:
            x = torch.cat((x, prepared.mean[:, None, None].expand(*shape, -1)), 3)
        x = self.enter(x)
        inputs, maps = [], []
        for n, (attention, regions, past) in enumerate(zip(self._looks(), prepared.regions, state.inputs, strict=True)):
            windows, after = recent(self.dropout(x), past, self.kernel_size)
            found = F.glu(self.filters[n](windows), 3)
            asked = HALF * (vectors + self.asks[n](found))
            read, where = self.look(n, attention, asked, regions, choice)
            x = HALF * (x + HALF * (found + self.reads[n](read * prepared.scale)))
            inputs.append(after)
            maps.append(where)
        return self.dropout(self.leave(x)), self.seen(maps), State(state.steps + shape[2], inputs)

    def write(self, features: Float[Tensor, "*b e"]) -> Float[Tensor, "*b v"]:
        return self.out(features)

    def _looks(self) -> list[Any]:
        return list(self.attentions)


class NormedLinear(nn.Module):
    r"""A linear layer that learns directions and lengths of its weights apart.

    .. math:: y = \frac{g}{\lVert w \rVert}\, w x + b

    Args:
        inputs: Features of what it is given.
        outputs: Features of what it returns.
        gain: Expected square of what it returns, where inputs have squares of 1.
    """

    def __init__(self, inputs: int, outputs: int, *, gain: float = 1.0):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(outputs, inputs) * (gain / inputs) ** 0.5)
        self.length = nn.Parameter(self.direction.detach().norm(dim=1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(x, self.direction) * (self.length / self.direction.norm(dim=1)) + self.bias
