"""METEOR and SPICE, which are Java programs, through the package pycocoevalcap."""

import importlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from visattn.metrics.captions import Caption, Scores, check


def run(name: str, hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> tuple[float, Any]:
    """Return what a scorer of pycocoevalcap says of captions: the score of all, and something about each."""
    check(references, hypotheses)
    missing = [] if shutil.which("java") else ["the program java"]
    try:
        scorer = getattr(importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}"), name)
    except ImportError as error:
        missing.append(f"the package pycocoevalcap ({error})")
    if missing:
        raise RuntimeError(f"{name} needs Java and pycocoevalcap, missing: {' and '.join(missing)}")

    def line(caption: Caption) -> str:
        return " ".join(caption.split() if isinstance(caption, str) else map(str, caption))

    several = {k: [line(caption) for caption in captions] for k, captions in enumerate(references)}
    return scorer().compute_score(several, {k: [line(caption)] for k, caption in enumerate(hypotheses)})


def meteor(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
    """Compare captions by their words, stems and synonyms, with METEOR 1.5 through pycocoevalcap.

    Args:
        hypotheses: A caption of each image, of words.
        references: Captions of the same images, in the same order.

    Raises:
        RuntimeError: If Java or pycocoevalcap is missing; it says which.
        ValueError: If there is no image, one without references, or not a hypothesis for each.
    """
    corpus, images = run("Meteor", hypotheses, references)
    return Scores(float(corpus), np.array(images, np.float64))


def spice(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
    """Compare captions by the objects, attributes and relations they name, with SPICE through pycocoevalcap.

    Its first run downloads Stanford CoreNLP, about 400 MB, into the package. Arguments and errors as of
    :func:`meteor`.
    """
    corpus, images = run("Spice", hypotheses, references)
    return Scores(float(corpus), np.array([image["All"]["f"] for image in images], np.float64))
