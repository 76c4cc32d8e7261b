"""Ask in how far the maps of a model explain what it says of images."""

import csv
import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor

from visattn.checkpoint import description, load
from visattn.commands import show
from visattn.commands.caption import complete
from visattn.commands.predict import add_backbone, batches, denormalised, find, positive, probabilities, unlike
from visattn.data.transforms import as_seen
from visattn.explain import (
    FUNCTION,
    MEASURES,
    Explanation,
    Finding,
    Prediction,
    Subject,
    Word,
    between,
    explain,
    kendall,
    looking,
    pointing,
    shuffled,
    spatial,
)
from visattn.explain.curves import Baseline
from visattn.explain.report import By
from visattn.explain.subject import Gradient
from visattn.models.captioner import Captioner

SAID = {
    "deletion": "probability, greatest taken first: low is good",
    "insertion": "probability, greatest put in first: high is good",
    "gradient": "τ with gradients",
    "leave-one-out": "τ with leaving regions out",
    "permutation": "output moves by, where weights are shuffled",
    "uniform": "output moves by, where weights are uniform",
    "adversary": f"divergence of an adversary, of at most {math.log(2):.3f}",
    "pointing": "points into a box",
    "seed divergence": "divergence from the map of the other model",
    "seed agreement": "τ with the map of the other model",
}
COLUMNS = {"of_map": "map", "of_shuffled": "shuffled", "of_uniform": "uniform", "of_centre": "centre"}
FADES = {"uniform": "fading"}  # what becomes of an image that is taken away everywhere alike
Boxes = dict[str, list[tuple[str, list[float]]]]


class Asked(NamedTuple):
    """What is explained."""

    label: str
    file: str
    """What its picture is called."""
    group: str
    """With what it is averaged."""
    subject: Subject
    other: Subject | None
    """The same of another model."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder that `save` or training has written, or Lightning's .ckpt")
    parser.add_argument(
        "images", type=Path, nargs="+", help="images, or folders of images, at any depth", metavar="image"
    )
    parser.add_argument(
        "--target", help="the class, or the word of the caption, that is explained (default: the likeliest; all words)"
    )
    parser.add_argument(
        "--module",
        metavar="NAME",
        help="whose map: its name or a pattern of several, of a classifier as `record` has it, of a captioner as its "
        "decoder has it (default: the last of at least 4×4 regions)",
    )
    parser.add_argument(
        "--measures", nargs="+", choices=MEASURES, default=MEASURES, metavar="MEASURE", help=", ".join(MEASURES)
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="draw maps and curves as PNG")
    parser.add_argument(
        "--boxes",
        type=Path,
        metavar="FILE",
        help="table of image, x0, y0, x1, y1 and label, in pixels of the photos: does the map point at what is named?",
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="PIXELS", help="by which a box may be missed (default: 0)"
    )
    parser.add_argument("--against", metavar="CHECKPOINT", help="the same model of another seed, to compare maps with")
    add_backbone(parser)
    parser.add_argument(
        "--baseline",
        choices=get_args(Baseline),
        default="mean",
        help="what takes the place of what is taken away (default: mean, the colour)",
    )
    parser.add_argument(
        "--by",
        choices=get_args(By),
        help="what is taken away: pixels, or regions of the map, for captions of the decoder's memory (default: pixels "
        "for classes, regions for captions)",
    )
    parser.add_argument("--gradient", choices=get_args(Gradient), default="norm", help="what of it counts")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="of a curve (default: 20)")
    parser.add_argument("--epsilon", type=float, default=0.01, help="by which an adversary may move the output")
    parser.add_argument("--seed", type=int, default=0, help="of chance (default: 0)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each map")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")


def run(args: Namespace) -> int:
    names = find(args.images)
    if args.save or args.boxes:
        unlike(names)
    boxes = read_boxes(args.boxes) if args.boxes else {}
    model = ready(args.checkpoint, args)
    other = None if args.against is None else ready(args.against, args)
    if other is not None and (type(other), other.transform) != (type(model), model.transform):
        raise ValueError(f"against must be the same model of another seed, {args.against} is another model")
    skipped: list[Path] = []
    found: dict[str, list[dict[str, Finding]]] = {}
    for (file,), x in batches(list(names), model.transform, 1, skipped):
        image = x[0].to(args.device)
        for asked in questions(model, other, image, args):
            placed = inside(boxes, names[file], asked.label, file, model.transform)
            explained = explain(
                asked.subject,
                args.measures,
                baseline=args.baseline,
                by=args.by or ("pixels" if asked.subject.pictured else "regions"),
                steps=args.steps,
                epsilon=args.epsilon,
                gradient=args.gradient,
                seed=args.seed,
            )
            findings = explained.findings | pointed(asked.subject, placed, args.tolerance) | compared(asked, args.seed)
            found.setdefault(asked.group, []).append(findings)
            result: dict[str, Any] = {
                "file": str(file),
                "label": asked.label,
                "probability": asked.subject.probability,
                "map": asked.subject.name,
                "findings": {name: plain(each) for name, each in findings.items()},
            }
            title = f"{file.name}: {asked.label} {result['probability']:.2f}   {asked.subject.name}"
            if args.save:
                folder = args.save / names[file]
                result["picture"] = draw(asked, explained, placed, model.transform, folder, title, args.epsilon)
            if args.json:
                print(json.dumps(result, ensure_ascii=False), flush=True)
            else:
                table(findings, f"{file}: {asked.label} {result['probability']:.4f}, {asked.subject.name}")
    if not args.json:
        for group, several in found.items():
            if len(several) > 1:
                table(mean(several), f"mean of {len(several)}: {group}")
    if skipped:
        print(f"{len(skipped)} of {len(names)} images could not be read and were skipped", file=sys.stderr)
    return 1 if skipped else 0


def ready(checkpoint: str, args: Namespace) -> Any:
    """Return a model that can be asked."""
    wanted = args.against is None or "backbone" in description(checkpoint)  # of two, one may hold its backbone itself
    model: Any = load(checkpoint, backbone=args.backbone if wanted else None, device=args.device)
    if isinstance(model, Captioner):
        complete(model, checkpoint)
    elif model.transform is None:
        raise ValueError(f"{checkpoint} does not say how images are prepared for the model")
    elif model.task in ("verification", "question answering"):
        raise ValueError(f"checkpoint must be of a classifier or a captioner, {checkpoint} is of {model.task}")
    return model.requires_grad_(False)


def questions(model: Any, other: Any, image: Tensor, args: Namespace) -> Iterator[Asked]:
    """Yield what is to be explained of an image."""
    if isinstance(model, Captioner):
        yield from of_words(model, other, image, args)
        return
    with torch.no_grad():
        likely = probabilities(model, image[None])
    if likely.ndim != 2:
        raise ValueError("checkpoint must be of a classifier that names one class for an image")
    labels = model.labels or [str(k) for k in range(likely.shape[1])]
    if args.target is not None and args.target not in labels:
        raise ValueError(f"target must be a class ({', '.join(labels[:20])}), got {args.target!r}")
    target = int(likely[0].argmax()) if args.target is None else labels.index(args.target)
    chosen: list[str | None] = [None]
    if args.module is not None:
        chosen = [name for name in spatial(model, image) if fnmatchcase(name, args.module)] or [args.module]
    for name in chosen:
        subject = Prediction(model, image, name=name, target=target)
        same = None if other is None else Prediction(other, image, name=subject.name, target=target)
        yield Asked(labels[target], f"{labels[target]} {subject.name}", subject.name, subject, same)


def of_words(model: Any, other: Any, image: Tensor, args: Namespace) -> Iterator[Asked]:
    if other is not None and other.vocabulary != model.vocabulary:
        raise ValueError(f"against must know the same words, {args.against} knows others")
    with torch.no_grad():
        found = model.caption(image[None], width=3, alpha=0.7, longest=20)
    words = found.words[0, 0, : found.lengths[0, 0]]
    names = [model.vocabulary.word(number) for number in words.tolist()]
    if args.target is not None and args.target not in names:
        raise ValueError(f"target must be a word of the caption, {' '.join(names)!r}, got {args.target!r}")
    looks = looking(model.decoder)
    chosen: list[str | None] = [None]
    if args.module is not None:
        chosen = [name for name in looks if fnmatchcase(name, args.module)] or [args.module]
    for place, (number, label) in enumerate(zip(words.tolist(), names, strict=True)):
        if label != args.target and (args.target is not None or number == model.vocabulary.end):
            continue
        kind = "words that hold a sentence together" if label in FUNCTION else "words of content"
        for name in chosen:
            subject = Word(model, image, words, place, name=name)
            same = None if other is None else Word(other, image, words, place, name=subject.name)
            group = kind if args.module is None else f"{kind}, {subject.name}"
            yield Asked(label, f"{place:02d} {label} {subject.name}", group, subject, same)


def read_boxes(file: Path) -> Boxes:
    """Return the boxes of a table, by image."""
    found: Boxes = {}
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        if missing := {"image", "x0", "y0", "x1", "y1", "label"} - set(rows.fieldnames or ()):
            raise ValueError(
                f"{file} must have columns image, x0, y0, x1, y1, label; {', '.join(sorted(missing))} missing"
            )
        for number, row in enumerate(rows, 2):
            try:
                box = [float(row[side]) for side in ("x0", "y0", "x1", "y1")]
            except (TypeError, ValueError):
                raise ValueError(f"{file}, line {number}: x0, y0, x1, y1 must be numbers") from None
            if not (box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"{file}, line {number}: a box must have x0 < x1 and y0 < y1, got {box}")
            found.setdefault(row["image"], []).append((row["label"], box))
    return found


def inside(boxes: Boxes, name: str, label: str, file: Path, transform: Any) -> Tensor:
    """Return where what is named lies in what the model sees."""
    here = [box for called, box in boxes.get(name) or boxes.get(file.name, []) if called == label]
    if not here:
        return torch.zeros(0, 4)
    with Image.open(file) as photo:
        width, height = as_seen(photo, 3).size
    return transform.boxes(torch.tensor(here), (height, width))


def pointed(subject: Subject, boxes: Tensor, tolerance: float) -> dict[str, Finding]:
    """Say whether a map points into a box, how often chance does, and whether the centre of the image does."""
    if not len(boxes):
        return {}
    size = (subject.image.shape[1], subject.image.shape[2])
    even, centre = torch.ones(subject.size), torch.ones(1, 1)
    hits = [pointing(each, boxes, size, tolerance=tolerance) for each in (subject.map.cpu(), even, centre)]
    return {"pointing": Finding(hits[0], hits[1], None, hits[2])}


def compared(asked: Asked, seed: int) -> dict[str, Finding]:
    """Say how far a map is from that of the other model, and how far that one is when it is shuffled."""
    if asked.other is None:
        return {}
    a, b = asked.subject.map, asked.other.map
    chance = torch.Generator().manual_seed(seed)
    drawn = [each.view(b.shape) for each in shuffled(b.flatten(), 20, chance)]
    if min(a.min(), b.min()) < 0 or not (a.any() and b.any()):  # no shares that may diverge
        orders = [kendall(a, each) for each in drawn]
        return {"seed agreement": Finding(kendall(a, b), math.fsum(orders) / len(orders))}
    others = [between(a, each) for each in drawn]
    names = {"seed divergence": "divergence", "seed agreement": "agreement"}
    return {
        name: Finding(getattr(between(a, b), field), math.fsum(getattr(each, field) for each in others) / len(others))
        for name, field in names.items()
    }


def plain(finding: Finding) -> dict[str, float | None]:
    """Return what there is of a finding, for programs; a rank correlation without ranks is none."""
    there = {COLUMNS[name]: value for name, value in finding._asdict().items() if value is not None}
    return {name: value if math.isfinite(value) else None for name, value in there.items()}


def mean(several: Sequence[dict[str, Finding]]) -> dict[str, Finding]:
    """Return the mean of findings, each over those where it is there."""
    found = {}
    for name in dict.fromkeys(name for each in several for name in each):
        columns = zip(*(each[name] for each in several if name in each), strict=True)
        there = [[value for value in column if value is not None and math.isfinite(value)] for column in columns]
        found[name] = Finding(*(math.fsum(values) / len(values) if values else None for values in there))
    return found


def table(findings: dict[str, Finding], title: str) -> None:
    """Print findings, with a column for each kind of control there is."""
    there = [name for name in COLUMNS if any(getattr(each, name) is not None for each in findings.values())]
    rows = []
    for name, finding in findings.items():
        values = {COLUMNS[column]: getattr(finding, column) for column in there}
        said = {
            key: "" if value is None else "–" if math.isnan(value) else f"{value:.3f}" for key, value in values.items()
        }
        rows.append({"measure": SAID[name], **said})
    if rows:
        show(rows, title=title)
    else:
        print(title)


def draw(
    asked: Asked, explained: Explanation, boxes: Tensor, transform: Any, folder: Path, title: str, epsilon: float
) -> str:
    """Write the picture of an explanation, and return the file."""
    from visattn.drawing.explanation import draw_explanation

    subject = asked.subject
    maps = {f"map, {subject.size[0]}×{subject.size[1]}": subject.map}
    if explained.adversary is not None:
        far = explained.adversary
        name = f"moves the output by {far.moved:.3f}\nand is {far.divergence:.3f} away"
        maps[name] = far.weights.mean(0).view(subject.size)
    lines = {
        name: {FADES.get(of, of): (each.shares.cpu().numpy(), each.scores.cpu().numpy()) for of, each in curves.items()}
        for name, curves in explained.curves.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{''.join(c if c.isalnum() or c in '.-_' else '-' for c in asked.file)}.png"
    photo = denormalised(subject.image, transform)
    drawn = {name: each.detach().cpu().numpy() for name, each in maps.items()}
    draw_explanation(photo, drawn, lines, title=title, boxes=boxes.tolist()).savefig(file)
    return str(file)
