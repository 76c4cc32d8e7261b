"""Say in a sentence what images show, and draw where each word was read."""

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visattn.checkpoint import load
from visattn.commands import show
from visattn.commands.predict import add_backbone, batches, denormalised, find, positive, unlike
from visattn.models.captioner import Captioner


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder that `save` or training has written, or Lightning's .ckpt")
    parser.add_argument(
        "images", type=Path, nargs="+", help="images, or folders of images, at any depth", metavar="image"
    )
    parser.add_argument(
        "--beam", type=positive, default=3, metavar="K", help="beginnings that are kept in the search (default: 3)"
    )
    parser.add_argument("--longest", type=positive, default=20, metavar="N", help="words at most (default: 20)")
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.7,
        help="by which power of its length a sentence's log-probability is divided (default: 0.7)",
    )
    parser.add_argument("--all", action="store_true", help="print all sentences of the beam, the best first")
    parser.add_argument(
        "--maps", type=Path, metavar="FOLDER", help="draw where each word was read, a PNG for each image"
    )
    add_backbone(parser)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="images at once (default: 16)")


def run(args: Namespace) -> int:
    if not math.isfinite(args.alpha):
        raise ValueError(f"alpha must be finite, got {args.alpha}")
    names = find(args.images)
    if args.maps:
        unlike(names)
    model: Any = load(args.checkpoint, backbone=args.backbone, device=args.device)
    if not issubclass(type(model), Captioner):
        raise ValueError(f"checkpoint must be of a captioner, {args.checkpoint} is of {type(model).__name__}")
    complete(model, args.checkpoint)
    skipped: list[Path] = []
    with torch.inference_mode():
        for files, x in batches(list(names), model.transform, args.batch, skipped):
            features = model.features(x.to(args.device))
            size = (features.shape[2], features.shape[3])
            options = {"width": args.beam, "longest": args.longest, "alpha": args.alpha}
            found = model.say(model.ready(features), **options)
            if not found.scores[:, 0].isfinite().all():
                raise ValueError("checkpoint says sentences whose log-probability is NaN or infinite")
            for k, file in enumerate(files):
                said = [
                    {"caption": model.vocabulary.decode(words.tolist()), "log_probability": log_prob.item()}
                    for words, log_prob, score in zip(found.words[k], found.log_probs[k], found.scores[k], strict=True)
                    if score.isfinite()
                ][: None if args.all else 1]
                result: dict[str, Any] = {"file": str(file), "captions": said}
                if args.maps:
                    result["maps"] = draw(model, x[k], found, k, size, args.maps / names[file])
                if args.json:
                    print(json.dumps(result, ensure_ascii=False), flush=True)
                else:
                    print(file)
                    rows = [{"caption": e["caption"], "log-probability": f"{e['log_probability']:.2f}"} for e in said]
                    show(rows, title="")
    if skipped:
        print(f"{len(skipped)} of {len(names)} images could not be read and were skipped", file=sys.stderr)
    return 1 if skipped else 0


def complete(model: Any, checkpoint: str) -> None:
    """Refuse a captioner whose checkpoint leaves something out."""
    if model.transform is None or model.vocabulary is None:
        lacks = "how images are prepared for the model" if model.transform is None else "which words there are"
        raise ValueError(f"{checkpoint} does not say {lacks}")


def draw(model: Any, x: Tensor, found: Any, k: int, size: tuple[int, int], file: Path) -> str | None:
    """Write where each word of the best sentence about an image was read, and return the file."""
    from visattn.drawing.words import draw_words

    if found.maps is None:
        print("not drawn: the decoder looks nowhere", file=sys.stderr)
        return None
    maps = getattr(found.maps, "probabilities", found.maps)[k, 0, : found.lengths[k, 0]].float()
    weights = maps.flatten(1, -2).mean(1) if maps.ndim > 2 else maps  # the mean of its heads
    words = [model.vocabulary.word(number) for number in found.words[k, 0, : found.lengths[k, 0]].tolist()]
    file = file.with_name(f"{file.name}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    title = model.vocabulary.decode(found.words[k, 0].tolist())
    draw_words(denormalised(x, model.transform), words, weights.cpu().numpy(), size, title=title).savefig(file)
    return str(file)
