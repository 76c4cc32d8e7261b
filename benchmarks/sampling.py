"""Speed of spatial transformers beside straightforward ones: ``python -m benchmarks.sampling``.

A thin plate is compared with (a) a product for each image, ``bmm(expand(M), points)``, and with (b) the same where the
matrix is copied for each image and the inverse applied in each call; an affine map with ``affine_grid``. All end in
``grid_sample``, so no grid, however fast, is better than the last column: how many times faster sampling alone is than
the baseline. Prints a Markdown table for one thread of a processor; ratios are medians over interleaved rounds with
their quartiles, above 1 where ours is faster. Each row has a process of its own.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import ratios
from visattn.attention.sampling.grids import centres
from visattn.attention.sampling.thin_plate import ThinPlate, basis, lattice, system
from visattn.attention.sampling.transforms import Affine, Transform
from visattn.attention.sampling.warp import sample

SIZES = (((256, 1, 28, 28), (4, 4)), ((192, 1, 32, 100), (2, 10)), ((32, 3, 224, 224), (2, 10)))
BASELINES = ("expand + bmm", "repeat + inverse", "affine_grid")
MODES = ("forward", "and backward to the parameters", "and to the image")

Warp = Callable[[Tensor, Tensor], Tensor]


def sampled(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, align_corners=False)


def sides(baseline: str, shape: tuple[int, ...], rows_and_columns: tuple[int, int]) -> tuple[Warp, Transform]:
    """Return the baseline, and our transform."""
    batch, _, *size = shape
    height, width = size
    if baseline == "affine_grid":

        def library(image: Tensor, parameters: Tensor) -> Tensor:
            return sampled(image, F.affine_grid(parameters.view(-1, 2, 3), list(image.shape), align_corners=False))

        return library, Affine()
    control = lattice(*rows_and_columns)
    plate = ThinPlate(control, size=(height, width))
    inverse = torch.linalg.inv(system(control, 0.0))
    kernel = basis(centres((height, width), dtype=torch.float64)[:2].mT, control)
    matrix, inverse, kernel = (kernel @ inverse).float(), inverse.float(), kernel.float()

    def values(parameters: Tensor) -> Tensor:
        return F.pad(parameters.view(batch, -1, 2), (0, 0, 0, 3))

    def expanded(image: Tensor, parameters: Tensor) -> Tensor:
        grid = torch.bmm(matrix.expand(batch, -1, -1), values(parameters))
        return sampled(image, grid.view(batch, height, width, 2))

    def repeated(image: Tensor, parameters: Tensor) -> Tensor:
        bend = torch.bmm(inverse.repeat(batch, 1, 1), values(parameters))
        return sampled(image, torch.bmm(kernel.repeat(batch, 1, 1), bend).view(batch, height, width, 2))

    return expanded if baseline == "expand + bmm" else repeated, plate


def row(task: tuple[str, int, str, int]) -> str:
    baseline, number, mode, rounds = task
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape, control = SIZES[number]
    simple, transform = sides(baseline, shape, control)

    def ours(image: Tensor, parameters: Tensor) -> Tensor:
        return sample(image, transform(parameters, (shape[2], shape[3])))

    image = torch.rand(shape)
    parameters = transform.identity + 0.1 * torch.randn(shape[0], transform.number)
    grid = transform(parameters, (shape[2], shape[3]))
    assert (ours(image, parameters) - simple(image, parameters)).abs().mean() < 1e-3, "they differ"
    gradient = torch.rand(shape)
    image.requires_grad_(mode == MODES[2])

    def call(warp: Warp, how: Tensor) -> Callable[[], Any]:
        how = how.detach().requires_grad_(mode != MODES[0])
        wanted = [each for each in (image, how) if each.requires_grad]
        if wanted:
            return lambda: torch.autograd.grad(warp(image, how), wanted, gradient)
        return lambda: warp(image, how)

    measured = ratios(call(simple, parameters), call(ours, parameters), rounds)
    most = ratios(call(simple, parameters), call(sampled, grid), rounds)
    batch, channels, height, width = shape
    points = "" if baseline == "affine_grid" else f", {control[0] * control[1]} points"
    size = f"{batch} × {channels}×{height}×{width}{points}"
    return f"| {size} | {baseline} | {mode} | {measured.candidate * 1e3:.2f} | {measured} | {most.median:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each comparison")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, one thread\n")
    print("| size | beside | | ours, ms | ratio | at most |\n|---|---|---|---:|---:|---:|")
    tasks = [(b, i, mode, arguments.rounds) for b in BASELINES for i in range(len(SIZES)) for mode in MODES]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for line in pool.imap(row, tasks):
            print(line, flush=True)


if __name__ == "__main__":
    main()
