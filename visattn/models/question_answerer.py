"""Answer questions about an image: a recurrent network reads a question, and looks at the regions for what is asked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from visattn.attention.memory.core import MemoryAttention
from visattn.attention.memory.readers import AttentiveReader
from visattn.models.decoders.core import stacked
from visattn.models.decoders.recurrent import Layers
from visattn.models.network import at_least_one
from visattn.models.regions import RegionNetwork


class Answered(NamedTuple):
    """What is answered to questions."""

    logits: Float[Tensor, "b r n"]
    """Of each answer."""
    maps: Any
    """Where was looked: what the reader returned, with the axes ``b r t``; t is 1 for one that looks once."""
    lengths: Int[Tensor, "b r"]
    """How often was looked for each question; behind it maps mean nothing."""


class Question(nn.Module):
    """Read questions word by word.

    Args:
        vocabulary: How many words there are.
        embedding: Features of a word.
        width: Units of the recurrent layer.
    """

    def __init__(self, vocabulary: int, embedding: int, width: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.words = nn.Embedding(vocabulary, embedding)
        self.layers = Layers(embedding, width)

    def forward(self, words: Int[Tensor, "n t"]) -> Float[Tensor, "n t q"]:
        """Return what is known of each question after each of its words."""
        x = self.words(words)
        begin = x.new_zeros(1, len(words), self.layers.cells[0].width)
        return self.layers(x, (begin,) * self.layers.states)[0]


class QuestionAnswerer(RegionNetwork):
    r"""Answer questions about an image, and say where the answer was read.

    .. math:: p(\text{answer}) = \operatorname{softmax}\bigl(W [y; q_T] + b\bigr), \quad
        q_t = \operatorname{LSTM}(E w_t,\, q_{t-1})

    where :math:`y` is what the reader says of the regions (arXiv:1506.03340). A reader that remembers what it found is
    asked by the state :math:`q_t` after each word, and the last :math:`y` counts; another is asked once, by the last
    state. The regions are the positions of the backbone's last map; with a ``width`` they are first narrowed, and they
    may look at each other, by ``layers`` transformer blocks that know rows and columns.

    Differs from the paper: the question is read in one direction, and its last state goes to the answer beside
    :math:`y`.

    Args:
        vocabulary: How many words there are.
        num_classes: How many answers there are.
        backbone: Name of a timm model, or the model itself, which is then taken as it is; such a network is not saved.
        pretrained: Whether a backbone that is named starts with its trained weights.
        backbone_args: Arguments of ``timm.create_model``, for a backbone that is named.
        reader: What looks at the regions, called with the features of query and memory: any attention on a memory that
            a question alone asks, and that is not causal.
        embedding: Features of a word.
        hidden: Units of the network that reads questions.
        width: Features of a region; None: as many as the backbone has.
        placed: Whether regions are told their rows and columns, by sines and cosines that are added to them.
        layers: How many transformer blocks the regions go through.
        heads: How many heads their attention has.
        dropout: Probability to drop a number of a region, and of what the answer is told from.

    Raises:
        ValueError: If an option is out of its range, or the reader cannot be asked by questions.

    Example:
        >>> answerer = QuestionAnswerer(20, 11, backbone="resnet10t", hidden=64, embedding=32)
        >>> answerer(torch.randn(2, 3, 96, 96), torch.randint(20, (2, 4, 6))).shape  # four questions about each image
        torch.Size([2, 4, 11])
    """

    def __init__(
        self,
        vocabulary: int,
        num_classes: int,
        *,
        backbone: str | nn.Module = "resnet10t",
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        reader: Callable[[int, int], MemoryAttention] = AttentiveReader,
        embedding: int = 128,
        hidden: int = 256,
        width: int | None = None,
        placed: bool = False,
        layers: int = 0,
        heads: int = 8,
        dropout: float = 0.0,
    ):
        super().__init__(
            backbone,
            pretrained=pretrained,
            backbone_args=backbone_args,
            width=width,
            placed=placed,
            layers=layers,
            heads=heads,
            dropout=dropout,
        )
        at_least_one(vocabulary=vocabulary, num_classes=num_classes, embedding=embedding, hidden=hidden)
        self.num_classes = num_classes
        self.question = Question(vocabulary, embedding, hidden)
        self.reader = reader(hidden, self.width)
        name = type(self.reader).__name__
        if self.reader.asks != hidden:
            raise ValueError(f"reader must be asked with {hidden} features, {name} wants {self.reader.asks}")
        if self.reader.causal:
            raise ValueError(f"reader must let every question look at all regions, {name} is causal")
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.reader.features + hidden, num_classes)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        words: Int[Tensor, "b r t"],
        lengths: Int[Tensor, "b r"] | None = None,
    ) -> Float[Tensor, "b r n"]:
        """Return the logits of the answers to questions; without ``lengths`` all their words are read."""
        return self.answer(images, words, lengths).logits

    def answer(
        self,
        images: Float[Tensor, "b c h w"],
        words: Int[Tensor, "b r t"],
        lengths: Int[Tensor, "b r"] | None = None,
    ) -> Answered:
        """Return what is answered to questions, and where was looked."""
        return self.asked(self.features(images), words, lengths)

    def asked(
        self,
        features: Float[Tensor, "b e rows columns"],
        words: Int[Tensor, "b r t"],
        lengths: Int[Tensor, "b r"] | None = None,
    ) -> Answered:
        """Return what is answered to questions about maps of the backbone, and where was looked."""
        if not words.shape[2]:
            raise ValueError(f"words must have at least one a question, got {tuple(words.shape)}")
        if lengths is None:
            lengths = torch.full_like(words[:, :, 0], words.shape[2])
        elif not torch.compiler.is_compiling() and bool(((lengths < 1) | (lengths > words.shape[2])).any()):
            raise ValueError(f"lengths must lie from 1 to {words.shape[2]}, all words, got {lengths.tolist()}")
        memory, size = self.regions(features)
        prepared = self.reader.prepare(memory, None, size)
        known = self.question(words.flatten(0, 1)).unflatten(0, words.shape[:2])
        last = at(known, lengths - 1)
        queries = known if self.reader.stateful else last[:, :, None]
        looks = lengths if self.reader.stateful else torch.ones_like(lengths)
        state, maps, said = None, [], []
        for query in queries.unbind(2):
            weights, after = self.reader.attend(query, prepared, state)
            said.append(self.reader.read(query, prepared, state, weights=weights))
            maps.append(weights)
            state = after
        found = at(torch.stack(said, 2), looks - 1)
        logits = self.classifier(self.drop(torch.cat((found, last), 2)))
        return Answered(logits, stacked(maps), looks)


def at(x: Float[Tensor, "b r t d"], place: Int[Tensor, "b r"]) -> Float[Tensor, "b r d"]:
    """Return what stands at a place of each sequence."""
    return x.take_along_dim(place[..., None, None], 2)[:, :, 0]
