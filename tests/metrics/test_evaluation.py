import numpy as np
import pytest

from tests.metrics.captions import drawn
from visattn.metrics import bleu, cider, cider_d, document_frequencies, evaluate, evaluate_by_length, rouge_l

BLEU = [f"bleu_{n}" for n in (1, 2, 3, 4)]


def test_is_the_scores_of_each_metric():
    hypotheses, references = drawn(0)
    found = evaluate(hypotheses, references, ["cider_d", "bleu", "cider"])
    assert list(found) == ["cider_d", *BLEU, "cider"]
    assert [found[name] for name in BLEU] == bleu(hypotheses, references).corpus.tolist()
    assert found["cider_d"] == cider_d(hypotheses, references).corpus
    assert found["cider"] == cider(hypotheses, references).corpus
    assert list(evaluate(hypotheses, references)) == [*BLEU, "rouge_l", "cider_d"]


def test_strings_are_tokenised_and_lists_are_not():
    text = evaluate(["A dog's ball."], [["a dog 's ball"]])
    assert text["bleu_4"] == pytest.approx(1)
    assert evaluate([["A", "dog's", "ball."]], [["a dog 's ball"]])["bleu_1"] == pytest.approx(0)


def test_options_reach_their_metrics():
    hypotheses, references = ["a dog", "a b"], [["a dog runs"], ["c"]]
    table = document_frequencies([["a dog"], ["a cat"], ["a bird"], ["dogs"]])
    found = evaluate(hypotheses, references, ["cider", "cider_d"], frequencies=table)
    assert found["cider_d"] == cider_d(hypotheses, references, table).corpus != cider_d(hypotheses, references).corpus
    assert found["cider"] == cider(hypotheses, references, table).corpus
    short = [evaluate(["a dog"], [["a dog runs"]], ["bleu"], brevity=b)["bleu_2"] for b in (True, False)]
    assert short == pytest.approx([np.exp(-1 / 2), 1])


def test_by_length_groups_images_by_their_references():
    hypotheses = ["a", "a b c d e f", "a b", "a b c d"]
    references = [["a b", "a b c d"], ["a b"], ["a b c d e f"], ["a b c d"]]
    found = evaluate_by_length(hypotheses, references, [2, 3, 4], ["bleu", "rouge_l", "cider_d"])
    assert {name: group["images"] for name, group in found.items()} == {"to 2": 1, "to 3": 1, "to 4": 1, "above": 1}
    assert found["to 2"]["bleu_1"] == bleu([hypotheses[1]], [references[1]]).corpus[0]
    rare = cider_d(hypotheses, references).images
    assert [group["cider_d"] for group in found.values()] == pytest.approx([rare[1], rare[0], rare[3], rare[2]])


def test_by_length_the_groups_make_up_the_whole():
    hypotheses, references = drawn(1, images=40)
    found = evaluate_by_length(hypotheses, references, [1, 4, 5, 100])
    assert "above" not in found
    counts = [group["images"] for group in found.values()]
    assert sum(counts) == 40
    for name, whole in (("rouge_l", rouge_l), ("cider_d", cider_d)):
        mean = np.average([group[name] for group in found.values()], weights=counts)
        assert mean == pytest.approx(whole(hypotheses, references).corpus)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: evaluate(["a"], [["a"]], ["blue", "cider_d"]),
            "metrics must be among bleu, rouge_l, cider, cider_d, meteor, spice, got blue",
        ),
        (lambda: evaluate(["a"], ["a"]), "references must be a list of captions for each image, got 'a' for image 0"),
        (lambda: evaluate([], [["a"]]), "hypotheses must be one for each image of references, got 0 for 1"),
        (lambda: evaluate_by_length(["a"], [["a"]], []), r"edges must be one or more rising lengths, got \[\]"),
        (lambda: evaluate_by_length(["a"], [["a"]], [4, 4]), r"edges must be one or more rising lengths, got \[4, 4\]"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
