"""Wang, Girshick, Gupta, He: Non-local Neural Networks (CVPR 2018)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from visattn.attention.base import Attention
from visattn.attention.pairwise.core import Concatenation, Dot, Softmax, halve, read


class NonLocal(Attention):
    r"""Let every position of a sequence, a feature map or a clip read from every other.

    .. math:: y_i = x_i + W_z \sum_j f(q_i, k_j)\, v_j

    =============== ==================================================================
    ``affinity``    :math:`f`, over :math:`m` positions of the keys
    =============== ==================================================================
    embedded        :math:`\operatorname{softmax}_j(q_i^\top k_j)`
    gaussian        :math:`\operatorname{softmax}_j(x_i^\top x_j)`
    dot             :math:`q_i^\top k_j / m`
    concatenation   :math:`\operatorname{ReLU}(w^\top [q_i; k_j]) / m`
    =============== ==================================================================

    Our query, key, value and out are the paper's :math:`\theta, \phi, g, W_z`. Maps of one, two and three axes
    (``b c l``, ``b c h w``, ``b c t h w``) go through the same module; its weights count positions row by row.
    A fresh module returns its input, and learns: the last layer before the sum starts at zero.

    Args:
        channels: Channels :math:`c` of the map.
        affinity: How two positions compare.
        reduction: Ratio by which query, key and value are narrower than ``channels``.
        scale: Whether the logits of a softmax are divided by :math:`\sqrt d` for :math:`d` features of a query. The
            paper does not, its released code does.
        subsample: Whether keys and values are max-pooled by 2 in space, never in time: before they are projected
            (``"pre"``, as in the released code) or after (``"post"``, as in many ports). These are not equal.
        norm: Whether a batch norm follows :math:`W_z`.

    Raises:
        ValueError: If ``affinity`` or ``subsample`` is unknown, ``reduction`` does not lie between 1 and ``channels``,
            or ``scale`` is asked of an affinity without a softmax.

    Example:
        >>> NonLocal(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    paper = "arXiv:1711.07971"
    place = ("stages[1].blocks[1::2]", "stages[2].blocks[1::2]")
    queried = True

    def __init__(
        self,
        channels: int,
        *,
        affinity: Literal["embedded", "gaussian", "dot", "concatenation"] = "embedded",
        reduction: int = 2,
        scale: bool = False,
        subsample: Literal["pre", "post"] | None = None,
        norm: bool = True,
    ):
        super().__init__()
        if affinity not in ("embedded", "gaussian", "dot", "concatenation"):
            raise ValueError(f"affinity must be embedded, gaussian, dot or concatenation, got {affinity!r}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels={channels}, got {reduction}")
        if scale and affinity in ("dot", "concatenation"):
            raise ValueError(f"scale needs the affinity embedded or gaussian, got {affinity!r}")
        if subsample not in (None, "pre", "post"):
            raise ValueError(f"subsample must be None, pre or post, got {subsample!r}")
        width, gaussian = channels // reduction, affinity == "gaussian"
        self.subsample = subsample
        self.query: nn.Module = nn.Identity() if gaussian else nn.Conv1d(channels, width, 1)
        self.key: nn.Module = nn.Identity() if gaussian else nn.Conv1d(channels, width, 1)
        self.value = nn.Conv1d(channels, width, 1)
        self.affinity: Softmax | Dot | Concatenation
        if affinity == "dot":
            self.affinity = Dot()
        elif affinity == "concatenation":
            self.affinity = Concatenation(width)
        else:
            self.affinity = Softmax((channels if gaussian else width) ** -0.5 if scale else 1.0)
        self.out = nn.Conv1d(width, channels, 1)
        self.norm = nn.BatchNorm1d(channels) if norm else nn.Identity()
        for layer in self.modules():
            if isinstance(layer, (nn.Conv1d, nn.Linear)):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        last = self.norm if isinstance(self.norm, nn.BatchNorm1d) else self.out
        nn.init.zeros_(last.weight)

    @property
    def identity_at_init(self) -> bool:
        return True

    def attend(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b n m"]:
        return self.affinity.weights(self._query(x), self._memory(self._source(x), self.key))

    def read(self, x: Float[Tensor, "b c *space"], *, weights: Float[Tensor, "b n m"]) -> Float[Tensor, "b c *space"]:
        return self._write(x, read(self._memory(self._source(x), self.value), weights))

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        source = self._source(x)
        query, key, value = self._query(x), self._memory(source, self.key), self._memory(source, self.value)
        return self._write(x, self.affinity.read(query, key, value))

    def _query(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b n d"]:
        return self.query(x.flatten(2)).mT

    def _source(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *coarse"]:
        return halve(x) if self.subsample == "pre" else x

    def _memory(self, source: Float[Tensor, "b c *coarse"], project: nn.Module) -> Float[Tensor, "b m d"]:
        projected = project(source.flatten(2))
        if self.subsample == "post":
            projected = halve(projected.unflatten(2, source.shape[2:])).flatten(2)
        return projected.mT

    def _write(self, x: Float[Tensor, "b c *space"], y: Float[Tensor, "b n d"]) -> Float[Tensor, "b c *space"]:
        return x + self.norm(self.out(y.mT)).view(x.shape).to(x.dtype)
