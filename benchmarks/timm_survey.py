"""Look for the places in every architecture of timm, on the meta device: about 20 minutes of one core.

    python -m benchmarks.timm_survey > docs/timm_survey.md

Nothing is computed and no weight is read. A row an architecture: how many sites the stages, the blocks and the residual
branches have, in which layouts, or why there are none.
"""

import logging
import sys
import time
from collections import Counter

import timm
import torch

from visattn import sites
from visattn.surgery import SurgeryError

PLACES = ("stages", "blocks", "residual")


def survey(name: str) -> list[str]:
    with torch.device("meta"):
        model = timm.create_model(name)
    cells = []
    for at in PLACES:
        try:
            found = sites(model, at)
        except SurgeryError as error:
            cells.append(str(error).replace("|", "/"))
        else:
            cells.append(f"{len(found)} {'/'.join(sorted({site.layout for site in found}))}")
    return cells


def main(names: list[str]) -> None:
    logging.disable(logging.WARNING)  # the notes on coarser places
    names = names or timm.list_models()
    usable: Counter[str] = Counter()
    start = time.perf_counter()
    print(f"# Places in {len(names)} architectures of timm {timm.__version__}\n")
    print(f"| architecture | {' | '.join(PLACES)} |\n|---|---|---|---|")
    for index, name in enumerate(names):
        try:
            cells = survey(name)
        except Exception as error:  # the survey goes on: an architecture that cannot be built is a row
            cells = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"] * len(PLACES)
        usable.update(at for at, cell in zip(PLACES, cells, strict=True) if cell[0].isdigit())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print(f"\r{index + 1} of {len(names)}", end="", file=sys.stderr)
    counts = ", ".join(f"{at} in {usable[at]}" for at in PLACES)
    print(f"\nUsable of {len(names)}: {counts}. {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main(sys.argv[1:])
