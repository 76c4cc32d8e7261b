"""Captions drawn by chance, of few words so that many n-grams recur."""

import random


def drawn(seed: int, images: int = 12) -> tuple[list[str], list[list[str]]]:
    """A hypothesis for each image and one to four references; some have no words."""
    chance = random.Random(seed)

    def caption() -> str:
        return " ".join(chance.choices("abcde", weights=(5, 3, 2, 1, 1), k=chance.randint(0, 9)))

    references = [[caption() for _ in range(chance.randint(1, 4))] for _ in range(images)]
    return [caption() for _ in references], references


def ids(caption: str) -> list[int]:
    """The same caption with a number for each word."""
    return [5 + 7 * ord(word) for word in caption.split()]
