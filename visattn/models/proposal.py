"""Where a caption's words may have been read, as told by somebody who knows the caption: for wake-sleep training."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from visattn.attention.memory.additive import AdditiveAttention
from visattn.models.network import at_least_one


class Proposal(nn.Module):
    r"""Propose regions for each word of a caption that is known.

    .. math:: q(s_t = i \mid y, v) = \operatorname{softmax}_i\bigl(u^\top \tanh(W_q h_t + W_k v_i + b)\bigr)

    where :math:`h_t` are the states of two recurrent networks that read the whole caption, forwards and backwards.

    Args:
        vocabulary: How many words there are.
        memory: Features of the regions.
        hidden: Units of each recurrent network, features of a word, and units of the perceptron.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> proposal = Proposal(100, 32)
        >>> words, lengths = torch.randint(100, (2, 5, 7)), torch.full((2, 5), 7)
        >>> proposal(torch.randn(2, 49, 32), words, lengths).shape
        torch.Size([2, 5, 7, 49])
    """

    def __init__(self, vocabulary: int, memory: int, *, hidden: int = 256):
        super().__init__()
        at_least_one(vocabulary=vocabulary, memory=memory, hidden=hidden)
        self.words = nn.Embedding(vocabulary, hidden)
        self.reader = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.attention = AdditiveAttention(2 * hidden, memory, width=hidden)

    def forward(
        self, memory: Float[Tensor, "b l d"], words: Int[Tensor, "b r t"], lengths: Int[Tensor, "b r"]
    ) -> Float[Tensor, "b r t l"]:
        """Return the logarithms of the probabilities of regions, for each word.

        Args:
            memory: The regions.
            words: The words that are said.
            lengths: How many words each caption has. What is told of words after its end means nothing.
        """
        shape = words.shape
        packed = pack_padded_sequence(
            self.words(words.flatten(0, 1)), lengths.flatten().cpu(), batch_first=True, enforce_sorted=False
        )
        read, _ = pad_packed_sequence(self.reader(packed)[0], batch_first=True, total_length=shape[2])
        asked = read.unflatten(0, shape[:2]).flatten(1, 2)
        scores = self.attention.scores(asked, self.attention.prepare(memory))
        return scores.log_softmax(-1).unflatten(1, shape[1:])


def draw(log_probs: Float[Tensor, "*b l"]) -> Int[Tensor, "*b"]:
    """Draw a region by its probability."""
    return (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(-1)
