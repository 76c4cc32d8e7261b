"""List the places in a backbone where attention can go."""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from difflib import get_close_matches

import timm
import torch

from visattn.commands import show
from visattn.surgery import sites


def size(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split("x"))


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="name of a timm model, such as resnet50")
    parser.add_argument(
        "--at",
        action="append",
        help="stages, blocks, residual, inner, expanded, head, input, pool, convolutions, each with a slice if wanted, "
        "or a glob on module names; several times for several (default: stages)",
    )
    parser.add_argument(
        "--input-size", type=size, metavar="N", help="pixels: N, HxW or CxHxW (default: what the model was made for)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    if ":" not in args.model and not timm.is_model(args.model):  # a colon: hf-hub:…, local-dir:…
        close = get_close_matches(args.model, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {args.model!r}; the closest names are {', '.join(close) or 'none'}")
    at = args.at or ["stages"]
    with torch.device("meta"):
        model = timm.create_model(args.model)
    found = sites(model, at, input_size=args.input_size)
    if args.json:
        print(json.dumps([asdict(site) for site in found], indent=2))
    else:
        rows = [
            {
                "name": site.name if site.output is None else f"{site.name}[{site.output}]",
                "channels": site.channels,
                "H×W": f"{site.height}×{site.width}",
                "stride": site.stride,
                "layout": site.layout,
            }
            for site in found
        ]
        show(rows, title=f"{args.model}, {' and '.join(at)}")
    return 0
