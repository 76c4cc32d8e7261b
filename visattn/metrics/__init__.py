"""Metrics of captions that need no Java: BLEU, ROUGE-L, CIDEr and CIDEr-D, and how captions are cut into words."""

from visattn.metrics.bleu import Bleu, Counts, bleu, bleu_from_counts
from visattn.metrics.captions import Caption, Scores
from visattn.metrics.cider import Cider, CiderD, Frequencies, cider, cider_d, document_frequencies
from visattn.metrics.evaluation import evaluate, evaluate_by_length
from visattn.metrics.java import meteor, spice
from visattn.metrics.rouge import rouge_l
from visattn.metrics.tokens import tokenise

__all__ = [
    "Bleu",
    "Caption",
    "Cider",
    "CiderD",
    "Counts",
    "Frequencies",
    "Scores",
    "bleu",
    "bleu_from_counts",
    "cider",
    "cider_d",
    "document_frequencies",
    "evaluate",
    "evaluate_by_length",
    "meteor",
    "rouge_l",
    "spice",
    "tokenise",
]
