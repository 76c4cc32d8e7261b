"""Speed of glimpse sensors beside straightforward ones: ``python -m benchmarks.glimpses``.

A retina looks at every image at the locations of a roll-out, what is prepared included, beside a loop over images,
steps and scales that pads an image, cuts a patch out and averages it. Gaussian filters read once, and have gradients,
beside a form that repeats them for every channel and keeps all of their weights; windows are about 0.6 of the image
wide, and filters about a pixel. Prints a Markdown table for one thread of a processor; ratios are medians over
interleaved rounds with their quartiles, above 1 where ours is faster. Each row has a process of its own.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Ratios, ratios
from visattn.attention.sampling.gaussian_glimpse import GaussianGlimpse
from visattn.attention.sampling.retina import Retina


class Look(NamedTuple):
    """Images, and how often and by which retina they are looked at."""

    shape: tuple[int, int, int, int]
    patch: int
    scales: int
    steps: int
    form: str


class Read(NamedTuple):
    """Images, how many filters read them, and which gradients are asked for."""

    shape: tuple[int, int, int, int]
    filters: int
    mode: str


SIZES = (
    ((128, 1, 28, 28), 8, 1, 6),
    ((128, 1, 60, 60), 12, 3, 8),
    ((128, 1, 100, 100), 12, 4, 8),
    ((128, 3, 224, 224), 12, 3, 8),
)
FORMS = ("pyramid", "point", "exact")
MODES = ("forward", "and backward to the parameters", "and to the images")
LOOKS = [Look(*size, form) for size in SIZES for form in FORMS]
READS = [Read(shape, 12, mode) for shape in ((128, 1, 60, 60), (32, 3, 224, 224)) for mode in MODES]


def crops(images: Tensor, where: Tensor, patch: int, scales: int) -> Tensor:
    """Cut a glimpse of every image out, one after the other."""
    glimpses = []
    for image, (x, y) in zip(images, where.tolist(), strict=True):
        patches = []
        for i in range(scales):
            side = patch * 2**i
            left, top = (int((at + 1) / 2 * n + side / 2 + 0.5) for at, n in ((x, image.shape[2]), (y, image.shape[1])))
            padded = F.pad(image, (side, side, side, side))
            patches.append(F.avg_pool2d(padded[:, top : top + side, left : left + side], 2**i))
        glimpses.append(torch.stack(patches))
    return torch.stack(glimpses)


def plain_read(images: Tensor, where: Tensor, n: int) -> Tensor:
    """Read by the filters of all pixels, repeated for every channel."""
    channels, height, width = images.shape[1:]
    x, y = (width + 1) / 2 * (where[:, 0] + 1) - 1, (height + 1) / 2 * (where[:, 1] + 1) - 1
    variance, gamma = where[:, 2].exp()[:, None, None], where[:, 4].exp()[:, None, None, None]
    stride = (max(height, width) - 1) / (n - 1) * where[:, 3].exp()
    offsets = (torch.arange(n) - (n - 1) / 2) * stride[:, None]

    def bank(middle: Tensor, side: int) -> Tensor:
        distances = torch.arange(side) - (middle[:, None] + offsets)[..., None]
        weights = torch.exp(-distances.square() / (2 * variance))
        filters = weights / weights.sum(2, keepdim=True).clamp_min(1e-8)
        return filters[:, None].repeat(1, channels, 1, 1)

    return gamma * (bank(y, height) @ images @ bank(x, width).mT)


def looked(task: Look, rounds: int) -> Ratios:
    images, where = torch.rand(task.shape), 2 * torch.rand(task.steps, task.shape[0], 2) - 1
    sensor = Retina(task.patch, scales=task.scales, form=task.form)  # type: ignore[arg-type]

    def ours() -> list[Tensor]:
        prepared = sensor.prepare(images)
        return [sensor(prepared, each) for each in where]

    def loop() -> list[Tensor]:
        return [crops(images, each, task.patch, task.scales) for each in where]

    if task.form == "exact":
        assert all(map(torch.equal, ours(), loop())), "they differ"
    return ratios(loop, ours, rounds)


def read(task: Read, rounds: int) -> Ratios:
    images, sensor = torch.rand(task.shape), GaussianGlimpse(task.filters)
    where = 0.1 * torch.randn(task.shape[0], 5) - torch.tensor([0, 0, 0, 0.5, 0])
    ours, simple = sensor(sensor.prepare(images), where)[:, 0], plain_read(images, where, task.filters)
    torch.testing.assert_close(ours, simple, rtol=0, atol=1e-5)
    where.requires_grad_(task.mode != MODES[0])
    images.requires_grad_(task.mode == MODES[2])
    wanted, gradient = [each for each in (images, where) if each.requires_grad], torch.rand_like(ours)

    def call(form: Callable[[], Tensor]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(form(), wanted, gradient)) if wanted else form

    simply = call(lambda: plain_read(images, where, task.filters))
    return ratios(simply, call(lambda: sensor(sensor.prepare(images), where)[:, 0]), rounds)


def row(task: tuple[Look | Read, int]) -> str:
    what, rounds = task
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, channels, height, width = what.shape
    size = f"{batch} × {channels}×{height}×{width}"
    if isinstance(what, Look):
        measured = looked(what, rounds)
        name = f"{what.steps} glimpses of {what.scales} × {what.patch}×{what.patch} | {what.form}"
    else:
        measured = read(what, rounds)
        name = f"{what.filters}×{what.filters} Gaussian filters | {what.mode}"
    return f"| {size} | {name} | {measured.candidate * 1e3:.2f} | {measured} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each comparison")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, one thread\n")
    print("| images | sensor | | ours, ms | ratio |\n|---|---|---|---:|---:|")
    every: list[Look | Read] = [*LOOKS, *READS]
    tasks = [(what, arguments.rounds) for what in every]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for line in pool.imap(row, tasks):
            print(line, flush=True)


if __name__ == "__main__":
    main()
