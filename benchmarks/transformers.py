"""The tables of spatial transformers on digits: ``python -m benchmarks.transformers --directory data``.

Trains every cell by ``configs/transform_mnist.yaml``, so many at a time with one thread each, goes on where it was
stopped, and prints tables of errors on the 10,000 test digits with the weights of the last step. All models of a
column have about 400,000 parameters, so the classifiers behind a transformer are smaller.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.cells import Cell, shown, train

BUDGET = 400_000
COLUMNS = {  # the preset, pixels a side, and what is averaged behind a transformer
    "R": ("rotated", 28, 1),
    "RTS": ("rotated_scaled_translated", 42, 2),
    "P": ("projective", 28, 1),
    "E": ("elastic", 28, 1),
    "TC": ("cluttered_transformer", 60, 2),
}
ROWS = {
    "none": None,
    "affine": "AffineTransformer",
    "projective": "ProjectiveTransformer",
    "thin plate": "ThinPlateTransformer",
}
CONFIG = Path(__file__).parents[1] / "configs" / "transform_mnist.yaml"


def filters(size: int, row: str, pool: int) -> list[int]:
    """Return the filters with which classifier and transformer come closest to the number of parameters."""
    import visattn
    from visattn.models import DigitClassifier

    def count(second: int) -> int:
        network = DigitClassifier(size=(size, size), filters=(64, second), pool=pool)
        parts = [network] if ROWS[row] is None else [network, getattr(visattn, str(ROWS[row]))(1, view=size // 2)]
        return sum(p.numel() for part in parts for p in part.parameters())

    return [64, min(range(1, 200), key=lambda second: abs(count(second) - BUDGET))]


def cell(column: str, row: str, seed: int, steps: int) -> Cell:
    """Return a cell of the paper's table."""
    preset, size, pool = COLUMNS[column]
    pool = pool if ROWS[row] else 1
    options = [
        *("--data.preset", preset, "--seed_everything", str(seed), "--data.seed", str(seed)),
        *("--trainer.max_steps", str(steps), "--model.network.pool", str(pool)),
        *("--model.network.filters", json.dumps(filters(size, row, pool))),
        *("--model.attention", ROWS[row] or "null"),
        *(["--model.attention.view", str(size // 2)] if ROWS[row] else []),
        *(["--model.attention.span", "1.0"] if row == "thin plate" else []),
    ]
    return Cell(f"{column}-{row.replace(' ', '_')}-{steps}-{seed}", options)


def plates() -> Iterator[Cell]:
    """Yield the cells of the known experiment with thin plates: small networks, SGD, ten epochs."""
    common = [
        *("--data.preset", "rotated", "--data.batch_size", "64", "--model.network.filters", "[16, 32]"),
        *("--trainer.max_steps", "-1", "--trainer.max_epochs", "10", "--model.optimizer", "SGD"),
        *("--model.optimizer.lr", "0.01", "--model.optimizer.momentum", "0.5", "--model.optimizer.weight_decay", "0"),
        *("--model.warmup", "0"),
    ]
    for angle in (60, 90):
        rotated = [*common, "--data.rotate", str(angle)]
        yield Cell(f"plate-{angle}-none", [*rotated, "--model.attention", "null"])
        for points in (2, 3, 4, 5):
            for bounded in ("true", "false"):
                options = [
                    *("--model.attention", "ThinPlateTransformer", "--model.attention.view", "14"),
                    *("--model.attention.points", f"[{points}, {points}]", "--model.attention.span", "0.9"),
                    *("--model.attention.bounded", bounded),
                ]
                kind = "bounded" if bounded == "true" else "free"
                yield Cell(f"plate-{angle}-{points}-{kind}", [*rotated, *options])


def commands(cell: Cell, root: Path, again: list[str], directory: str) -> list[list[str]]:
    """Return what trains a cell, and then writes its error in percent and its parameters."""
    fit = [sys.executable, "-m", "visattn", "fit", "--config", str(CONFIG), "--data.directory", directory]
    fit += ["--data.download", "false", "--trainer.default_root_dir", str(root), *cell.options]
    fit += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    fit += ["--trainer.log_every_n_steps", "100", *again]
    evaluate = [sys.executable, "-m", "benchmarks.transformers", "--evaluate", str(root), "--directory", directory]
    return [fit, evaluate]


def evaluate(root: Path, directory: str) -> None:
    """Write the error of a trained cell on the test digits, in percent."""
    import torch
    import yaml

    import visattn
    from visattn.data.canvas import Canvas

    run = max(root.glob("version_*"))
    options = yaml.safe_load((run / "config.yaml").read_text())["data"]
    data = Canvas(**options | {"directory": directory, "batch_size": 500})
    data.setup()
    model = visattn.load(run / "model")
    wrong = total = 0
    with torch.inference_mode():
        for images, labels in data.test_dataloader():
            wrong += int((model(images).argmax(1) != labels).sum())
            total += len(labels)
    parameters = sum(p.numel() for p in model.parameters())
    (root / "result.json").write_text(json.dumps({"error": 100 * wrong / total, "parameters": parameters}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="data", help="where MNIST lies")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--plates", action="store_true", help="the experiment with thin plates, too")
    parser.add_argument("--runs", type=Path, default=Path("runs/transformers"), help="what was trained, or will be")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.evaluate, args.directory)
        return
    table = {
        (column, row): [cell(column, row, seed, args.steps) for seed in args.seeds]
        for column in args.columns
        for row in ROWS
    }
    cells = [several[k] for k in range(len(args.seeds)) for several in table.values()]
    cells += plates() if args.plates else []
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda one: train(one, args.runs, partial(commands, directory=args.directory)), cells))
    errors = {one.name: result["error"] for one, result in zip(cells, results, strict=True)}
    print(f"\n| error % | {' | '.join(args.columns)} |\n|---|{'---:|' * len(args.columns)}")
    for row in ROWS:
        columns = (shown([errors[one.name] for one in table[column, row]], 2) for column in args.columns)
        print(f"| {row} | {' | '.join(columns)} |")
    for name in (one.name for one in cells if one.name.startswith("plate")):
        print(f"{name}: {errors[name]:.2f}")


if __name__ == "__main__":
    main()
