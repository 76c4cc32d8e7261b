"""Images per second out of loose files and out of shards: ``python -m benchmarks.shards``.

Photos of 500 × 375 (drawn: noise that is smooth, as JPEG) are written once as loose files and once as shards. Each is
gone through as in training (a crop of 224 × 224, mirrored, with other colours), with one, two and four workers; the
first batches, for which workers start, do not count. Prints a Markdown table: medians over rounds in which all take
turns. ``--drop`` has the system forget the files before each, which needs root, so that they come from the disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from visattn.data.images import Images
from visattn.data.shards import about_source, write
from visattn.data.sources import open_source

WORKERS = (1, 2, 4)


def photos(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for k in range(count):
        coarse = rng.integers(0, 255, (24, 32, 3), np.uint8)
        photo = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC)
        file = folder / f"train/{k % 10}/{k:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), photo + rng.integers(0, 12, photo.shape, np.uint8))


def speed(root: Path, workers: int, batch_size: int, epoch: int) -> float:
    """Images per second in an epoch, after as many batches as workers have in advance."""
    loader = Images(str(root), workers=workers, batch_size=batch_size, val_fraction=0.05).train_dataloader()
    sampler: Any = loader.sampler
    sampler.set_epoch(epoch)
    batches = iter(loader)
    for _ in range(2 * workers + 1):
        next(batches)
    start, count = time.perf_counter(), sum(len(images) for images, _ in batches)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--drop", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        roots = {"loose files": Path(temporary, "loose"), "shards": Path(temporary, "shards")}
        photos(roots["loose files"], args.count)
        source, start = open_source(str(roots["loose files"])), time.perf_counter()
        told = {"told": lambda split, k: {}, "megabytes": args.megabytes}
        for _ in write(roots["shards"], source.splits, about=about_source(source), **told):
            pass
        took = time.perf_counter() - start
        size = sum(file.stat().st_size for file in roots["shards"].iterdir())
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        for epoch, workers, name in product(range(args.rounds), WORKERS, roots):
            if args.drop:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3")
            found[name, workers].append(speed(roots[name], workers, args.batch_size, epoch))
    print(f"{args.count} photos, {size / 1e6:.0f} MB, written to shards at {args.count / took:.0f} images/s\n")
    print("| workers |", " | ".join(f"{name}, images/s" for name in roots), "| ratio |")
    print("|---|" + "---|" * (len(roots) + 1))
    for workers in WORKERS:
        loose, packed = (statistics.median(found[name, workers]) for name in roots)
        print(f"| {workers} | {loose:.0f} | {packed:.0f} | {packed / loose:.2f} |")


if __name__ == "__main__":
    main()
