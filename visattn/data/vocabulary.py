"""Which number stands for which word: words of the training captions, or the tokens of any tokenizer's file."""

import json
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

Tokens = Literal["plain", "given"]
END, UNKNOWN = "<end>", "<unknown>"
ENDS = ("</s>", "<eos>", "[EOS]", "<end>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")


class Punctuation(dict[int, "int | None"]):
    """What ``str.translate`` makes of each character: nothing of punctuation, in any script."""

    def __missing__(self, code: int) -> int | None:
        drop = chr(code) in string.punctuation or unicodedata.category(chr(code)).startswith("P")
        self[code] = None if drop else code
        return self[code]


PUNCTUATION = Punctuation()


def split(caption: str, tokens: Tokens = "plain") -> list[str]:
    """Cut a caption into lower-case words.

    Args:
        caption: The caption.
        tokens: ``"plain"`` drops punctuation first, wherever it stands, as neuraltalk2 does; ``"given"`` takes what
            stands between blanks, as others have cut it.

    Example:
        >>> split("A T-shirt , red."), split("A t-shirt , red .", "given")
        (['a', 'tshirt', 'red'], ['a', 't-shirt', ',', 'red', '.'])
    """
    caption = unicodedata.normalize("NFC", caption).lower()
    return (caption.translate(PUNCTUATION) if tokens == "plain" else caption).split()


class Vocabulary:
    """Numbers for the words of captions, from 0 to below ``len(vocabulary)``; one of them ends a caption."""

    end: int
    """The number that ends a caption."""
    unknown: int | None
    """The number that stands for all words that are not known; None: there is none."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.state == other.state

    __hash__ = None  # type: ignore[assignment]

    def numbers(self, caption: str) -> list[int]:
        """Return the numbers of a caption's words, none of which is the end."""
        raise NotImplementedError

    def word(self, number: int) -> str:
        """Return the word a number stands for, as people read it.

        Raises:
            IndexError: If there is no such number.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"number must lie between 0 and {len(self) - 1}, got {number}")
        return self.called(number)

    def called(self, number: int) -> str:
        raise NotImplementedError

    def encode(self, caption: str, longest: int | None = None) -> list[int]:
        """Return the numbers of a caption's words and what ends it; of more than ``longest`` words the first alone."""
        numbers = self.numbers(caption)
        return [*numbers, self.end] if longest is None or len(numbers) <= longest else numbers[:longest]

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the text of numbers, up to what ends it."""
        return self.text(list(takewhile(lambda number: number != self.end, numbers)))

    def text(self, numbers: list[int]) -> str:
        return " ".join(self.word(number) for number in numbers)

    @property
    def state(self) -> dict[str, Any]:
        """All of it in plain values, as a checkpoint holds it."""
        raise NotImplementedError

    @staticmethod
    def load(state: Any, size: int | None = None) -> "Vocabulary":
        """Return the vocabulary whose ``state`` this is.

        Args:
            state: What a checkpoint holds.
            size: How many words its model has.

        Raises:
            ValueError: If it is no such state, or has another number of words than the model.
            ImportError: If it is a tokenizer, and the package for it is missing.
        """
        vocabulary: Vocabulary
        match state:
            case {"words": [*words], "tokens": str(tokens)}:
                vocabulary = Words(words, tokens=tokens)  # type: ignore[arg-type]
            case {"tokenizer": str(text), "end": str(end)}:
                vocabulary = Tokenizer(text, end=end)
            case None:
                raise ValueError("the checkpoint has no vocabulary, so its words cannot be told")
            case _:
                raise ValueError(f"state must be that of a vocabulary, got {str(state)[:80]}")
        if size is not None and len(vocabulary) != size:
            raise ValueError(f"vocabulary must have the {size:,} words of the model, got {len(vocabulary):,}")
        return vocabulary


class Words(Vocabulary):
    """Words, most of them known: 0 ends a caption, 1 stands for all others, and the known ones follow.

    Args:
        words: The known ones.
        tokens: How captions are cut into words: by :func:`split`.

    Raises:
        ValueError: If there is no word, or one comes twice or is no text, or ``tokens`` is neither.

    Example:
        >>> words = Words.of(["A dog runs.", "A dog sleeps!"], min_count=2)
        >>> words.encode("A cat and a dog"), words.decode([2, 1, 0])
        ([2, 1, 1, 2, 3, 0], 'a <unknown>')
    """

    end = 0
    unknown = 1

    def __init__(self, words: Sequence[str], *, tokens: Tokens = "plain"):
        if tokens not in get_args(Tokens):
            raise ValueError(f"tokens must be {' or '.join(get_args(Tokens))}, got {tokens!r}")
        if not words or not all(isinstance(word, str) for word in words):
            raise ValueError(f"words must be texts, at least one, got {list(words)!r:.60}")
        word, count = Counter(words).most_common(1)[0]
        if count > 1:
            raise ValueError(f"words must be there once, got {word!r} {count} times")
        self.known = list(words)
        self.tokens: Tokens = tokens
        self.index = {word: number for number, word in enumerate(words, 2)}

    @classmethod
    def of(
        cls, captions: Iterable[str], *, min_count: int = 5, max_words: int | None = None, tokens: Tokens = "plain"
    ) -> "Words":
        """Return the words of captions, the most frequent first, then by the alphabet.

        Args:
            captions: Those of the training split alone.
            min_count: How often a word must occur to be known.
            max_words: How many words are known at most.
            tokens: How captions are cut into words.

        Raises:
            ValueError: If a number is less than 1, or no word occurs so often.
        """
        for name, value in (("min_count", min_count), ("max_words", max_words)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        counts = Counter(word for caption in captions for word in split(caption, tokens))
        ranked = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
        if not ranked:
            most = max(counts.values(), default=0)
            raise ValueError(f"min_count must be at most {most}, as often as any word occurs, got {min_count}")
        return cls(ranked[:max_words], tokens=tokens)

    def __len__(self) -> int:
        return len(self.known) + 2

    def numbers(self, caption: str) -> list[int]:
        return [self.index.get(word, self.unknown) for word in split(caption, self.tokens)]

    def called(self, number: int) -> str:
        return self.known[number - 2] if number > self.unknown else (END, UNKNOWN)[number]

    @property
    def state(self) -> dict[str, Any]:
        return {"words": self.known, "tokens": self.tokens}


class Tokenizer(Vocabulary):
    """The tokens of a tokenizer of Hugging Face: ``tokenizer.json``, for which the package ``tokenizers`` is needed.

    Args:
        text: What is in such a file.
        end: The token that ends a caption; None: one of those known to (``</s>``, ``<|endoftext|>``, ``[SEP]``, …).

    Raises:
        ImportError: If the package is missing.
        ValueError: If the text is not that of a tokenizer, or it does not have the token.
    """

    def __init__(self, text: str, *, end: str | None = None):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError as error:
            raise ImportError("a tokenizer's file needs the package tokenizers: pip install tokenizers") from error
        try:
            self.reader = Reader.from_str(text)
        except Exception as error:  # the package raises nothing more exact
            raise ValueError(f"no tokenizer can be made of {text[:40]!r}: {error}") from error
        self.reader.no_truncation()
        self.reader.no_padding()
        ids = {token: self.reader.token_to_id(token) for token in ([end] if end else ENDS)}
        found = [(token, number) for token, number in ids.items() if number is not None]
        if not found and end:
            raise ValueError(f"end must be a token of the tokenizer, got {end!r}")
        if not found:
            raise ValueError(f"the tokenizer has no token known to end a text ({', '.join(ENDS)}): name its own as end")
        self.ends_with, self.end = found[0]
        model = json.loads(text)["model"]
        unknown = model.get("unk_id", self.reader.token_to_id(model.get("unk_token") or ""))
        self.unknown = None if unknown == self.end else unknown
        self.size = 1 + max(self.reader.get_vocab(with_added_tokens=True).values())  # numbers may be left out

    @classmethod
    def read(cls, path: str | Path, *, end: str | None = None) -> "Tokenizer":
        """Return the tokenizer in a file.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is not that of a tokenizer, or the tokenizer does not have the token.
        """
        try:
            return cls(Path(path).read_text("utf-8"), end=end)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return self.size

    def numbers(self, caption: str) -> list[int]:
        return [number for number in self.reader.encode(caption, add_special_tokens=False).ids if number != self.end]

    def called(self, number: int) -> str:
        return self.reader.decode([number], skip_special_tokens=False).strip() or self.reader.id_to_token(number) or ""

    def text(self, numbers: list[int]) -> str:
        return self.reader.decode(numbers, skip_special_tokens=True).strip()

    @property
    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.reader.to_str(), "end": self.ends_with}
