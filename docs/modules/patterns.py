"""Draw docs/modules/patterns.png: ``python docs/modules/patterns.py``."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from visattn import (
    AxialAttention,
    CrissCrossAttention,
    DilatedSelfAttention,
    LocalSelfAttention,
    StridedSelfAttention,
)
from visattn.drawing import draw_patterns

GRID, QUERY = (8, 10), (4, 6)


@torch.no_grad()
def figure() -> Figure:
    """The patterns of fresh modules on noise; a module in two steps or of two kinds of heads has two."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, *GRID)
    near, far = StridedSelfAttention(64).eval().attend(x).chunk(2, 1)
    down, along = AxialAttention(64, size=GRID).eval().attend(x)
    patterns = {
        "local\nwindow of 5": LocalSelfAttention(64, window=5).eval().attend(x),
        "dilated\nrate of 2": DilatedSelfAttention(64, rate=2).eval().attend(x),
        "strided\nfirst half of the heads": near,
        "strided\nsecond half of the heads": far,
        "axial\nfirst step": down,
        "axial\nsecond step": along,
        "criss-cross\neach step": CrissCrossAttention(64, recurrence=1).eval().attend(x),
    }
    return draw_patterns(patterns, GRID, query=QUERY)


if __name__ == "__main__":
    figure().savefig(Path(__file__).with_suffix(".png"))
