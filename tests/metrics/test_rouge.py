import numpy as np
import pytest

from tests.metrics.captions import drawn, ids
from visattn.metrics import rouge_l
from visattn.metrics.rouge import common


def table(first: list[str], second: list[str]) -> int:
    """The longest common subsequence by its table."""
    lengths = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if a == b else max(lengths[i, j + 1], lengths[i + 1, j])
    return int(lengths[-1, -1])


def loops(hypothesis: str, references: list[str]) -> float:
    """ROUGE-L by the definition."""
    words = hypothesis.split(" ")
    precision = max(table(words, r.split(" ")) / len(words) for r in references)
    recall = max(table(words, r.split(" ")) / len(r.split(" ")) for r in references)
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_is_the_definition(seed):
    hypotheses, references = drawn(seed)
    found = rouge_l(hypotheses, references)
    expected = [loops(*pair) for pair in zip(hypotheses, references, strict=True)]
    np.testing.assert_allclose(found.images, expected, rtol=1e-14)
    assert found.corpus == found.images.mean()


def test_a_subsequence_may_be_longer_than_a_machine_word():
    chance = np.random.default_rng(0)
    for _ in range(5):
        first, second = (chance.choice(list("abcd"), n).tolist() for n in (150, 90))
        assert common(first, second) == common(second, first) == table(first, second)


def test_precision_and_recall_may_be_those_of_different_references():
    found = rouge_l(["a b c x"], [["a b c d e f g h", "a"]]).corpus
    assert found == pytest.approx(2.44 * 0.75 / (1 + 1.44 * 0.75))


def test_the_order_of_words_matters_that_of_images_and_references_does_not():
    hypotheses, references = drawn(6)
    found = rouge_l(hypotheses, references)
    turned = rouge_l(hypotheses[::-1], [several[::-1] for several in references[::-1]])
    assert (turned.images[::-1] == found.images).all()
    assert rouge_l(["a b c"], [["c b a"]]).corpus < rouge_l(["a b c"], [["a b c"]]).corpus == pytest.approx(1)


def test_recall_weighs_more_so_the_roles_are_not_free():
    assert rouge_l(["a b c d"], [["a b"]]).corpus > rouge_l(["a b"], [["a b c d"]]).corpus


def test_no_words_score_nothing_against_words_and_a_list_is_its_string():
    assert rouge_l([""], [["a b"]]).corpus == rouge_l([[]], [[["a", "b"]]]).corpus == 0
    hypotheses, references = drawn(7)
    numbers = rouge_l([ids(h) for h in hypotheses], [[ids(r) or [""] for r in several] for several in references])
    expected = rouge_l(hypotheses, references).images
    assert (numbers.images == expected).all()


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="references must have a caption for each image, got none for image 1"):
        rouge_l(["a", "b"], [["a"], []])
