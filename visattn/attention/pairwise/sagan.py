"""Zhang, Goodfellow, Metaxas, Odena: Self-Attention Generative Adversarial Networks (ICML 2019)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from visattn.attention.base import Attention
from visattn.attention.pairwise.core import Softmax, halve, read


class SelfAttention2d(Attention):
    r"""Let every position of a feature map read from every other, by a learned gain that starts at zero.

    .. math:: y_i = x_i + \gamma\, W_v \sum_j \operatorname{softmax}_j(q_i^\top k_j)\, v_j

    Our query, key and value are the paper's :math:`g, f, h`, and the :math:`\theta, \phi, g` of its released code; our
    out is their :math:`W_v`. No layer has a bias. In both forms :math:`d = c / r` for query and key.

    ============ ===================== ====================== =========================
    ``form``     features of a value   pooling by 2           weights
    ============ ===================== ====================== =========================
    paper        :math:`d`             none                   ``b n n``
    released     :math:`c / 2`         keys and values, after ``b n m``, each side
                                       their projection       of the map halved, upwards
    ============ ===================== ====================== =========================

    Args:
        channels: Channels :math:`c` of the feature map.
        form: Whether to build what the paper writes or what its released code does.
        reduction: Ratio :math:`r` by which query and key are narrower than ``channels``.
        spectral_norm: Whether the four layers are divided by their largest singular value, as in the paper's networks.
            One power iteration each time a layer is used in training; such a module cannot be pickled.

    Raises:
        ValueError: If ``form`` is unknown or ``reduction`` does not lie between 1 and ``channels``.

    Example:
        >>> SelfAttention2d(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1805.08318"
    place = "stages[1:3]"
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        form: Literal["paper", "released"] = "paper",
        reduction: int = 8,
        spectral_norm: bool = False,
    ):
        super().__init__()
        if form not in ("paper", "released"):
            raise ValueError(f"form must be paper or released, got {form!r}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        self.form = form
        width = channels // reduction
        inner = width if form == "paper" else (channels + 1) // 2
        self.query = nn.Conv1d(channels, width, 1, bias=False)
        self.key = nn.Conv1d(channels, width, 1, bias=False)
        self.value = nn.Conv1d(channels, inner, 1, bias=False)
        self.out = nn.Conv1d(inner, channels, 1, bias=False)
        self.affinity = Softmax()
        self.gamma = nn.Parameter(torch.zeros(1))
        if spectral_norm:
            for layer in (self.query, self.key, self.value, self.out):
                parametrizations.spectral_norm(layer)

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n m"]:
        return self.affinity.weights(self._query(x), self._memory(x, self.key))

    def read(self, x: Float[Tensor, "b c h w"], *, weights: Float[Tensor, "b n m"]) -> Float[Tensor, "b c h w"]:
        return self._write(x, read(self._memory(x, self.value), weights))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        query, key, value = self._query(x), self._memory(x, self.key), self._memory(x, self.value)
        return self._write(x, self.affinity.read(query, key, value))

    def _query(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.query(x.flatten(2)).mT

    def _memory(self, x: Float[Tensor, "b c h w"], project: nn.Module) -> Float[Tensor, "b m d"]:
        projected = project(x.flatten(2))
        if self.form == "released":
            projected = halve(projected.unflatten(2, x.shape[2:])).flatten(2)
        return projected.mT

    def _write(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b n d"]) -> Float[Tensor, "b c h w"]:
        return x + self.out(self.gamma * y.mT).view(x.shape).to(x.dtype)  # the gain where the map is narrow
