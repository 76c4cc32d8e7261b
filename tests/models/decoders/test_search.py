import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.decoders.case import MEMORY, VOCABULARY, memory
from visattn.models.decoders import Decoder, Ensemble, Sentences, ShowAttendAndTell, beam, sample

END = 0


class Table(Decoder):
    """A decoder of so few words that all sentences can be tried: the next depends on the last two and on the image."""

    def __init__(self, vocabulary: int = 4):
        super().__init__(vocabulary, 1)
        self.steps = 0

    def prepare(self, memory: Tensor, mask: Any = None, size: Any = None) -> Tensor:
        return memory  # b v+1 v+1 v: scores of a word behind two, the last row and column for none

    def begin(self, prepared: Tensor, count: int) -> Tensor:
        return torch.full((len(prepared), count, 2), self.vocabulary)

    def step(self, word: Tensor | None, prepared: Tensor, state: Tensor) -> tuple[Tensor, Any, Any]:
        self.steps += 1
        if word is not None:
            state = torch.stack((state[..., 1], word), 2)
        row = torch.arange(len(prepared))[:, None]
        maps = torch.nn.functional.one_hot(state[..., 1], self.vocabulary + 1).double()  # the last word
        return prepared[row, state[..., 0], state[..., 1]], maps, state

    def write(self, features: Tensor) -> Tensor:
        return features


def scores(images: int = 2, vocabulary: int = 4) -> Tensor:
    size = vocabulary + 1
    return 2 * torch.randn(images, size, size, vocabulary, dtype=torch.double)


def every_sentence(table: Tensor, longest: int, vocabulary: int = 4) -> dict[tuple[int, ...], float]:
    """Log-probabilities of all sentences about one image: those that end, and those that are cut."""
    found = {}
    for length in range(1, longest + 1):
        for words in itertools.product(range(vocabulary), repeat=length):
            ends = words[-1] == END
            if END in words[:-1] or not (ends or length == longest):
                continue
            total, last = 0.0, (vocabulary, vocabulary)
            for word in words:
                total += table[last].log_softmax(0)[word].item()
                last = (last[1], word)
            found[words] = total
    return found


def said(sentences: Sentences, image: int, number: int = 0) -> tuple[int, ...]:
    return tuple(sentences.words[image, number, : sentences.lengths[image, number]].tolist())


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("norm", ["power", "gnmt"])
def test_a_wide_beam_finds_what_trying_all_sentences_finds(alpha, norm):
    tables = scores(3)
    decoder = Table()
    found = beam(decoder, tables, end=END, width=4**4, longest=4, alpha=alpha, norm=norm)
    for b, table in enumerate(tables):
        tried = every_sentence(table, 4)
        rank = {w: p / (len(w) if norm == "power" else (5 + len(w)) / 6) ** alpha for w, p in tried.items()}
        best = sorted(rank, key=lambda words: -rank[words])
        for n in range(len(best)):
            assert found.scores[b, n].item() == pytest.approx(rank[best[n]], abs=1e-12)
            assert said(found, b, n) == best[n]
            assert found.log_probs[b, n].item() == pytest.approx(tried[best[n]], abs=1e-12)
        assert not found.scores[b, len(best) :].isfinite().any()


def plain_beam(table: Tensor, width: int, longest: int, alpha: float) -> list[tuple[float, tuple[int, ...]]]:
    """The search for one image, as it is told."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for t in range(longest):
        candidates = []
        for total, words in live:
            last = (4, 4, *words)[-2:]
            log_probs = table[last].log_softmax(0)
            candidates += [(total + log_probs[word].item(), (*words, word)) for word in range(4)]
        candidates.sort(key=lambda each: -each[0])
        done += [(p / (t + 1) ** alpha, words) for p, words in candidates[:width] if words[-1] == END]
        live = [each for each in candidates[: 2 * width] if each[1][-1] != END][:width]
    done += [(p / longest**alpha, words) for p, words in live]
    return sorted(done, key=lambda each: -each[0])[:width]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_narrow_beam_is_the_plain_search_image_by_image(width, alpha):
    tables = scores(16)
    found = beam(Table(), tables, end=END, width=width, longest=6, alpha=alpha)
    for b, table in enumerate(tables):
        for n, (score, words) in enumerate(plain_beam(table, width, 6, alpha)):
            assert said(found, b, n) == words
            assert found.scores[b, n].item() == pytest.approx(score, abs=1e-12)


def test_a_beam_of_one_is_greedy():
    tables = scores(16)
    found = beam(Table(), tables, end=END, width=1, longest=6)
    for b, table in enumerate(tables):
        words: list[int] = []
        while len(words) < 6 and END not in words:
            words.append(int(table[tuple([4, 4, *words][-2:])].argmax()))
        assert said(found, b) == tuple(words)


def test_it_stops_as_soon_as_nothing_better_can_come():
    decoder, tables = Table(), scores(2)
    tables[..., END] += 20
    beam(decoder, tables, end=END, width=1, longest=50)
    assert decoder.steps == 1
    tables[..., END] -= 40
    decoder.steps = 0
    beam(decoder, tables, end=END, width=1, longest=50)
    assert decoder.steps == 50


def test_sentences_have_the_length_that_is_asked_for():
    tables = scores(8)
    found = beam(Table(), tables, end=END, width=3, longest=6, shortest=3)
    assert (found.lengths >= 4).all()
    assert (found.lengths <= 6).all()
    assert (found.words[:, :, :3] != END).all()
    by_chance = sample(Table(), tables, end=END, count=20, longest=6, shortest=3)
    assert (by_chance.lengths >= 4).all()


def test_three_words_in_a_row_do_not_come_again_unless_they_may():
    tables = scores(8)
    tables[..., END] -= 20

    def repeats(words: Tensor) -> bool:
        threes = list(zip(words.tolist(), words.tolist()[1:], words.tolist()[2:], strict=False))
        return len(set(threes)) < len(threes)

    for search in (
        lambda repeat: beam(Table(), tables, end=END, width=2, longest=15, repeat=repeat),
        lambda repeat: sample(Table(), tables, end=END, count=2, longest=15, repeat=repeat),
    ):
        assert not any(repeats(words) for words in search(False).words.flatten(0, 1))
        assert any(repeats(words) for words in search(True).words.flatten(0, 1))


def test_maps_are_those_of_the_sentence_that_won():
    found = beam(Table(), scores(8), end=END, width=3, longest=6)
    for b in range(8):
        for n in range(3):
            words = said(found, b, n)
            looked = found.maps[b, n, : len(words)].argmax(-1).tolist()  # the table looks at the word before
            assert looked == [4, *words[:-1]]
            assert not found.maps[b, n, len(words) :].any()


def decoder(**options: Any) -> ShowAttendAndTell:
    made = ShowAttendAndTell(VOCABULARY, MEMORY, hidden=6, embedding=5, **options).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made


def test_images_are_searched_as_if_each_were_alone():
    network, held = decoder(), memory(5)
    together = beam(network, network.prepare(held), end=END, width=3, longest=8, alpha=0.7)
    for b in range(5):
        alone = beam(network, network.prepare(held[b : b + 1]), end=END, width=3, longest=8, alpha=0.7)
        steps = alone.words.shape[2]
        assert torch.equal(together.words[b, :, :steps], alone.words[0])
        assert (together.words[b, :, steps:] == END).all()
        torch.testing.assert_close(together.scores[b], alone.scores[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together.maps[b, :, :steps], alone.maps[0], rtol=0, atol=1e-12)


def test_log_probabilities_are_those_of_the_words():
    network, held = decoder(), memory(5)
    prepared = network.prepare(held)
    torch.manual_seed(0)
    for found in (
        beam(network, prepared, end=END, width=3, longest=8),
        beam(network, prepared, end=END, width=4, longest=8, groups=2),
        sample(network, prepared, end=END, count=3, longest=8, temperature=0.7, nucleus=0.8, top_k=5),
    ):
        told = network.write(network(prepared, found.words[..., :-1]).features).log_softmax(-1)
        each = told.gather(3, found.words[..., None])[..., 0]
        there = torch.arange(each.shape[2]) < found.lengths[..., None]
        torch.testing.assert_close((each * there).sum(2), found.log_probs, rtol=0, atol=1e-11)


def test_groups_of_beams_say_different_things():
    words, tables = Table(5), scores(8, 5)  # one for each group, and one to go on with in place of the end
    alike = beam(words, tables, end=END, width=4, longest=6, groups=4, diversity=0.0)
    assert all(torch.equal(alike.words[:, 0], alike.words[:, n]) for n in range(4))
    greedy = beam(words, tables, end=END, width=1, longest=6)
    steps = greedy.words.shape[2]
    assert torch.equal(alike.words[:, 0, :steps], greedy.words[:, 0])
    other = beam(words, tables, end=END, width=4, longest=6, groups=4, diversity=50.0)
    firsts = other.words[:, :, 0]
    assert all(len(set(words.tolist())) == 4 for words in firsts)  # what others say first, nobody else does
    one = beam(words, tables[:1], end=END, width=4, longest=6, groups=4, diversity=50.0)
    assert torch.equal(one.scores[0], other.scores[0])  # the images of a batch are strangers to each other


def test_a_word_with_which_a_group_goes_on_in_place_of_the_end_counts_for_the_next():
    tables = torch.zeros(1, 5, 5, 4, dtype=torch.double)
    tables[0, 4, 4] = torch.tensor([3.0, 2.0, 1.0, 0.0])  # the end is the likeliest
    tables[0, 4, :, 3] += 200  # a second word, and then the end, whatever was said
    tables[0, 4, 4, 3] -= 200
    tables[0, :, 3, END] += 200
    found = beam(Table(), tables, end=END, width=2, longest=4, groups=2, diversity=50.0, alpha=3.0)
    assert [said(found, 0, n) for n in range(2)] == [(1, 3, END), (2, 3, END)]


def test_words_come_as_often_as_they_are_likely():
    tables, count = scores(1), 20000
    found = sample(Table(), tables, end=END, count=count, longest=3, generator=torch.Generator().manual_seed(0))
    tried = every_sentence(tables[0], 3)
    seen: dict[tuple[int, ...], int] = {}
    for n in range(count):
        words = said(found, 0, n)
        seen[words] = seen.get(words, 0) + 1
    for words, log_prob in tried.items():
        p = math.exp(log_prob)
        assert abs(seen.get(words, 0) / count - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-3


def test_rare_words_are_left_out_where_they_should_be():
    tables = scores(1)
    tables[0, 4, 4] = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.double).log()

    def firsts(**options: Any) -> set[int]:
        found = sample(Table(), tables, end=END, count=2000, longest=1, **options)
        return set(found.words[0, :, 0].tolist())

    assert firsts() == {0, 1, 2, 3}
    assert firsts(top_k=2) == {0, 1}
    assert firsts(nucleus=0.79) == {0, 1}
    assert firsts(nucleus=0.81) == {0, 1, 2}  # the word that crosses it is kept
    assert firsts(nucleus=0.01) == {0}
    assert firsts(temperature=0.01) == {0}


def test_an_ensemble_says_words_by_the_mean_probability():
    first, second = scores(2), scores(2)
    mean = ((first.softmax(-1) + second.softmax(-1)) / 2).log()
    both = Ensemble([Table(), Table()])
    together = beam(both, both.prepare([first, second]), end=END, width=3, longest=5)
    expected = beam(Table(), mean, end=END, width=3, longest=5)
    assert torch.equal(together.words, expected.words)
    torch.testing.assert_close(together.scores, expected.scores, rtol=0, atol=1e-12)
    assert all(torch.equal(each, expected.maps) for each in together.maps)
    alone = Ensemble([Table()])
    assert torch.equal(beam(alone, [mean], end=END, longest=5).words, expected.words)


@pytest.mark.parametrize(
    "options",
    [{"width": 1}, {"width": 4, "groups": 2, "diversity": 1.0, "repeat": False}, {"width": 3, "shortest": 2}],
    ids=["greedy", "groups", "long"],
)
def test_an_ensemble_is_searched_as_one(options):
    first, second = scores(6), scores(6)
    mean = ((first.softmax(-1) + second.softmax(-1)) / 2).log()
    both = Ensemble([Table(), Table()])
    together = beam(both, both.prepare([first, second]), end=END, longest=5, alpha=0.7, **options)
    expected = beam(Table(), mean, end=END, longest=5, alpha=0.7, **options)
    assert torch.equal(together.words, expected.words)
    assert torch.equal(together.lengths, expected.lengths)
    torch.testing.assert_close(together.log_probs, expected.log_probs, rtol=0, atol=1e-12)
    assert all(torch.equal(each, expected.maps) for each in together.maps)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3, "nucleus": 0.9, "repeat": False}], ids=str)
def test_an_ensemble_says_by_chance_what_one_says(options):
    first, second = scores(2), scores(2)
    mean = ((first.softmax(-1) + second.softmax(-1)) / 2).log()
    both = Ensemble([Table(), Table()])
    together, expected = (
        sample(decoder, held, end=END, count=50, longest=5, generator=torch.Generator().manual_seed(0), **options)
        for decoder, held in ((both, [first, second]), (Table(), mean))
    )
    assert torch.equal(together.words, expected.words)
    torch.testing.assert_close(together.log_probs, expected.log_probs, rtol=0, atol=1e-12)
    assert all(torch.equal(each, expected.maps) for each in together.maps)


def test_networks_that_look_at_memories_of_their_own_say_a_sentence_together():
    networks = [decoder(), decoder()]
    held = [memory(3), memory(3)]
    both = Ensemble(networks)
    prepared = both.prepare(held)
    for found in (
        beam(both, prepared, end=END, width=1, longest=6),
        beam(both, prepared, end=END, width=4, longest=6, groups=2),
        sample(both, prepared, end=END, count=4, longest=6),
    ):
        each = [
            network.write(network(network.prepare(own), found.words[..., :-1]).features).softmax(-1)
            for network, own in zip(networks, held, strict=True)
        ]
        mean = torch.stack(each).mean(0).log().gather(3, found.words[..., None])[..., 0]
        there = torch.arange(mean.shape[2]) < found.lengths[..., None]
        torch.testing.assert_close((mean * there).sum(2), found.log_probs, rtol=0, atol=1e-11)
        assert len(found.maps) == 2


def test_refuses_an_ensemble_of_strangers():
    with pytest.raises(ValueError, match=r"as many words each, got \[4, 5\] words"):
        Ensemble([Table(4), Table(5)])
    with pytest.raises(ValueError, match=r"as many words each, got \[\] words"):
        Ensemble([])


def test_words_that_are_never_said_leave_their_probability_to_the_others():
    tables = scores(2)
    rest = tables.clone()
    rest[..., 2] = -torch.inf
    found = beam(Table(), tables, end=END, width=40, longest=3, never=[2])
    by_chance = sample(Table(), tables, end=END, count=400, longest=3, never=[2])
    for b in range(2):
        tried = every_sentence(rest[b], 3)
        best = sorted((words for words in tried if 2 not in words), key=lambda words: -tried[words])
        for n, words in enumerate(best):
            assert said(found, b, n) == words
            assert found.log_probs[b, n].item() == pytest.approx(tried[words], abs=1e-12)
        assert not found.scores[b, len(best) :].isfinite().any()
        assert sum(map(math.exp, map(tried.get, best))) == pytest.approx(1)
        for n in range(400):
            assert by_chance.log_probs[b, n].item() == pytest.approx(tried[said(by_chance, b, n)], abs=1e-12)
            assert 2 not in said(by_chance, b, n)


def test_where_all_words_would_repeat_three_there_is_no_sentence():
    found = beam(Table(2), scores(2, 2), end=END, width=2, longest=6, shortest=5, repeat=False)
    assert (found.scores == -math.inf).all()
    assert (found.log_probs == -math.inf).all()


def test_no_images_have_no_sentences():
    found = beam(Table(), scores(0), end=END, width=3)
    assert found.words.shape[:2] == (0, 3)
    assert sample(Table(), scores(0), end=END, count=2).words.shape[:2] == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"width": 4, "groups": 3}, "groups must divide width=4, got 3"),
        ({"longest": 0}, "longest must be at least 1, got 0"),
        ({"shortest": 20}, "shortest must be less than longest=20, got 20"),
        ({"end": 4}, "end must be one of 4 words, got 4"),
        ({"never": [4]}, r"never must be some of 4 words but end=0, got \[4\]"),
        ({"never": [0]}, r"never must be some of 4 words but end=0, got \[0\]"),
        (
            {"never": [1, 2, 3, 3], "shortest": 2},
            r"never must leave one of 4 words to say before end=0 for shortest=2, got \[1, 2, 3, 3\]",
        ),
        ({"alpha": -1.0}, "alpha and diversity must not be negative, got -1.0 and 0.5"),
        ({"norm": "mean"}, "norm must be power or gnmt, got 'mean'"),
    ],
)
def test_refuses_a_beam_that_makes_no_sense(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        beam(Table(), scores(), **{"end": END} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"never": [-1]}, r"never must be some of 4 words but end=0, got \[-1\]"),
        (
            {"never": [1, 2, 3], "shortest": 1},
            "never must leave one of 4 words to say before end=0 for shortest=1, got",
        ),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"nucleus": 0.0}, r"nucleus must lie in \(0, 1\], got 0.0"),
    ],
)
def test_refuses_chances_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        sample(Table(), scores(), end=END, **options)
