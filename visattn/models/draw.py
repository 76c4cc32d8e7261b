"""Gregor, Danihelka, Graves, Rezende, Wierstra: DRAW: A Recurrent Neural Network For Image Generation (ICML 2015)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from visattn.attention.base import Built
from visattn.attention.core import uncast, wide
from visattn.attention.sampling.gaussian_glimpse import GaussianGlimpse
from visattn.models.looker import Looker, Policy, Rollout, anywhere, decided
from visattn.models.network import at_least_one, headless
from visattn.models.readout import Halting, Readout, read_out, scorer
from visattn.models.recurrent_attention import vectors

WINDOW = GaussianGlimpse.number


class Drawing(NamedTuple):
    """What a network drew, and how; t steps.

    Windows are the numbers of a :class:`~visattn.attention.sampling.gaussian_glimpse.GaussianGlimpse`.
    """

    canvas: Float[Tensor, "b c h w"]
    """The logits of the pixels after the last step."""
    divergences: Float[Tensor, "b t"]
    """What is told of an image in each step, in nats; of nothing, zero."""
    reads: Float[Tensor, "b t 5"] | None
    """Windows through which it read; None without attention, and without images."""
    writes: Float[Tensor, "b t 5"] | None
    """Windows through which it wrote; None without attention."""
    canvases: Float[Tensor, "b t c h w"] | None = None
    """The logits after each step, where they were asked for."""


class DRAW(Built):
    r"""Draw an image step by step: a variational autoencoder with a canvas, that reads and writes through windows.

    .. math:: \hat x_t &= x - \operatorname{sigmoid}(c_{t-1}), \quad
        r_t = \operatorname{read}(x, \hat x_t \mid h^{dec}_{t-1}), \quad
        h^{enc}_t = \mathrm{LSTM}(h^{enc}_{t-1}, [r_t; h^{dec}_{t-1}]) \\
        z_t &\sim \mathcal N\bigl(W_\mu h^{enc}_t, \exp(W_\sigma h^{enc}_t)^2\bigr), \quad
        h^{dec}_t = \mathrm{LSTM}(h^{dec}_{t-1}, z_t), \quad
        c_t = c_{t-1} + \operatorname{write}(h^{dec}_t)

    Biases are not written. What it draws is trained by :math:`-\log p(x \mid c_T) + \sum_t D_{KL}(z_t \,\|\,
    \mathcal N(0, I))`. Of nothing it draws by :math:`z_t \sim \mathcal N(0, I)`, and does not read. The first states
    and the first canvas are learned. A fresh network looks, and writes, all over the image, as
    strongly as the patch is; where it writes faintly, it is slow to begin to tell anything of an image.

    Args:
        in_chans: Channels of the images.
        size: Height and width of the images.
        steps: How often it reads and writes.
        width: Components of each state.
        latent: Components of :math:`z_t`.
        read: Height and width of the patch that is read.
        write: Height and width of the patch that is written.
        attention: Whether it reads and writes such patches, through windows that its state places; else whole images.

    Raises:
        ValueError: If an option is out of its range, or images are smaller than a patch.

    Example:
        >>> network = DRAW(steps=8)
        >>> drawing = network(torch.rand(2, 1, 28, 28).round())
        >>> drawing.canvas.shape, drawing.divergences.shape, drawing.writes.shape
        (torch.Size([2, 1, 28, 28]), torch.Size([2, 8]), torch.Size([2, 8, 5]))
        >>> network.generate(3, canvases=True).canvases.shape
        torch.Size([3, 8, 1, 28, 28])
    """

    def __init__(
        self,
        in_chans: int = 1,
        *,
        size: tuple[int, int] = (28, 28),
        steps: int = 64,
        width: int = 256,
        latent: int = 100,
        read: int = 2,
        write: int = 5,
        attention: bool = True,
    ):
        super().__init__()
        at_least_one(in_chans=in_chans, steps=steps, width=width, latent=latent)
        if attention:
            fits(size, read=read, write=write)
        self.shape = (in_chans, *size)
        self.steps = steps
        self.latent = latent
        self.reader = GaussianGlimpse(read) if attention else None
        self.writer = GaussianGlimpse(write) if attention else None
        pixels = math.prod(self.shape)
        self.encoder = Memory((2 * in_chans * read**2 if attention else pixels) + width, width)
        self.image = None if attention else nn.Linear(pixels, 4 * width, bias=False)
        self.describe = nn.Linear(width, 2 * latent)
        self.decoder = Memory(latent, width)
        self.aim = nn.Linear(width, 2 * WINDOW) if attention else None
        self.stroke = nn.Linear(width, in_chans * write**2 if attention else pixels)
        self.canvas_bias = nn.Parameter(torch.zeros(self.shape))
        if self.aim is not None:
            tile(self.aim.bias[:WINDOW], read, size)
            tile(self.aim.bias[WINDOW:], write, size, writes=True)

    def forward(self, images: Float[Tensor, "b c h w"], *, canvases: bool = False) -> Drawing:
        """Draw images as well as by what was told of them, which chance blurs.

        Args:
            images: The images, of values from 0 to 1.
            canvases: Whether to keep the canvas after each step.
        """
        if images.shape[1:] != self.shape:
            raise ValueError(f"images must be of {self.shape}, got {tuple(images.shape[1:])}")
        return self._draw(images, images.shape[0], self.steps, canvases)

    @torch.no_grad()
    def generate(self, count: int, *, steps: int | None = None, canvases: bool = False) -> Drawing:
        """Draw images of nothing, by chance.

        Args:
            count: How many.
            steps: In how many steps; None: as many as in training.
            canvases: Whether to keep the canvas after each step.
        """
        steps = self.steps if steps is None else steps
        at_least_one(count=count, steps=steps)
        return self._draw(None, count, steps, canvases)

    def corners(self, drawing: Drawing) -> Float[Tensor, "b t 4 2"] | None:
        """Return what the windows through which it wrote cover, (x, y) in pixels; None without attention."""
        if self.writer is None or drawing.writes is None:
            return None
        covered = self.writer.corners(drawing.writes.flatten(0, 1), self.shape[1:])
        return covered[:, 0].unflatten(0, drawing.writes.shape[:2])

    def _draw(self, images: Tensor | None, count: int, steps: int, keep: bool) -> Drawing:
        """Draw; what can be done for all steps at once is done before the loop or behind it."""
        canvas = wide(self.canvas_bias).expand(count, *self.shape)
        encoded, decoded = self.encoder.begin(count), self.decoder.begin(count)
        read, write = self._windows(decoded[0])
        known = self.image(images.flatten(1)) if self.image is not None and images is not None else None
        noise = torch.randn(steps, count, self.latent, dtype=canvas.dtype, device=canvas.device)
        told, canvases, reads, writes = [], [], [], []
        for z in noise.unbind():
            if images is not None:
                reads.append(read)
                seen = self._read(images, canvas, read)
                encoded = self.encoder((seen, decoded[0]), encoded, known)
                told.append(wide(self.describe(encoded[0])))
                mean, log_spread = told[-1].chunk(2, 1)
                z = mean + log_spread.exp() * z
            decoded = self.decoder((z.to(self.canvas_bias.dtype),), decoded)
            read, write = self._windows(decoded[0])
            writes.append(write)
            canvas = canvas + self._write(decoded[0], write)
            if keep:
                canvases.append(canvas)
        return Drawing(
            canvas,
            divergence(*torch.stack(told, 1).chunk(2, 2)) if told else canvas.new_zeros(count, steps),
            torch.stack(reads, 1) if reads and self.reader else None,
            torch.stack(writes, 1) if self.writer else None,
            torch.stack(canvases, 1) if keep else None,
        )

    def _windows(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return where to read next and where to write, in at least float32; without attention, nothing."""
        if self.aim is None:
            return state[:, :0], state[:, :0]
        with uncast(state.device):
            read, write = wide(self.aim(state.to(self.aim.weight.dtype))).split(WINDOW, 1)
        return read, write

    def _read(self, images: Tensor, canvas: Tensor, window: Tensor) -> Tensor:
        """Return what is seen of the error, and through a window of the image, too; else that is known."""
        error = (images - canvas.sigmoid()).to(images.dtype)
        if self.reader is None:
            return error.flatten(1)
        return self.reader(self.reader.prepare(torch.cat((images, error), 1)), window).flatten(1)

    def _write(self, state: Tensor, window: Tensor) -> Tensor:
        """Return what is added to the canvas."""
        stroke = self.stroke(state)
        if self.writer is None:
            return stroke.unflatten(1, self.shape)
        side = self.writer.size
        return self.writer.write(stroke.unflatten(1, (-1, side, side)), window, self.shape[1:])


class Memory(nn.Module):
    """An LSTM, step by step, whose first state is learned.

    Args:
        inputs: Components of what it is given.
        width: Components of its state.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.gates = nn.Linear(inputs + width, 4 * width)
        self.state_bias = nn.Parameter(torch.zeros(2, width))

    def begin(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first state, and the first cell."""
        state, cell = self.state_bias[:, None].expand(-1, count, -1).unbind()
        return state, cell

    def forward(
        self, inputs: tuple[Tensor, ...], past: tuple[Tensor, Tensor], known: Float[Tensor, "b g"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Return the next state and cell.

        Args:
            inputs: What it is given.
            past: The state and the cell before.
            known: What is added to its gates: of inputs that are the same in every step.
        """
        state, cell = past
        gates = self.gates(torch.cat((*inputs, state), 1))
        take, keep, show, new = (gates if known is None else gates + known).chunk(4, 1)
        cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
        return show.sigmoid() * cell.tanh(), cell


class DifferentiableGlimpseClassifier(Looker):
    r"""Classify an image by glimpses through DRAW's window, which learns where to look by the gradient alone.

    .. math:: r_t = \operatorname{read}(x \mid W_a h_{t-1}), \quad h_t = \mathrm{LSTM}(h_{t-1}, r_t), \quad
        z = W_z h_T

    (arXiv:1502.04623). Biases are not written; the first state is learned, so all images are first looked at alike.

    Nothing is drawn by chance, so a roll-out has no actions. Its locations are all five numbers of the window,
    of which x and y come first, as ``sensor.corners`` takes them.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the images.
        size: Height and width of the images.
        glimpses: How many glimpses are taken.
        patch: Height and width of a patch.
        width: Components of the state.
        encoder: Name of a timm model that reads a patch first.
        encoder_args: Arguments of ``timm.create_model``, such as ``img_size``.
        pretrained: Whether the encoder starts with its trained weights.
        readout: What is classified after a glimpse: the ``"last"`` state, the ``"mean"`` of all so far, or their sum by
            weights of ``"attention"``.
        halting: Whether a probability to stop follows from each state (arXiv:2107.05407); :meth:`forward` stops where
            that to have stopped passes a half.

    Raises:
        ValueError: If an option is out of its range, or images are smaller than a patch.

    Example:
        >>> network = DifferentiableGlimpseClassifier(10)
        >>> rollout = network.rollout(torch.rand(2, 1, 100, 100))
        >>> rollout.logits.shape, rollout.locations.shape, rollout.log_probs.shape
        (torch.Size([2, 8, 10]), torch.Size([2, 8, 5]), torch.Size([2, 0]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_chans: int = 1,
        size: tuple[int, int] = (100, 100),
        glimpses: int = 8,
        patch: int = 12,
        width: int = 256,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        readout: Readout = "last",
        halting: bool = False,
    ):
        super().__init__()
        self.arguments.pop("pretrained", None)  # whoever builds it again has weights
        at_least_one(num_classes=num_classes, in_chans=in_chans, glimpses=glimpses, width=width)
        fits(size, patch=patch)
        if (pretrained or encoder_args) and not encoder:
            raise ValueError("pretrained and encoder_args must be left out without an encoder")
        self.num_classes = num_classes
        self.glimpses = glimpses
        self.readout = readout
        self.halts = halting
        self.sensor = GaussianGlimpse(patch)
        self.encoder: nn.Module = nn.Flatten()
        seen = in_chans * patch**2
        if encoder:
            self.encoder, known = headless("encoder", encoder, encoder_args, in_chans=in_chans, pretrained=pretrained)
            self.arguments |= known
            seen = vectors(self.encoder, (in_chans, patch, patch))
        self.memory = Memory(seen, width)
        self.aim = nn.Linear(width, WINDOW)
        tile(self.aim.bias, patch, size)
        self.score = scorer(readout, width)
        self.classifier = nn.Linear(width, num_classes)
        self.halt = Halting(width) if halting else None

    def rollout(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        rollouts: int = 1,
        policy: Policy = "sample",
        first: Float[Tensor, "m 2"] | None = None,
        answer: Int[Tensor, "b"] | None = None,
    ) -> Rollout:
        """Look at images; see :meth:`Looker.rollout`. Given or random locations are those of the windows' centres."""
        count = self.count(images, rollouts, policy, first)
        if answer is not None:
            raise ValueError("answer must be None: nothing that is told it draws actions")
        if first is not None:
            if first.shape[1] != 2:
                raise ValueError(f"first must be 2 numbers for each roll-out, got {first.shape[1]}")
            if astray := first[~(first.abs() <= 1).all(1)].tolist():
                raise ValueError(f"first must lie in [-1, 1], got {astray[0]} first, in {len(astray)} rows")
        return self._look(images, count, policy, first)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        rollout = self._look(images, images.shape[0], "mean", early=True)
        return decided(rollout.logits, rollout.halting)

    def _look(
        self, images: Tensor, count: int, policy: Policy, first: Tensor | None = None, *, early: bool = False
    ) -> Rollout:
        """Look through one window after another; what can be done for all glimpses at once is done behind the loop."""
        fits(images.shape[2:], "images", patch=self.sensor.size)
        prepared, past = self.sensor.prepare(images), self.memory.begin(count)
        windows: list[Tensor] = []
        states: list[Tensor] = []
        for t in range(self.glimpses):
            if early and states and self.halt is not None and self.halt.over(states):
                break
            window = self._window(past[0])
            if policy in ("random", "centre"):
                window = torch.cat((anywhere(window, policy), window[:, 2:]), 1)
            if t == 0 and first is not None:
                window = torch.cat((first.to(window), window[:, 2:]), 1)
            windows.append(window)
            past = self.memory((self.encoder(self.sensor(prepared, window)[:, 0]),), past)
            states.append(past[0])
        h = torch.stack(states)
        read, weights = read_out(h, self.readout, self.score)
        logits = self.classifier(read).transpose(0, 1)
        nothing = logits.new_zeros(count, 0)
        halting = None if self.halt is None else self.halt.probabilities(h)
        return Rollout(logits, torch.stack(windows, 1), nothing, nothing, nothing, weights, halting)

    def _window(self, state: Tensor) -> Float[Tensor, "m 5"]:
        """Return where to look next, in at least float32."""
        with uncast(state.device):
            return wide(self.aim(state.to(self.aim.weight.dtype)))


@torch.no_grad()
def tile(window: Float[Tensor, "5"], patch: int, size: tuple[int, int], *, writes: bool = False) -> None:
    """Set a window so that its filters tile the image, and what is written has the strength of the patch.

    Each is half as wide, by its standard deviation, as they are apart.
    """
    stride = max(size) / patch
    spread, relative = 2 * math.log(stride / 2), math.log(stride * (patch - 1) / (max(size) - 1))
    window.copy_(window.new_tensor((0.0, 0.0, spread, relative, -2 * math.log(stride) if writes else 0.0)))


def divergence(mean: Float[Tensor, "*b d"], log_spread: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    r"""Return the divergence of normal distributions from the standard one, in nats.

    .. math:: D_{KL} = \tfrac12 \sum_i \left(\mu_i^2 + \sigma_i^2 - \log \sigma_i^2 - 1\right)

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2))
        tensor([0., 2.])
    """
    return (mean.square() + torch.expm1(2 * log_spread) - 2 * log_spread).sum(-1) / 2


def fits(size: Sequence[int], argument: str = "size", **patches: int) -> None:
    """Raise a ``ValueError`` if images are smaller than a patch, or a patch has no two filters."""
    for name, side in patches.items():
        if side < 2:
            raise ValueError(f"{name} must be at least 2, got {side}")
        if min(size) < side:
            given = f"{size[0]} × {size[1]}"
            raise ValueError(f"{argument} must be at least {side}, as high and wide as {name}, got {given}")
