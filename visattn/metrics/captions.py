"""What metrics take and return: captions with the references of their images, and scores by image."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64

Caption: TypeAlias = str | Sequence[str | int]
"""Words with blanks between them, or a list of tokens: words, or their ids."""


class Scores(NamedTuple):
    """What a metric says of captions."""

    corpus: float
    """Of all together."""
    images: Float64[np.ndarray, "n"]
    """Of each."""

    @classmethod
    def mean(cls, images: Float64[np.ndarray, "n"]) -> "Scores":
        """Return the scores of images and their mean."""
        return cls(float(images.mean()), images)


def check(references: Sequence[Sequence[Caption]], hypotheses: Sequence[Caption] | None = None) -> None:
    """Say what is wrong with references or hypotheses.

    Raises:
        ValueError: If there is no image, one without a list of references, or not a hypothesis for each.
    """
    if not len(references):
        raise ValueError("references must be of at least one image, got none")
    for k, several in enumerate(references):
        if isinstance(several, str):
            raise ValueError(f"references must be a list of captions for each image, got {several!r} for image {k}")
        if not len(several):
            raise ValueError(f"references must have a caption for each image, got none for image {k}")
    if hypotheses is not None and len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses must be one for each image of references, got {len(hypotheses)} for {len(references)}"
        )
