"""Speed and memory of each module beside its counterpart: ``python -m benchmarks.modules [--compiled]``.

Prints a Markdown table for one thread of a processor. Ratios are medians over interleaved rounds with their quartiles,
above 1 where ours is faster. Memory is what a call holds from the allocator at most. Each row has a process of its own,
since what a process did before decides how dear fresh memory is.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Ratios, peak, ratios
from visattn import BAM, CBAM, EfficientChannelAttention, NonLocal, SelfAttention2d, SqueezeExcitation

SIZES = ((8, 64, 56, 56), (8, 256, 28, 28), (8, 512, 14, 14))


class MatrixNonLocal(nn.Module):
    """Embedded Gaussian non-local attention that writes out the matrix of all pairs."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out, self.norm = nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        y = value @ (query.mT @ key).softmax(-1).mT
        return x + self.norm(self.out(y.unflatten(2, x.shape[2:])))


class MatrixSelfAttention(nn.Module):
    """SAGAN's attention that writes out the matrix of all pairs."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 8, 1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(channels // 8, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        y = value @ (query.mT @ key).softmax(-1).mT
        return x + self.gain * self.out(y.unflatten(2, x.shape[2:]))


class PlainBAM(BAM):
    """BAM as its equation reads."""

    def forward(self, x: Tensor) -> Tensor:
        channel, spatial = self.channel(x.mean((2, 3)))[:, :, None, None], self.spatial(x)
        return x * (1 + torch.sigmoid(channel + spatial))


def counterparts() -> dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]]:
    """What each module is compared with, and the module."""
    from timm.layers import EcaModule, SEModule
    from timm.layers.cbam import CbamModule

    return {
        "SqueezeExcitation": (partial(SEModule, rd_divisor=1), SqueezeExcitation),
        "EfficientChannelAttention": (EcaModule, EfficientChannelAttention),
        "CBAM": (CbamModule, CBAM),
        "BAM": (PlainBAM, BAM),
        "NonLocal": (MatrixNonLocal, NonLocal),
        "SelfAttention2d": (MatrixSelfAttention, SelfAttention2d),
    }


def row(name: str, size: tuple[int, ...], compiled: bool, rounds: int) -> str:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sides = [make(size[1]) for make in counterparts()[name]]
    x, gradient = torch.randn(size), torch.randn(size)
    leaf = x.clone().requires_grad_()

    def learn(module: nn.Module) -> None:
        leaf.grad = None
        module(leaf).backward(gradient)

    def compare(call: Callable[[nn.Module], object], train: bool) -> list[Ratios]:
        peer, ours = (side.train(train) for side in sides)
        if not compiled:
            return [ratios(partial(call, peer), partial(call, ours), rounds)]
        fast_peer, fast_ours = torch.compile(peer), torch.compile(ours, fullgraph=True)
        return [ratios(partial(call, other), partial(call, fast_ours), rounds) for other in (peer, fast_peer)]

    with torch.inference_mode():
        forward = compare(lambda module: module(x), train=False)
    both = compare(learn, train=True)
    cells = [name, "×".join(map(str, size)), f"{forward[0].candidate * 1e3:.2f}", *map(str, forward)]
    cells += [f"{both[0].candidate * 1e3:.2f}", *map(str, both)]
    if not compiled:
        cells += [f"{peak(partial(learn, side)) / 2**20:.1f}" for side in reversed(sides)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="ours by torch.compile, against both forms of the peer")
    parser.add_argument("--only", nargs="+", choices=list(counterparts()), default=list(counterparts()))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    against = ["eager", "compiled"] if args.compiled else [""]
    head = ["module", "size", "forward ms", *(f"× {which}".strip() for which in against)]
    head += ["forward + backward ms", *(f"× {which}".strip() for which in against)]
    if not args.compiled:
        head += ["MiB", "counterpart's MiB"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [pool.submit(row, name, size, args.compiled, args.rounds) for name in args.only for size in SIZES]
        for job in jobs:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
