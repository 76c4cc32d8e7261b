"""Which attention describes digits, and looks at what it names: ``python -m benchmarks.described``.

Trains every cell by ``configs/caption_quickstart.yaml``, so many at a time with one thread each, goes on where it was
stopped, and prints a table: the share of sentences that are exact, and of digits' names that were read in the digit,
on new test digits, as many as in training and more. Every attention stands in the decoder of Show, Attend and Tell,
additive attention in every decoder that takes it, and a decoder without attention beside them.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, shown, train

CONFIG = Path(__file__).parents[1] / "configs" / "caption_quickstart.yaml"
METRICS = ("test/exact", "test/grounded", "test_more/exact", "test_more/grounded")
Named = tuple[str, dict[str, Any]]
ADDITIVE: Named = ("AdditiveAttention", {"width": 64})
SIZES: dict[str, Any] = {"hidden": 128, "embedding": 64, "dropout": 0.0}
LAYERS: dict[str, Any] = {"width": 128, "dropout": 0.0}
ATTENTION: dict[str, Named] = {
    "additive": ADDITIVE,
    "general": ("MultiplicativeAttention", {"score": "general"}),
    "dot": ("MultiplicativeAttention", {"score": "dot"}),
    "concat": ("MultiplicativeAttention", {"score": "concat", "width": 64}),
    "location only": ("LocationAttention", {"size": [8, 12]}),
    "cosine": ("CosineAttention", {}),
    "local, predictive": ("LocalAttention", {"alignment": "predictive", "radius": 3, "width": 64}),
    "local, monotonic": ("LocalAttention", {"alignment": "monotonic", "radius": 3, "width": 64}),
    "location-sensitive": ("LocationSensitiveAttention", {"width": 64}),
    "location-sensitive, cumulative": ("LocationSensitiveAttention", {"width": 64, "cumulative": True}),
    "coverage": ("CoverageAttention", {"width": 64}),
    "scaled dot product, 1 head": ("MultiHeadAttention", {"heads": 1, "width": 64}),
    "scaled dot product, 4 heads": ("MultiHeadAttention", {"heads": 4, "width": 64}),
    "on attention": ("AttentionOnAttention", {"dropout": 0.0}),
    "hard": ("HardAttention", {}),
    "hierarchical": ("HierarchicalAttention", {}),
    "area": ("AreaMemoryAttention", {"width": 64}),
    "smoothed": ("SmoothedAttention", {"radius": 1}),
    "convolutional summary": ("ConvolutionalSummary", {"width": 64}),
    "variable": ("VariableAttention", {}),
    "attentive reader": ("AttentiveReader", {"width": 64}),
    "impatient reader": ("ImpatientReader", {"width": 64}),
    "addressable": ("AddressableMemory", {}),
}
DECODERS: dict[str, tuple[Named, Named | None]] = {
    "Luong": (("LuongDecoder", SIZES), ADDITIVE),
    "Up-Down": (("UpDownDecoder", SIZES), ADDITIVE),
    "adaptive, sentinel": (("AdaptiveDecoder", SIZES), ("SentinelAttention", {"width": 64})),
    "bidirectional": (("BidirectionalDecoder", SIZES | {"maxout": 64}), ADDITIVE),
    "transformer": (("TransformerDecoder", LAYERS | {"depth": 2, "heads": 4}), ADDITIVE),
    "convolutional": (("ConvolutionalDecoder", LAYERS | {"embedding": 64}), ADDITIVE),
    "dilated": (("DilatedDecoder", LAYERS), ADDITIVE),
    "feed-forward": (("FeedForwardDecoder", SIZES), ADDITIVE),
    "no attention": (("PooledDecoder", SIZES), None),
}


def cell(row: str, seed: int, further: list[str]) -> Cell:
    """Return a cell of the table."""
    decoder, attention = DECODERS.get(row) or (None, ATTENTION[row])  # the decoder of the configuration
    options = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    options += [] if decoder is None else ["--model.decoder", written(decoder)]
    options += ["--model.attention", "null" if attention is None else written(attention)]
    options += ["--model.width", "128"] if row == "dot" else []  # as many as the state that asks
    return Cell(f"{row.replace(', ', '-').replace(' ', '_')}-{seed}", [*options, *further])


def written(named: Named) -> str:
    """Return a class with its options as the command line takes it."""
    return json.dumps({"class_path": named[0], "init_args": named[1]})


def commands(cell: Cell, root: Path, again: list[str]) -> list[list[str]]:
    """Return what trains a cell, and then writes what it reaches on the test digits."""
    common = ["--config", str(CONFIG), "--trainer.default_root_dir", str(root), *cell.options]
    common += ["--trainer.enable_progress_bar", "false"]
    fit = [sys.executable, "-m", "visattn", "fit", *common, *again, "--trainer.limit_val_batches", "0"]
    test = [sys.executable, "-m", "benchmarks.described", "--test", str(root), *common, "--ckpt_path", "last"]
    return [fit, test]


def test(root: Path, args: list[str]) -> None:
    """Write what a trained cell reaches on the test digits."""
    from visattn.tasks.command_line import CommandLine

    metrics = CommandLine(["test", *args]).trainer.callback_metrics
    found = {name: float(metrics[name]) for name in METRICS if name in metrics}
    (root / "result.json").write_text(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--test"]:
        test(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[*ATTENTION, *DECODERS], choices=[*ATTENTION, *DECODERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/described"), help="what was trained, or will be")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="what all configurations have beside")
    args = parser.parse_args()
    cells = [cell(row, seed, args.options) for seed in args.seeds for row in args.rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda one: train(one, args.runs, commands), cells))
    print(
        "\n| | exact, % | grounded, % | exact, more digits, % | grounded, more digits, % |\n|---|---:|---:|---:|---:|"
    )
    for k, row in enumerate(args.rows):
        several = results[k :: len(args.rows)]
        columns = (shown([100 * found[name] for found in several if name in found], 1) for name in METRICS)
        print(f"| {row} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
