"""Write images, with labels or captions, as shards to train from, or check those that were written."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from visattn.data.captions import to_write
from visattn.data.shards import ABOUT, CAPTIONS, Shards, about_source, write
from visattn.data.sources import open_source


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="images as `data.root` takes them: a folder, an archive, or a known set; "
        "with --check, the folder or URL of shards",
    )
    parser.add_argument("dest", type=Path, nargs="?", help="the folder of shards; a run that was broken off goes on")
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="FILE",
        help="write images with captions, as `data.captions` takes them: one file, or train=FILE val=FILE test=FILE",
    )
    parser.add_argument("--directory", default="data", help="where a known set lies (default: data)")
    parser.add_argument("--megabytes", type=float, default=64.0, help="size of a shard (default: 64)")
    parser.add_argument("--check", action="store_true", help="compare every shard with its checksum")


def run(args: Namespace) -> int:
    if args.check:
        return check(args.source)
    if args.dest is None:
        raise ValueError("dest must be given, unless --check is")
    about: dict[str, Any] = {"labels": None}
    beside = {}
    if args.captions:
        pairs = [file.rpartition("=") for file in args.captions]
        files = {split: file for split, _, file in pairs} if pairs[0][0] or len(pairs) > 1 else args.captions[0]
        splits, captions, beside[CAPTIONS] = to_write(files, args.source)

        def told(split: str, index: int) -> dict[str, Any]:
            return {"captions": captions[int(splits[split].positions[index])]}
    else:
        source = open_source(args.source, directory=args.directory)
        splits, about = source.splits, about_source(source)

        def told(split: str, index: int) -> dict[str, Any]:
            target = splits[split].targets[index]
            shown = np.flatnonzero(target).tolist() if source.multi_label else [int(target)]
            return {"labels": [source.labels[k] for k in shown]}

    total = sum(len(split) for split in splits.values())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("images", total=total)
        for done in write(args.dest, splits, about=about, told=told, megabytes=args.megabytes, beside=beside):
            bar.update(task, completed=done)
    shards = Shards(str(args.dest)).about["shards"]
    size = sum(shard["bytes"] for shard in shards)
    print(f"{total:,} images in {len(shards):,} shards of together {size / 1e6:,.1f} MB are in {args.dest}")
    return 0


def check(root: str) -> int:
    """Name every shard that is not as it was written."""
    wrong = {name: why for name, why in Shards(root).check() if why}
    for name, why in wrong.items():
        print(f"{name}: {why}")
    shards = Shards(root).about["shards"]
    print(f"{len(shards) - len(wrong):,} of {len(shards):,} shards are as {ABOUT} says")
    return 1 if wrong else 0
