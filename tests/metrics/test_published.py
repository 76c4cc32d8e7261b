"""Scores and agreement with people that others have published, on the texts that they used."""

import gzip
import json

import numpy as np
import pytest
from scipy.stats import kendalltau

from visattn.metrics import bleu, cider_d, evaluate, meteor, rouge_l, spice, tokenise
from visattn.metrics.tokens import PUNCTUATION

NAMES = {"Bleu_1": "bleu_1", "Bleu_2": "bleu_2", "Bleu_3": "bleu_3", "Bleu_4": "bleu_4"}
NAMES |= {"ROUGE_L": "rouge_l", "CIDEr": "cider_d"}


@pytest.fixture
def golden(shared):
    return shared / "data" / "caption_metrics"


@pytest.fixture
def flickr(shared):
    with gzip.open(shared / "data" / "flickr8k" / "dataset_flickr8k.json.gz") as file:
        return json.load(file)["images"]


def expected(golden, case: str, kind: str) -> dict[str, float]:
    scores = json.loads((golden / "expected_scores.json").read_text())[case][kind]
    return {NAMES[name]: value for name, value in scores.items() if name in NAMES}


def test_photos_described_by_people(golden, flickr):
    images = [[s["tokens"] for s in image["sentences"]] for image in flickr if image["split"] == "test"]
    found = evaluate([captions[0] for captions in images], [captions[1:5] for captions in images])
    assert found == pytest.approx(expected(golden, "flickr8k_test_human", "computed"), abs=1e-9)


def test_two_generated_sentences(golden):
    folder = golden / "nlg_eval"
    first, second, hypotheses = ((folder / f"{name}.txt").read_text().splitlines() for name in ("ref1", "ref2", "hyp"))
    found = evaluate(hypotheses, list(zip(first, second, strict=True)))
    assert found == pytest.approx(expected(golden, "nlg_eval", "published"), abs=6e-7)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_good_and_bad_captions(golden, kind):
    folder = golden / "clipscore"
    hypotheses, references = (
        json.loads((folder / f"{name}.json").read_text()) for name in (f"{kind}_captions", "refs")
    )
    found = evaluate(list(hypotheses.values()), [references[image] for image in hypotheses])
    assert found == pytest.approx(expected(golden, f"clipscore_{kind}", "published"), abs=5.1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "name"), [(meteor, "METEOR"), (spice, "SPICE")])
def test_good_captions_by_java(golden, metric, name):
    pytest.importorskip("pycocoevalcap")
    folder = golden / "clipscore"
    hypotheses, references = (json.loads((folder / f"{name}.json").read_text()) for name in ("good_captions", "refs"))
    right = [[" ".join(tokenise(caption)) for caption in references[image]] for image in hypotheses]
    score = json.loads((golden / "expected_scores.json").read_text())["clipscore_good"]["published"][name]
    found = metric([" ".join(tokenise(caption)) for caption in hypotheses.values()], right)
    assert found.corpus == pytest.approx(score, abs=1e-3)


def judged(golden, name: str) -> list[list[str]]:
    with gzip.open(golden / "flickr8k_judgements" / f"{name}.txt.gz", "rt") as file:
        return [line.split() for line in file]


def cut(caption: str) -> list[str]:
    """Words as the published figures have them: cut at blanks."""
    return [word for word in caption.lower().split() if word not in PUNCTUATION]


def agreement(captions, references, ratings, variant: str) -> list[float]:
    """Kendall's τ of BLEU-1 to BLEU-4, ROUGE-L and CIDEr with the ratings of captions, in percent."""
    hypotheses, references = [cut(caption) for caption in captions], [[*map(cut, several)] for several in references]
    scores = [*bleu(hypotheses, references).images.T]
    scores += [rouge_l(hypotheses, references).images, cider_d(hypotheses, references).images]
    each = [np.repeat(score, ratings.shape[1]) for score in scores]
    return [round(100 * float(kendalltau(score, ratings.ravel(), variant=variant).statistic), 2) for score in each]


@pytest.mark.slow
def test_agrees_with_experts_as_published(golden, flickr):
    captions = {image["filename"]: [s["raw"] for s in image["sentences"]] for image in flickr}
    rows = [row for row in judged(golden, "ExpertAnnotations") if row[1].split("#")[0] != row[0]]
    assert len(rows) == 5664
    asked = [captions[name][int(k)] for name, k in (row[1].split("#") for row in rows)]
    found = agreement(asked, [captions[row[0]] for row in rows], np.array([row[2:] for row in rows], int), "c")
    assert found == [32.34, 32.53, 31.49, 30.78, 32.31, 43.88]


@pytest.mark.slow
def test_agrees_with_the_crowd_as_published(golden, flickr):
    captions = {image["filename"]: [s["raw"] for s in image["sentences"]] for image in flickr}
    rows = judged(golden, "CrowdFlowerAnnotations")
    assert len(rows) == 47830
    asked = [captions[name][int(k)] for name, k in (row[1].split("#") for row in rows)]
    kept = {row[0]: list(captions[row[0]]) for row in rows}
    for row, caption in zip(rows, asked, strict=True):
        if caption in kept[row[0]]:
            kept[row[0]].remove(caption)
    assert np.bincount([len(several) for several in kept.values()]).tolist() == [0, 0, 0, 2, 719, 279]
    found = agreement(asked, [kept[row[0]] for row in rows], np.array([[float(row[2])] for row in rows]), "b")
    assert found == [17.94, 17.91, 17.00, 16.86, 19.90, 24.61]
