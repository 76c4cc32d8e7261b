"""Does attention explain? Measures of maps, each with what it is to be compared with."""

from visattn.explain.adversary import Adversary, adversary
from visattn.explain.controls import Difference, between, even, permutation, shuffled, uniform
from visattn.explain.curves import Curve, blended, deletion, emptied, enlarged, insertion
from visattn.explain.distance import jensen_shannon, kendall, total_variation
from visattn.explain.prediction import Prediction, spatial
from visattn.explain.replacing import replaced
from visattn.explain.report import MEASURES, Explanation, Finding, explain, leave_one_out
from visattn.explain.subject import Subject
from visattn.explain.word import FUNCTION, Word, looking
from visattn.metrics.pointing import pointing

__all__ = [
    "FUNCTION",
    "MEASURES",
    "Adversary",
    "Curve",
    "Difference",
    "Explanation",
    "Finding",
    "Prediction",
    "Subject",
    "Word",
    "adversary",
    "between",
    "blended",
    "deletion",
    "emptied",
    "enlarged",
    "even",
    "explain",
    "insertion",
    "jensen_shannon",
    "kendall",
    "leave_one_out",
    "looking",
    "permutation",
    "pointing",
    "replaced",
    "shuffled",
    "spatial",
    "total_variation",
    "uniform",
]
