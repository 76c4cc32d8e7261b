"""Radford et al.: Learning Transferable Visual Models From Natural Language Supervision (ICML 2021)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.pooling.core import SingleQuery


class AttentionPool(Attention):
    r"""Ask a map one question by multi-head attention; what is read is the vector of the image.

    .. math:: y = W_o\, \Bigl[\sum_i \operatorname{softmax}_i\bigl(q_h^\top k_{hi} / \sqrt d\bigr)\, v_{hi}\Bigr]_h

    =============== ==================================================================================================
    ``query``       what asks
    =============== ==================================================================================================
    mean            the mean of the map, as in CLIP: it is also the first token that can be read, and every token has
                    a learned position, for which ``size`` is needed
    learned         a learned vector, the same for all images
    recurrent       the last state of an LSTM that has read the mean vectors of the stages before, one after the other:
                    a question that depends on the image. The maps of the stages are further inputs
    =============== ==================================================================================================

    No key and no value is made: with one query the layers of both act on the query and on what is read. CLIP's layer of
    the keys has a bias; it changes nothing and is left out.

    Args:
        channels: Channels :math:`c` of the map.
        query: What asks.
        heads: Number of heads.
        size: Height and width of the map, for the positions of ``query="mean"``.
        stages: Channels of the maps of the stages before, for ``query="recurrent"``.
        out_channels: Features of what is returned; None: ``channels``.

    Raises:
        ValueError: If ``query`` is unknown, ``heads`` does not divide ``channels``, ``size`` or ``stages`` is missing
            where it is needed, or a map has another size or there are not as many stages.

    Example:
        >>> AttentionPool(64, query="learned")(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    paper = "arXiv:2103.00020"
    place = "pool"
    replaces = "pool"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        query: Literal["learned", "mean", "recurrent"] = "mean",
        heads: int = 8,
        size: tuple[int, int] | None = None,
        stages: Sequence[int] = (),
        out_channels: int | None = None,
    ):
        super().__init__()
        if query not in ("learned", "mean", "recurrent"):
            raise ValueError(f"query must be learned, mean or recurrent, got {query!r}")
        if query == "mean" and size is None:
            raise ValueError("size must be the (height, width) of the feature map, got None")
        if (query == "recurrent") != bool(stages):
            raise ValueError(f"stages must be given with query='recurrent' and only then, got {tuple(stages)}")
        self.kind, self.size = query, size
        self.attention = SingleQuery(channels, heads, out_channels or channels)
        if query == "mean" and size is not None:
            self.position = nn.Parameter(torch.randn(size[0] * size[1] + 1, channels) * channels**-0.5)
        elif query == "learned":
            self.latent = nn.Parameter(torch.randn(1, channels) * channels**-0.5)
        else:
            self.steps = nn.ModuleList(nn.Linear(width, channels) for width in stages)
            self.memory = nn.LSTMCell(channels, channels)  # torch.compile breaks at nn.LSTM

    def attend(self, x: Float[Tensor, "b c h w"], *stages: Float[Tensor, "b _ _ _"]) -> Float[Tensor, "b heads 1 m"]:
        tokens = self._tokens(x)
        return self.attention.weights(self._query(tokens, stages), tokens)

    def read(
        self, x: Float[Tensor, "b c h w"], *stages: Float[Tensor, "b _ _ _"], weights: Float[Tensor, "b heads 1 m"]
    ) -> Float[Tensor, "b o"]:
        return self.attention.read(self._tokens(x), weights).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c h w"], *stages: Float[Tensor, "b _ _ _"]) -> Float[Tensor, "b o"]:
        tokens = self._tokens(x)
        weights = self.attention.weights(self._query(tokens, stages), tokens)
        return self.attention.read(tokens, weights).to(x.dtype)

    def _tokens(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m c"]:
        if self.kind != "mean":
            return x.flatten(2).mT
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(f"size must be that of the map, {self.size}, got {tuple(x.shape[2:])}")
        positions = x.flatten(2).mT
        return torch.cat((positions.mean(1, keepdim=True), positions), 1) + self.position.to(x.dtype)

    def _query(self, tokens: Float[Tensor, "b m c"], stages: Sequence[Tensor]) -> Float[Tensor, "a c"]:
        if self.kind == "mean":
            return tokens[:, 0]
        if self.kind == "learned":
            return self.latent
        if len(stages) != len(self.steps):
            raise ValueError(f"stages must be {len(self.steps)} maps before the last, got {len(stages)}")
        state: Any = None
        for step, stage in zip(self.steps, stages, strict=True):
            state = self.memory(step(stage.mean((2, 3))), state)
        return state[0]
