"""Say what images show, and draw where the model looks."""

import csv
import json
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn

from visattn.checkpoint import load
from visattn.commands import show
from visattn.data.sources import IMAGES, Folder
from visattn.data.transforms import Preprocess
from visattn.models.looker import Looker
from visattn.record import record
from visattn.surgery import insertions


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder that `save` or training has written, or Lightning's .ckpt")
    parser.add_argument(
        "images", type=Path, nargs="+", help="images, or folders of images, at any depth", metavar="image"
    )
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="classes listed for an image (default: 5)")
    parser.add_argument(
        "--maps", type=Path, metavar="FOLDER", help="draw maps, warps and paths as PNG, in a folder for each image"
    )
    parser.add_argument(
        "--film", action="store_true", help="with --maps, film the path of a model that looks here and there, as GIF"
    )
    parser.add_argument(
        "--query",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="pixel of the model's view whose reading is drawn where every position reads others (default: the centre)",
    )
    add_backbone(parser)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write file, rank, label and probability to a table")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    parser.add_argument(
        "--batch", type=positive, default=16, metavar="N", help="images at once; with --maps one (default: 16)"
    )


def add_backbone(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="where the weights of the backbone are, such as local-dir:FOLDER, for a checkpoint that only names them",
    )


def find(paths: list[Path]) -> dict[Path, str]:
    """Return the images at some paths, those of a folder in the order of their names, and what each is called there."""
    found: dict[Path, str] = {}
    for path in paths:
        if path.is_file():
            found[path] = path.name
            continue
        if not path.is_dir():
            raise FileNotFoundError(f"images must be files or folders, {path} does not exist")
        names = sorted(Folder(path).images())
        if not names:
            raise ValueError(f"{path} holds no image, which is a file ending in {', '.join(IMAGES)}")
        found |= {path / name: name for name in names}
    return found


def unlike(names: dict[Path, str]) -> None:
    """Refuse images that would be drawn into the same file."""
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ValueError(f"images must have names of their own for maps, {twice[0]} is there several times")


def batches(
    paths: list[Path], transform: Preprocess, size: int, skipped: list[Path]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield images as the model takes them; one that cannot be read is named and skipped."""
    ready: list[tuple[Path, Tensor]] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                ready.append((path, transform(image)))
        except Exception as error:  # decoders raise whatever they like
            skipped.append(path)
            print(f"skipped {path}: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        if len(ready) == size or (ready and path == paths[-1]):
            yield [path for path, _ in ready], torch.stack([x for _, x in ready])
            ready = []


def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """Return a probability for each image and class: of each on its own where an image may have several labels.

    Of a network that names several targets, one after another, for each of them.
    """
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 + (getattr(model, "targets", 1) > 1):
        raise ValueError("checkpoint must be of a classifier, which gives one logit for each class")
    if not logits.isfinite().all():
        raise ValueError("checkpoint gives logits that are NaN or infinite")
    several = (getattr(model, "task", None) or "").startswith("multi-label")
    return logits.float().sigmoid() if several else logits.float().softmax(-1)


def run(args: Namespace) -> int:
    if args.film and not args.maps:
        raise ValueError("film must be left out without maps, which says where to")
    names = find(args.images)
    if args.maps:
        unlike(names)
    paths = list(names)
    model: Any = load(args.checkpoint, backbone=args.backbone, device=args.device)
    if model.task == "verification":
        raise ValueError(f"checkpoint must be of a classifier, {args.checkpoint} compares two images")
    if model.transform is None:
        raise ValueError(f"{args.checkpoint} does not say how images are prepared for the model")
    skipped: list[Path] = []
    undrawn: set[str] = set()
    # maps between all positions are large, and those of windows look like a batch
    size = 1 if args.maps else args.batch
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if args.csv:
            table = csv.writer(stack.enter_context(args.csv.open("w", newline="", encoding="utf-8")))
            table.writerow(["file", "rank", "label", "probability"])
        for files, x in batches(paths, model.transform, size, skipped):
            recording: AbstractContextManager[dict[str, Any]] = record(model) if args.maps else nullcontext({})
            with recording as maps:
                likely = probabilities(model, x.to(args.device)).cpu()
            one = likely.ndim == 2
            best = likely.sort(descending=True, stable=True) if one else likely.max(-1)
            top = args.top if one else likely.shape[1]
            for file, values, classes in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
                labels = [model.labels[k] if model.labels else str(k) for k in classes[:top]]
                found = list(zip(labels, values[:top], strict=True))
                result: dict[str, Any] = {
                    "file": str(file),
                    "predictions": [{"label": label, "probability": p} for label, p in found],
                }
                if args.maps:
                    folder, said = args.maps / names[file], found[:1] if one else found
                    title = f"{file.name}: {' '.join(label for label, _ in said)}"
                    title += f" {math.prod(p for _, p in said):.2f}{gates(model)}"
                    if isinstance(model, Looker):
                        result["maps"] = draw_looks(model, x.to(args.device), folder, title, args.film)
                    else:
                        photo, query = denormalised(x[0], model.transform), tuple(args.query) if args.query else None
                        result["maps"] = draw(photo, maps, folder, title, query, undrawn)
                if args.csv:
                    table.writerows([file, rank, label, p] for rank, (label, p) in enumerate(found, 1))
                if args.json:
                    print(json.dumps(result, ensure_ascii=False), flush=True)
                else:
                    print(file)
                    show([{"label": label, "probability": f"{p:.4f}"} for label, p in found], title="")
    if skipped:
        print(f"{len(skipped)} of {len(paths)} images could not be read and were skipped", file=sys.stderr)
    return 1 if skipped else 0


def gates(model: nn.Module) -> str:
    """Say by how much of what is drawn the gates let through, where there are any."""
    opened = [inserted.gate.item() for inserted in insertions(model) if inserted.gate is not None]
    return f"   gates {min(opened):.2f} to {max(opened):.2f}" if opened else ""


def denormalised(x: Tensor, transform: Preprocess) -> ndarray:
    """Return what the model saw, as bytes."""
    from visattn.drawing import denormalise

    return denormalise(x, transform.mean, transform.std)


def draw(
    photo: ndarray, maps: dict[str, Any], folder: Path, title: str, query: tuple[int, int] | None, undrawn: set[str]
) -> list[str]:
    """Write an overview of the maps of one image and each of them, and return the files.

    What cannot be drawn is said once for all images, and kept in ``undrawn``.
    """
    from visattn.drawing import draw_maps, drawable, overview

    good, bad = drawable(maps, photo.shape[:2])
    why = bad if maps else {"": "the model has no attention"}
    for name in why.keys() - undrawn:
        print(f"not drawn: {why[name]}", file=sys.stderr)
    undrawn.update(why)
    files = [folder / "overview.png", *draw_maps(photo, good, folder, query=query)]
    overview(photo, good, title=title, query=query).savefig(files[0])
    return [str(file) for file in files]


def draw_looks(model: Looker, x: Tensor, folder: Path, title: str, films: bool) -> list[str]:
    """Write where a model looks in one image, and return the files."""
    from visattn.drawing import draw_path, film_path, follow

    (path,) = follow(model, x)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "path.png"]
    draw_path(path, title=title).savefig(files[0])
    if films:
        files.append(film_path(path, folder / "path.gif", title=title))
    return [str(file) for file in files]
