"""Speed and memory of every module beside its counterparts: ``python -m benchmarks.modules [--compiled]``.

A counterpart is the same function in timm, torchvision or torch; where ours has a fused forward, also the module as its
equation reads, which makes the weights first and then reads by them. Prints a Markdown table for one thread of a
processor. Ratios are medians over interleaved rounds with their quartiles, above 1 where ours is faster. Memory is what
a call holds from the allocator at most. Each row has a process of its own, since what a process did before decides how
dear fresh memory is. Where a matrix of all pairs would not fit, the row has fewer images. A module without
counterparts, or whose counterpart would not fit for one image, has no ratio, and is timed in two rounds.
"""

import argparse
import inspect
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Ratios, peak, ratios
from visattn import attention
from visattn.attention import Attention

SIZES = ((8, 64, 56, 56), (8, 256, 28, 28), (8, 512, 14, 14), (32, 64, 56, 56), (32, 256, 28, 28), (32, 512, 14, 14))
LARGE = (1, 64, 128, 128)
PAIRS = 2**28
"""Weights between positions, over images, that a matrix of all pairs may have: 1 GiB in float32."""

Maker = Callable[..., nn.Module]


class Plain(nn.Module):
    """A module as its equation reads: the weights first, then what is read by them."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, *x: Tensor) -> Any:
        return self.attention.read(*x, weights=self.attention.attend(*x))


def zoo() -> dict[str, type[Attention]]:
    """The modules on feature maps."""
    return {n: getattr(attention, n) for n in attention.__all__ if n not in ("Attention", *attention.memory.__all__)}


def make(cls: type[Attention], channels: int, size: tuple[int, int], **options: Any) -> Attention:
    if "size" in inspect.signature(cls).parameters:
        options = {"size": size, **options}
    return cls(channels, **options)


class ChannelsFirst(nn.Module):
    """Calls a layer that wants (b, h, w, c) or (b, n, c) on a map."""

    def __init__(self, layer: Callable[[Tensor], Tensor], tokens: bool):
        super().__init__()
        self.layer, self.tokens = layer, tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            return self.layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MultiHead(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Routed(nn.Module):
    """timm's conditional convolution with the routing that its networks put before it."""

    def __init__(self, channels: int, experts: int = 8):
        super().__init__()
        from timm.layers import CondConv2d

        self.route = nn.Linear(channels, experts)
        self.conv = CondConv2d(channels, channels, 3, padding=1, num_experts=experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.route(x.mean((2, 3))).sigmoid())


def counterparts(name: str) -> dict[str, tuple[Maker, Maker]]:
    """What a module is compared with, by library, each with the module in the form that is the same function.

    Both are called with the channels and the size of the map.
    """
    import timm.layers as timms
    from timm.layers.bottleneck_attn import BottleneckAttn
    from timm.layers.cbam import CbamModule
    from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn
    from timm.layers.halo_attn import HaloAttn
    from timm.layers.lambda_layer import LambdaLayer
    from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
    from timm.models.volo import OutlookAttention

    cls = zoo()[name]

    def sized(peer: Callable[..., nn.Module], *args: Any, **options: Any) -> Maker:
        return lambda channels, size: peer(channels, *args, **options)

    def ours(**options: Any) -> Maker:
        return lambda channels, size: make(cls, channels, size, **options)

    def block(size: tuple[int, int]) -> int:
        return 7 if size[0] % 7 == 0 else 8

    timm: dict[str, tuple[Maker, Maker]] = {
        "SqueezeExcitation": (sized(SEModule, rd_divisor=1), ours()),
        "EffectiveSqueezeExcitation": (sized(EffectiveSEModule), ours()),
        "EfficientChannelAttention": (sized(timms.EcaModule), ours()),
        "CBAM": (sized(CbamModule), ours()),
        "CoordinateAttention": (sized(CoordAttn), ours()),
        "EfficientLocalAttention": (sized(EfficientLocalAttn), ours(shared=False, norm_groups=1)),
        "GlobalContext": (sized(timms.GlobalContext, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16), ours()),
        "SelectiveKernel": (sized(timms.SelectiveKernel, split_input=False, groups=32), ours()),
        "SplitAttention": (sized(timms.SplitAttn, norm_layer=nn.BatchNorm2d), ours()),
        "ConditionalConvolution": (sized(Routed), ours()),
        "BottleneckSelfAttention": (lambda c, size: BottleneckAttn(c, feat_size=size), ours()),
        "HaloAttention": (
            lambda c, size: HaloAttn(c, block_size=block(size), halo_size=3),
            lambda c, size: cls(c, block=block(size), halo=3, scale_positions=False),
        ),
        "LambdaAttention": (sized(LambdaLayer, r=9), ours(scope=9)),
        "OutlookAttention": (
            lambda c, size: ChannelsFirst(OutlookAttention(c, c // 32, stride=2), tokens=False),
            ours(),
        ),
        "AttentionPool": (lambda c, size: timms.AttentionPool2d(c, feat_size=size, num_heads=8), ours()),
    }
    torchs: dict[str, tuple[Maker, Maker]] = {
        "MultiHeadSelfAttention2d": (
            lambda c, size: ChannelsFirst(MultiHead(c, 8, batch_first=True), tokens=True),
            ours(),
        ),
    }
    found = {"timm": timm[name]} if name in timm else {"torch": torchs[name]} if name in torchs else {}
    if name == "GlobalContext":
        found["timm, scale"] = (sized(timms.GlobalContext, rd_ratio=1 / 16), ours(fusion="scale"))
    if cls.forward is not Attention.forward:
        found["its equation"] = (lambda channels, size: Plain(make(cls, channels, size)), ours())
    return found


def fitting(cls: type[Attention], size: tuple[int, ...], against: str) -> tuple[int, ...]:
    """The size with as many images as leave the matrix of all pairs in memory, which may be none."""
    batch, channels, height, width = size
    if against == "its equation" and cls.queried:
        batch = min(batch, PAIRS // (8 * (height * width) ** 2))
    return batch, channels, height, width


def row(name: str, against: str, size: tuple[int, ...], compiled: bool, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _, channels, *grid = size
    makers: Sequence[Maker] = counterparts(name)[against] if against else [partial(make, zoo()[name])] * 2
    sides = [maker(channels, tuple(grid)) for maker in makers]
    given = inspect.signature(zoo()[name].attend).parameters.values()
    count = sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in given) - 1  # without self
    x = [torch.randn(size) for _ in range(count)]
    leaves = [each.clone().requires_grad_() for each in x]
    with torch.no_grad():
        output = sides[1].eval()(*x)
    gradients = [torch.randn_like(y) for y in ([output] if isinstance(output, Tensor) else output)]

    def learn(module: nn.Module) -> None:
        for leaf in leaves:
            leaf.grad = None
        output = module(*leaves)
        torch.autograd.backward([output] if isinstance(output, Tensor) else list(output), gradients)

    def compare(call: Callable[[Any], object], train: bool) -> list[Ratios]:
        peer, ours = (side.train(train) for side in sides)
        if not compiled:
            return [ratios(partial(call, peer), partial(call, ours), rounds)]
        fast_peer, fast_ours = torch.compile(peer), torch.compile(ours, fullgraph=True)
        return [ratios(partial(call, other), partial(call, fast_ours), rounds) for other in (peer, fast_peer)]

    with torch.inference_mode():
        forward = compare(lambda module: module(*x), train=False)
    both = compare(learn, train=True)
    result: dict[str, Any] = {"module": name, "counterpart": against, "size": list(size), "compiled": compiled}
    result |= {"forward": [list(r) for r in forward], "both": [list(r) for r in both]}
    if not compiled:
        result["peak"] = [peak(partial(learn, side)) / 2**20 for side in reversed(sides)]
    return result


def table(rows: list[dict[str, Any]], compiled: bool) -> Iterator[str]:
    against = ["eager", "compiled"] if compiled else [""]
    head = ["module", "beside", "size", "forward ms", *(f"× {which}".strip() for which in against)]
    head += ["forward + backward ms", *(f"× {which}".strip() for which in against)]
    head += [] if compiled else ["MiB", "theirs"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * 3}{'---:|' * (len(head) - 3)}"
    for row in rows:
        cells = [row["module"], row["counterpart"] or "–", "×".join(map(str, row["size"]))]
        for part in ("forward", "both"):
            several = [Ratios(*each) for each in row[part]]
            cells += [f"{several[0].candidate * 1e3:.2f}", *(str(r) if row["counterpart"] else "–" for r in several)]
        if not compiled:
            ours, theirs = row["peak"]
            cells += [f"{ours:.1f}", f"{theirs:.1f}" if row["counterpart"] else "–"]
        yield f"| {' | '.join(cells)} |"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the ratios of all rows with a counterpart, a line for each module, a dot for each size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys((row["module"], row["counterpart"]) for row in rows if row["counterpart"]))
    figure = Figure((10, 1 + 0.24 * len(names)), layout="constrained")
    for axes, part, title in zip(
        figure.subplots(1, 3, sharey=True),
        ("forward", "both", "peak"),
        ("forward", "forward + backward", "memory"),
        strict=True,
    ):
        for row in rows:
            if row["counterpart"]:
                theirs = row["peak"][1] / max(row["peak"][0], 1e-9) if part == "peak" else row[part][0][0]
                at = names.index((row["module"], row["counterpart"]))
                color = "tab:blue" if theirs >= 0.95 else "tab:red"
                axes.plot(theirs, at, "o", markersize=4, alpha=0.6, color=color)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.set_yticks(range(len(names)), [f"{name} ({other})" for name, other in names], fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle("theirs / ours")
    FigureCanvasAgg(figure).print_png(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="ours by torch.compile, against both forms of the peer")
    parser.add_argument("--only", nargs="+", choices=list(zoo()), default=list(zoo()), metavar="MODULE")
    parser.add_argument("--sizes", nargs="+", help="such as 8x64x56x56; left out, all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--save", type=Path, help="keep the rows in this file, one a line; what is there is not repeated"
    )
    parser.add_argument("--png", type=Path, help="draw the ratios")
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes] if args.sizes else [*SIZES, LARGE]
    rows = [json.loads(line) for line in args.save.read_text().splitlines()] if args.save and args.save.exists() else []
    rows = [row for row in rows if row["compiled"] == args.compiled and row["module"] in args.only]
    done = {(row["module"], row["counterpart"], tuple(row["size"])) for row in rows}
    for name in args.only:
        for peer, size in product(counterparts(name) or [""], sizes):
            fits = fitting(zoo()[name], size, peer)
            for against, given in ((peer, fits), ("", size)):  # ours alone where a peer does not fit
                if not given[0]:
                    continue
                if done & {(name, against, given), (name, "", size)}:
                    break
                done.add((name, against, given))
                rounds = args.rounds if against else 2
                try:  # in a process of its own, whose end for want of memory leaves the others
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        future = pool.submit(row, name, against, given, args.compiled, rounds)
                        rows.append(future.result())
                except Exception as error:  # one that cannot be measured
                    print(name, against, given, type(error).__name__, error, file=sys.stderr, flush=True)
                    continue
                if args.save:
                    with args.save.open("a") as file:
                        print(json.dumps(rows[-1]), file=file)
                forward, both = (rows[-1][part][0][0] for part in ("forward", "both"))
                print(name, against, given, forward, both, file=sys.stderr, flush=True)
                break
    order = {name: number for number, name in enumerate(zoo())}
    rows.sort(key=lambda row: order[row["module"]])
    print("\n".join(table(rows, args.compiled)))
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
