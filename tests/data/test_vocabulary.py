import json
import sys
from types import ModuleType

import pytest

from visattn.data.vocabulary import Tokenizer, Vocabulary, Words, split


@pytest.mark.parametrize(
    ("caption", "plain", "given"),
    [
        ("A Dog runs .", "a dog runs", "a dog runs ."),
        ("A dog's T-shirt, red!", "a dogs tshirt red", "a dog's t-shirt, red!"),
        ("„Zwei“ Hunde … 3 €", "zwei hunde 3 €", "„zwei“ hunde … 3 €"),
        ("दो कुत्ते।", "दो कुत्ते", "दो कुत्ते।"),  # the vowel signs stay
        ("", "", ""),
    ],
)
def test_captions_are_cut_without_punctuation_or_as_they_are(caption, plain, given):
    assert split(caption) == plain.split()
    assert split(caption, "given") == given.split()


def test_words_are_ranked_by_count_then_by_the_alphabet():
    words = Words.of(["b a c", "b a", "b d"], min_count=1)
    assert words.known == ["b", "a", "c", "d"]
    assert (words.end, words.unknown, len(words)) == (0, 1, 6)
    assert [words.word(k) for k in range(6)] == ["<end>", "<unknown>", "b", "a", "c", "d"]
    assert Words.of(["b a c", "b a", "b d"], min_count=2).known == ["b", "a"]
    assert Words.of(["b a c", "b a", "b d"], min_count=1, max_words=3).known == ["b", "a", "c"]


def test_what_is_encoded_is_decoded_and_words_never_seen_are_unknown():
    words = Words.of(["a dog runs"], min_count=1)
    assert words.decode(words.encode("A dog runs!")) == "a dog runs"
    assert words.encode("a cat") == [words.index["a"], 1, 0]
    assert words.decode([2, 1, 0, 3, 0]) == "a <unknown>"
    assert words.encode("...") == [0]
    assert words.decode([]) == words.decode([0]) == ""


def test_a_long_caption_is_cut_and_has_no_end():
    words = Words.of(["a b c"], min_count=1)
    assert words.encode("a b c", 3) == [2, 3, 4, 0]
    assert words.encode("a b c", 2) == [2, 3]


def test_the_state_is_plain_and_gives_the_vocabulary_again():
    words = Words.of(["A dog 's ball ,"], min_count=1, tokens="given")
    state = json.loads(json.dumps(words.state))
    again = Vocabulary.load(state, size=len(words))
    assert again == words
    assert again.encode("a dog 's ball ,") == words.encode("a dog 's ball ,")
    assert again != Words(words.known)
    assert again != "another thing"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Words.of(["a dog"], min_count=0), "min_count must be at least 1, got 0"),
        (lambda: Words.of(["a dog"], min_count=1, max_words=0), "max_words must be at least 1, got 0"),
        (lambda: Words.of(["a a dog"], min_count=3), "min_count must be at most 2, as often as any word occurs, got 3"),
        (lambda: Words.of([]), "min_count must be at most 0"),
        (lambda: Words(["a"], tokens="some"), "tokens must be plain or given, got 'some'"),
        (lambda: Words([]), r"words must be texts, at least one, got \[\]"),
        (lambda: Words(["a", 3]), r"words must be texts, at least one, got \['a', 3\]"),
        (lambda: Words(["a", "b", "a"]), "words must be there once, got 'a' 2 times"),
        (lambda: Vocabulary.load(None), "the checkpoint has no vocabulary"),
        (lambda: Vocabulary.load({"words": "a b"}), "state must be that of a vocabulary, got {'words': 'a b'}"),
        (lambda: Vocabulary.load(["a"]), "state must be that of a vocabulary"),
        (lambda: Vocabulary.load(Words(["a"]).state, 1024), "vocabulary must have the 1,024 words of the model, got 3"),
    ],
)
def test_vocabularies_refuse(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("number", [-1, 3])
def test_a_number_that_is_no_word_is_an_error(number):
    with pytest.raises(IndexError, match=f"number must lie between 0 and 2, got {number}"):
        Words(["a"]).word(number)
    with pytest.raises(IndexError, match="number must lie between 0 and 2"):
        Words(["a"]).decode([number])


# ----------------------------------------------------------------------------------------------------------- tokenizers


class Reader:
    """What is used of the package ``tokenizers``, for words between blanks."""

    def __init__(self, text: str):
        self.vocabulary = json.loads(text)["model"]["vocab"]
        self.limits = {"truncation", "padding"}
        self.text = text

    from_str = classmethod(lambda cls, text: cls(text))

    def no_truncation(self) -> None:
        self.limits.remove("truncation")

    def no_padding(self) -> None:
        self.limits.remove("padding")

    def token_to_id(self, token: str) -> int | None:
        return self.vocabulary.get(token)

    def id_to_token(self, number: int) -> str | None:
        return {v: k for k, v in self.vocabulary.items()}.get(number)

    def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
        assert with_added_tokens
        return self.vocabulary

    def encode(self, text: str, add_special_tokens: bool):
        assert not self.limits
        assert not add_special_tokens
        found = ModuleType("encoding")
        found.ids = [self.vocabulary.get(word, self.vocabulary["[UNK]"]) for word in text.lower().split()]
        return found

    def decode(self, numbers: list[int], skip_special_tokens: bool) -> str:
        tokens = [self.id_to_token(k) or "" for k in numbers]
        return " ".join(t for t in tokens if not (skip_special_tokens and t.startswith(("[", "<"))))

    def to_str(self) -> str:
        return self.text


def words_file(**vocabulary: int) -> str:
    """A tokenizer's file with whole words; the package and the stand-in both read it."""
    vocabulary = {"[UNK]": 0, "a": 1, "dog": 2, **vocabulary}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": k, "content": t, **special} for t, k in vocabulary.items() if not t.isalpha()]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        }
    )


@pytest.fixture(params=["stand-in", "package"])
def tokenizers(request, monkeypatch):
    """The package ``tokenizers``, and what stands in for it where it is not installed."""
    if request.param == "package":
        return pytest.importorskip("tokenizers")
    module = ModuleType("tokenizers")
    module.Tokenizer = Reader
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    return module


@pytest.mark.usefixtures("tokenizers")
def test_a_tokenizers_file_is_a_vocabulary(tmp_path):
    (tmp_path / "tokenizer.json").write_text(words_file(**{"</s>": 7}))
    words = Tokenizer.read(tmp_path / "tokenizer.json")
    assert (words.end, words.unknown, len(words)) == (7, 0, 8)  # numbers are left out
    assert words.encode("A dog a dog") == [1, 2, 1, 2, 7]
    assert words.encode("a cat </s>") == [1, 0, 7]
    assert words.encode("A dog a dog", 3) == [1, 2, 1]
    assert words.decode([1, 2, 7, 1]) == "a dog"
    assert [words.word(k) for k in (2, 7, 5)] == ["dog", "</s>", ""]
    state = json.loads(json.dumps(words.state))
    assert Vocabulary.load(state, 8) == words
    assert Vocabulary.load(state).encode("a dog") == [1, 2, 7]
    assert words != Words(["a", "dog"])


@pytest.mark.usefixtures("tokenizers")
def test_what_ends_a_caption_is_found_or_named(tmp_path):
    assert Tokenizer(words_file(**{"[SEP]": 3, "<|endoftext|>": 4})).end == 4
    assert Tokenizer(words_file(**{"[SEP]": 3}), end="[UNK]").unknown is None
    named = Tokenizer(words_file(**{"[SEP]": 3, "[STOP]": 4}), end="[STOP]")
    assert named.end == Vocabulary.load(named.state).end == 4
    with pytest.raises(ValueError, match=r"the tokenizer has no token known to end a text .*: name its own as end"):
        Tokenizer(words_file())
    with pytest.raises(ValueError, match=r"end must be a token of the tokenizer, got '\[STOP\]'"):
        Tokenizer(words_file(), end="[STOP]")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json: no tokenizer can be made of '{': "):
        Tokenizer.read(tmp_path / "tokenizer.json")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="needs the package tokenizers: pip install tokenizers"):
        Vocabulary.load({"tokenizer": "{}", "end": "</s>"})
