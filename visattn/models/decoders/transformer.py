"""Vaswani et al.: Attention Is All You Need (NeurIPS 2017), its decoder, on regions."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from visattn.attention.memory.core import MemoryAttention, Prepared
from visattn.attention.memory.multi_head import MultiHeadAttention
from visattn.models.decoders.core import Embedding, First
from visattn.models.decoders.parallel import LayeredDecoder, Maps, row
from visattn.models.network import at_least_one

Norm = Literal["pre", "post"]
Cache = tuple[Float[Tensor, "b r _ e"], Float[Tensor, "b r _ e"]]


class TransformerDecoder(LayeredDecoder):
    r"""Let each word look at the words before it, and then at the regions, in every layer.

    .. math:: x_t = E y_{t-1} + p_t / \sqrt d, \quad
        x \leftarrow x + A_n(\operatorname{LN} x), \quad x \leftarrow x + C_n(\operatorname{LN} x;\, v), \quad
        x \leftarrow x + W_2 \operatorname{ReLU}(W_1 \operatorname{LN} x), \\
        p(y_t) = \operatorname{softmax}(E \operatorname{LN} x_t + b)

    with self-attention :math:`A_n` to the words so far, attention :math:`C_n` to the regions :math:`v`, and sines and
    cosines :math:`p_t`. What was made of earlier words is kept from step to step.

    Differs from the paper: the norm before each part is arXiv:2002.04745's; the paper's, ``"post"``, is
    :math:`x \leftarrow \operatorname{LN}(x + A_n(x))`, without one at the end. The paper has
    :math:`\sqrt d\, E y_{t-1} + p_t`; where the same vectors say the words, each then expects itself at first, and
    the loss starts far above that of a guess. Regions know rows and columns.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        attention: What looks at the regions, called with the features of query and memory. What it reads goes through
            one more layer if it has not ``width`` features.
        width: Features :math:`d` of a word.
        heads: How many heads the self-attention has.
        depth: How many layers there are.
        expansion: How many times as wide as a word the layer between :math:`W_1` and :math:`W_2` is.
        norm: Whether a layer norm stands before each part, ``"pre"``, or behind the sum, ``"post"``.
        placed: Whether regions are told where they are.
        tied: Whether words are said by the same vectors that they are read by.
        scaled: Whether what enters the first layer is multiplied by :math:`\sqrt d`, as in the paper.
        maps: Whether the ``"last"`` layer says where it looked, or ``"all"`` do, in an axis behind the steps.
        first: What stands before the first word: a learned vector, ``"begin"``, or ``"zeros"``.
        dropout: Probability to drop a number of what enters the first layer, and of what each part adds.

    Raises:
        ValueError: If an option is out of its range, or the attention depends on earlier looks.

    Example:
        >>> decoder = TransformerDecoder(100, 32, width=64, depth=2)
        >>> said = decoder(decoder.prepare(torch.randn(2, 49, 32), size=(7, 7)), torch.randint(100, (2, 5, 11)))
        >>> decoder.write(said.features).shape, said.maps.shape  # of eight heads
        (torch.Size([2, 5, 12, 100]), torch.Size([2, 5, 12, 8, 49]))
    """

    def __init__(
        self,
        vocabulary: int,
        memory: int,
        *,
        attention: Callable[[int, int], MemoryAttention] = MultiHeadAttention,
        width: int = 512,
        heads: int = 8,
        depth: int = 6,
        expansion: int = 4,
        norm: Norm = "pre",
        placed: bool = True,
        tied: bool = True,
        scaled: bool = False,
        maps: Maps = "last",
        first: First = "begin",
        dropout: float = 0.1,
    ):
        super().__init__(vocabulary, memory, depth=depth, placed=placed, maps=maps)
        at_least_one(width=width, depth=depth, expansion=expansion)
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be {' or '.join(get_args(Norm))}, got {norm!r}")
        if width % 2:
            raise ValueError(f"width must be even, got {width}")
        self.words = Embedding(vocabulary, width, first=first)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            looks = self.carried(attention(width, memory), width)
            self.layers.append(Layer(width, looks, heads=heads, expansion=expansion, norm=norm, dropout=dropout))
        self.norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.scale = width**0.5 if scaled else 1.0
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, vocabulary)
        if tied:
            self.out.weight = self.words.weight

    def prepare(
        self,
        memory: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Prepared]:
        if self.placed:
            memory = self.placing(memory, size)
        return [layer.attention.prepare(memory, mask, size) for layer in self._each()]

    def begin(self, prepared: list[Prepared], count: int) -> list[Cache]:
        values = prepared[0].values
        nothing = values.new_empty(values.shape[0], count, 0, self.words.weight.shape[1])
        return [(nothing, nothing)] * len(prepared)

    def turn(
        self,
        vectors: Float[Tensor, "b r t e"],
        prepared: list[Prepared],
        state: list[Cache],
        choice: Int[Tensor, "b r t *looks"] | None = None,
    ) -> tuple[Float[Tensor, "b r t e"], Any, list[Cache]]:
        width = vectors.shape[3]
        places = row(vectors, state[0][0].shape[2], vectors.shape[2])
        x = self.dropout((vectors + places * width**-0.5) * self.scale)
        after, maps = [], []
        for n, (layer, regions, past) in enumerate(zip(self._each(), prepared, state, strict=True)):
            x, cache = layer.remember(x, past)
            read, where = self.look(n, layer.attention, layer.before(1, x), regions, choice)
            x = layer.think(layer.behind(1, x, layer.join(read)))
            after.append(cache)
            maps.append(where)
        return self.norm(x), self.seen(maps), after

    def write(self, features: Float[Tensor, "*b e"]) -> Float[Tensor, "*b v"]:
        return self.out(features)

    def _each(self) -> list[Any]:
        return list(self.layers)


class Layer(nn.Module):
    """Self-attention, attention to regions and a perceptron, each of which adds something.

    Args:
        width: Features of a word.
        attention: What looks at the regions.
        heads: How many heads the self-attention has.
        expansion: How many times as wide the layer within the perceptron is.
        norm: Whether a layer norm stands before each part, ``"pre"``, or behind the sum, ``"post"``.
        dropout: Probability to drop a number of what a part adds.
    """

    def __init__(
        self, width: int, attention: MemoryAttention, *, heads: int, expansion: int, norm: Norm, dropout: float
    ):
        super().__init__()
        self.pre = norm == "pre"
        self.own = MultiHeadAttention(width, width, heads=heads, causal=True)
        self.attention = attention
        reads = attention.features
        self.join = nn.Identity() if reads == width else nn.Linear(reads, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, expansion * width), nn.ReLU(), nn.Linear(expansion * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def before(self, part: int, x: Float[Tensor, "b r t e"]) -> Float[Tensor, "b r t e"]:
        """Return what a part is given."""
        return self.norms[part](x) if self.pre else x

    def behind(self, part: int, x: Float[Tensor, "b r t e"], y: Float[Tensor, "b r t e"]) -> Float[Tensor, "b r t e"]:
        """Return the sum of what there was, and what a part made of it."""
        x = x + self.dropout(y)
        return x if self.pre else self.norms[part](x)

    def remember(self, x: Float[Tensor, "b r t e"], past: Cache) -> tuple[Float[Tensor, "b r t e"], Cache]:
        """Let words look at those before and themselves; each sentence is a memory of its own."""
        rows = self.before(0, x).flatten(0, 1)
        keys, values = (each.flatten(0, 1) for each in past)
        words = self.own.extend(Prepared(keys, values), rows)
        read, _ = self.own(rows, words)
        cache = words.keys.unflatten(0, x.shape[:2]), words.values.unflatten(0, x.shape[:2])
        return self.behind(0, x, read.view(x.shape)), cache

    def think(self, x: Float[Tensor, "b r t e"]) -> Float[Tensor, "b r t e"]:
        """Let each word go through the perceptron."""
        return self.behind(2, x, self.perceptron(self.before(2, x)))
