import math
from collections import Counter

import numpy as np
import pytest

from tests.metrics.captions import drawn, ids
from visattn.metrics import Counts, bleu, bleu_from_counts


def grams(caption: str, n: int) -> Counter:
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def loops(pairs: list[tuple[str, list[str]]], brevity: bool) -> list[float]:
    """BLEU-1 to BLEU-4 of hypotheses and references together, by the definition."""
    length = reference = 0
    scores, product = [], 1.0
    for hypothesis, several in pairs:
        words = len(hypothesis.split())
        length += words
        reference += sorted((abs(len(r.split()) - words), len(r.split())) for r in several)[0][1]
    for n in range(1, 5):
        guessed = correct = 0
        for hypothesis, several in pairs:
            guessed += sum(grams(hypothesis, n).values())
            for gram, count in grams(hypothesis, n).items():
                correct += min(count, max(grams(r, n)[gram] for r in several))
        product *= (correct + 1e-15) / (guessed + 1e-9)
        scores.append(product ** (1 / n))
    ratio = (length + 1e-15) / (reference + 1e-9)
    return [s * math.exp(1 - 1 / ratio) if brevity and ratio < 1 else s for s in scores]


@pytest.mark.parametrize("brevity", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_is_the_definition(seed, brevity):
    hypotheses, references = drawn(seed)
    pairs = list(zip(hypotheses, references, strict=True))
    found = bleu(hypotheses, references, brevity=brevity)
    np.testing.assert_allclose(found.corpus, loops(pairs, brevity), rtol=1e-12)
    np.testing.assert_allclose(found.images, [loops([pair], brevity) for pair in pairs], rtol=1e-12)


def test_gives_the_published_scores_of_published_counts():
    guessed, correct = np.array([9893, 8893, 7893, 6893]), np.array([5732, 2510, 1043, 423])
    found = bleu_from_counts(Counts(np.array(9893), np.array(9855), guessed, correct))
    assert found.round(3).tolist() == [0.579, 0.404, 0.279, 0.191]
    shorter = Counts(np.array(2457), np.array(2465), np.array([2457, 2206, 1955, 1704]), np.array([1398, 567, 216, 79]))
    expected = [0.5671369597, 0.3811761495, 0.2519889252, 0.1649004914]
    np.testing.assert_allclose(bleu_from_counts(shorter), expected, atol=1e-10)
    assert (bleu_from_counts(shorter, brevity=False) > bleu_from_counts(shorter)).all()


def test_counts_add_over_parts_of_a_corpus():
    hypotheses, references = drawn(5)
    parts = [bleu(hypotheses[s], references[s]).counts.total() for s in (slice(5), slice(5, None))]
    whole = Counts(*(first + second for first, second in zip(*parts, strict=True)))
    assert (bleu_from_counts(whole) == bleu(hypotheses, references).corpus).all()


def test_the_order_of_images_and_of_references_is_free_and_the_roles_are_not():
    hypotheses, references = drawn(6)
    found = bleu(hypotheses, references)
    turned = bleu(hypotheses[::-1], [several[::-1] for several in references[::-1]])
    assert (turned.images[::-1] == found.images).all()
    assert (turned.corpus == found.corpus).all()
    first = [several[0] for several in references]
    there, back = bleu(hypotheses, [[r] for r in first]), bleu(first, [[h] for h in hypotheses])
    assert (there.counts.correct == back.counts.correct).all()
    assert not np.allclose(there.corpus, back.corpus)


def test_of_references_equally_close_the_shorter_counts():
    assert bleu(["a b c"], [["a b c d", "a b"]]).counts.reference.tolist() == [2]
    assert bleu(["a b c"], [["a b c d", "a"]]).counts.reference.tolist() == [4]


def test_an_n_gram_is_correct_as_often_as_one_reference_has_it():
    counts = bleu(["a a a a"], [["a a b", "a c a a", "a"]]).counts
    assert counts.correct.tolist() == [[3, 1, 0, 0]]
    assert counts.guessed.tolist() == [[4, 3, 2, 1]]


def test_no_words_score_nothing():
    found = bleu(["", "a b c d"], [["a b"], ["a b c d"]])
    assert found.images[0].tolist() == [0, 0, 0, 0]
    assert found.images[1] == pytest.approx(1, abs=1e-8)
    assert found.counts.guessed[0].tolist() == [0, 0, 0, 0]


def test_words_and_ids_score_the_same():
    hypotheses, references = drawn(7)
    numbers = bleu([ids(h) for h in hypotheses], [[ids(r) for r in several] for several in references])
    lists = bleu([h.split() for h in hypotheses], [[r.split() for r in several] for several in references])
    assert (numbers.images == bleu(hypotheses, references).images).all()
    assert (lists.images == numbers.images).all()


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "references must be of at least one image, got none"),
        (["a"], [[]], "references must have a caption for each image, got none for image 0"),
        (["a"], ["a b"], "references must be a list of captions for each image, got 'a b' for image 0"),
        (["a"], [["a"], ["b"]], "hypotheses must be one for each image of references, got 1 for 2"),
        ([[1, 2]], [["a"]], "hypotheses must be words, as references are, got token ids: 1"),
        (["a b"], [[[1, 2]]], "hypotheses must be token ids, as references are, got words: 'a'"),
    ],
)
def test_says_what_is_wrong(hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        bleu(hypotheses, references)
