import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.metrics.captions import drawn, ids
from visattn.metrics import Cider, CiderD, Frequencies, cider, cider_d, document_frequencies
from visattn.metrics.ngrams import ROWS

END = 3


def grams(words: list) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def loops(hypotheses: list[list], references: list[list[list]], deviation: bool, table=None) -> list[float]:
    """CIDEr or CIDEr-D by the definition."""
    if table is None:
        table = len(references), Counter(w for several in references for w in set().union(*map(grams, several)))
    images, found = table

    def weights(words: list, n: int) -> dict:
        return {
            w: count * (math.log(images) - math.log(max(1, found.get(w, 0))))
            for w, count in grams(words).items()
            if len(w) == n
        }

    scores = []
    for hypothesis, several in zip(hypotheses, references, strict=True):
        total = 0.0
        for reference in several:
            for n in range(1, 5):
                h, r = weights(hypothesis, n), weights(reference, n)
                product = sum((min(h[w], r[w]) if deviation else h[w]) * r[w] for w in h if w in r)
                norms = math.sqrt(sum(x * x for x in h.values())) * math.sqrt(sum(x * x for x in r.values()))
                bigrams = max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)
                close = math.exp(-(bigrams**2) / 72) if deviation else 1
                total += product / norms * close / 4 if norms else 0
        scores.append(10 * total / len(several))
    return scores


def words(references: list[list[str]]) -> list[list[list[str]]]:
    return [[caption.split() for caption in several] for several in references]


def numbers(references: list[list[str]]) -> list[list[list[int]]]:
    return [[ids(caption) for caption in several] for several in references]


def rows(captions: list[list[int]], width: int, fill: int = 0) -> torch.Tensor:
    return torch.tensor([caption + [fill] * (width - len(caption)) for caption in captions])


@pytest.mark.parametrize("deviation", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_is_the_definition(seed, deviation):
    hypotheses, references = drawn(seed)
    found = (cider_d if deviation else cider)(hypotheses, references)
    expected = loops([h.split() for h in hypotheses], words(references), deviation)
    np.testing.assert_allclose(found.images, expected, rtol=1e-12, atol=1e-14)
    assert found.corpus == found.images.mean()


@pytest.mark.parametrize("deviation", [True, False])
def test_rarity_may_be_that_of_other_images(deviation):
    hypotheses, references = drawn(8)
    _, others = drawn(9, images=40)
    table = document_frequencies(others)
    found = (cider_d if deviation else cider)(hypotheses, references, table)
    expected = loops([h.split() for h in hypotheses], words(references), deviation, table)
    np.testing.assert_allclose(found.images, expected, rtol=1e-12, atol=1e-14)
    without = Frequencies(table.images, {w: count for w, count in table.counts.items() if count > 1})
    assert (cider_d(hypotheses, references, without).images == cider_d(hypotheses, references, table).images).all()


def test_rarity_of_the_same_images_is_the_default():
    hypotheses, references = drawn(10)
    table = document_frequencies(references)
    assert table.images == len(references)
    assert (cider_d(hypotheses, references, table).images == cider_d(hypotheses, references).images).all()


@pytest.mark.parametrize("kind", [Cider, CiderD])
def test_a_kept_scorer_gives_the_same_bits_as_a_fresh_one_in_any_batch(kind):
    hypotheses, references = drawn(11, images=2 * ROWS + 40)
    numbered = [ids(h) for h in hypotheses]
    kept = kind(numbers(references))
    expected = kind(numbers(references))(numbered)
    for _ in range(2):
        assert (kept(numbered) == expected).all()
    order = np.random.default_rng(0).permutation(len(numbered))[:100]
    assert (kept([numbered[i] for i in order], order) == expected[order]).all()
    assert [kept([numbered[i]], [int(i)]).item() for i in order[:20]] == expected[order[:20]].tolist()
    np.testing.assert_allclose(kind(references)(hypotheses), expected, rtol=1e-13, atol=1e-15)  # as words


def test_an_array_holds_several_samples_of_each_image():
    hypotheses, references = drawn(12, images=15)
    scorer = CiderD(numbers(references), end=END)
    samples = rows([[*ids(h), END] for h in hypotheses], 14).reshape(5, 3, 14)
    images = [4, 0, 0, 14, 7]
    found = scorer(samples, images)
    assert found.shape == (5, 3)
    for k, image in enumerate(images):
        for n in range(3):
            one = [*ids(hypotheses[3 * k + n]), END]
            assert scorer([one], [image]).item() == found[k, n]
    assert (scorer(samples.numpy(), np.array(images)) == found).all()
    assert (scorer(samples[:, 0], torch.tensor(images)) == found[:, 0]).all()


def test_the_end_is_a_word_where_it_counts():
    references = [[[4, 5, 6]], [[4, 7], [8, 9, END, 4]], [[7, 7]]]
    ended = [[*r[: r.index(END)], END] if END in r else [*r, END] for several in references for r in several]
    closed = [ended[:1], ended[1:3], ended[3:]]
    counting, blind = CiderD(references, end=END), CiderD(references, end=END, count_end=False)
    cut_off, finished = [4, 5, 6], [4, 5, 6, END, 9, 9]
    table = len(closed), Counter(w for several in closed for w in set().union(*map(grams, several)))
    expected = loops([cut_off, finished[:4]], [closed[0]] * 2, True, table)
    np.testing.assert_allclose(counting([cut_off, finished], [0, 0]), expected, rtol=1e-12)
    assert expected[0] < expected[1]
    bare = [several if END not in several[-1] else [several[0], several[1][:2]] for several in references]
    assert (blind([cut_off, finished], [0, 0]) == CiderD(bare)([cut_off, cut_off], [0, 0])).all()
    assert CiderD([["a b"], ["b"]], end=".")(["a b . b", "b ."])[0] == CiderD([["a b ."], ["b ."]])(["a b .", "b"])[0]


def test_negative_ids_are_no_tokens():
    _, references = drawn(13)
    captions = [ids(several[0]) for several in references]
    scorer = CiderD(numbers(references))
    padded = rows(captions, 12, fill=-100)
    padded[:, 11] = 5
    assert (scorer(padded) == scorer(captions)).all()


def test_unknown_words_differ_from_each_other():
    references = [["a b"], ["a c"], ["b c"]]
    same, different = CiderD(references)(["a b x x", "a b x y"], [0, 0])
    expected = loops([["a", "b", "x", "x"], ["a", "b", "x", "y"]], [[["a", "b"]]] * 2, True, None)
    assert expected == [0, 0]  # with one image, nothing is rare
    table = document_frequencies(references)
    expected = loops([["a", "b", "x", "x"], ["a", "b", "x", "y"]], [[["a", "b"]]] * 2, True, table)
    np.testing.assert_allclose([same, different], expected, rtol=1e-12)
    assert same < different


def test_the_order_of_images_and_of_references_is_free_and_the_roles_are_not():
    hypotheses, references = drawn(14)
    found = cider_d(hypotheses, references).images
    turned = cider_d(hypotheses[::-1], [several[::-1] for several in references[::-1]]).images
    np.testing.assert_allclose(turned[::-1], found, rtol=1e-12, atol=1e-15)
    table = document_frequencies(references)
    first, second = "a b a c", "a b d d d"
    there, back = cider_d([first], [[second]], table).corpus, cider_d([second], [[first]], table).corpus
    assert there != pytest.approx(back)
    assert cider([first], [[second]], table).corpus == pytest.approx(cider([second], [[first]], table).corpus)


def test_difference_in_length_is_that_of_bigrams():
    table = Frequencies(10, {})

    def ratio(hypothesis: str, reference: str) -> float:
        return cider_d([hypothesis], [[reference]], table).corpus / cider([hypothesis], [[reference]], table).corpus

    assert ratio("a b c d e", "a b") == pytest.approx(math.exp(-9 / 72))
    assert ratio("a b c", "a") == pytest.approx(math.exp(-4 / 72))
    assert ratio("a", "a") == 1
    assert cider_d([""], [["a"]], table).corpus == 0


def test_repeating_a_word_pays_in_cider_alone():
    table = document_frequencies([["dog a b c"], ["a b"], ["b c"]])
    once, often = ["dog a b"], ["dog dog dog"]
    assert cider(often, [["dog a b c"]], table).images > 0
    plain = [cider(h, [["dog dog a b"]], table).corpus for h in (once, often)]
    clipped = [cider_d(h, [["dog dog a b"]], table).corpus for h in (once, often)]
    assert clipped[1] / clipped[0] < plain[1] / plain[0]


def test_one_image_and_no_words_score_nothing():
    assert cider_d(["a b"], [["a b", "a"]]).images.tolist() == [0]
    assert cider_d(["", "a b"], [["a b"], ["c d", ""]]).images.tolist() == [0, 0]
    assert CiderD([["a"], ["b"]])([], []).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CiderD([]), "references must be of at least one image, got none"),
        (lambda: CiderD([["a"], []]), "references must have a caption for each image, got none for image 1"),
        (lambda: CiderD(["a"]), "references must be a list of captions for each image, got 'a' for image 0"),
        (lambda: cider_d(["a"], [["a"], ["b"]]), "hypotheses must be one for each image of references, got 1 for 2"),
        (lambda: cider(["a"], [["a"], ["b"]]), "hypotheses must be one for each image of references, got 1 for 2"),
        (lambda: CiderD([["a"]])(["a", "b"]), "hypotheses must be of one image each, got 2 for 1 images"),
        (lambda: CiderD([["a"]])(["a"], [1]), r"images must be from 0 to 0, got \[1\]"),
        (lambda: CiderD([["a"]])(["a"], [-1]), r"images must be from 0 to 0, got \[-1\]"),
        (lambda: CiderD([["a"]])([[1]]), "hypotheses must be words, as references are, got token ids: 1"),
        (lambda: CiderD([[[1]]])(["a"]), "hypotheses must be token ids, as references are, got words: 'a'"),
        (
            lambda: CiderD([["a"]])(torch.ones(1, 3, dtype=torch.long)),
            "hypotheses must be words, as references are, got an array of int64",
        ),
        (
            lambda: CiderD([["a"]], Frequencies(3, {("a",): 4})),
            "frequencies must have images for all counts, got 3 images and a count of 4",
        ),
        (
            lambda: CiderD([[[1]]], Frequencies(9, {("a",): 4})),
            "frequencies must be token ids, as references are, got words: 'a'",
        ),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
