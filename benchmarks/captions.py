"""Speed of the reward of self-critical training beside the usual scorer: ``python -m benchmarks.captions``.

Both score captions by CIDEr-D with the rarity of all references given. The usual scorer counts and weighs the n-grams
of the references again for every sample, in dictionaries of words; ours has read them before and compares token ids.
Captions are those of a file in Karpathy's form (``--captions``), or are drawn; samples are halves of two captions, one
of the image and one of another. Prints a Markdown table for one thread of a processor; ratios are medians over
interleaved rounds with their quartiles, above 1 where ours is faster. That both give the same scores is checked.
"""

import argparse
import gzip
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import ratios
from visattn.metrics import CiderD, Frequencies, document_frequencies

BATCHES = ((20, 1), (20, 5), (1000, 5), (5000, 1))
END = 0


def grams(caption: str) -> Counter[tuple[str, ...]]:
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def weighed(caption: str, table: Frequencies) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
    """Weigh the n-grams of a caption; return them by order, their norms and the number of bigrams."""
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
    squares, bigrams = [0.0] * 4, 0
    for gram, count in grams(caption).items():
        n = len(gram) - 1
        rarity = math.log(table.images) - math.log(max(1.0, table.counts.get(gram, 0)))
        weights[n][gram] = count * rarity
        squares[n] += weights[n][gram] ** 2
        bigrams += count if n == 1 else 0
    return weights, [math.sqrt(square) for square in squares], bigrams


def usual(samples: list[str], references: list[list[str]], table: Frequencies) -> list[float]:
    """CIDEr-D of samples, each with the references of its image."""
    scores = []
    for sample, several in zip(samples, references, strict=True):
        ours, norms, bigrams = weighed(sample, table)
        total = 0.0
        for reference in several:
            theirs, lengths, others = weighed(reference, table)
            for n in range(4):
                product = sum(min(w, theirs[n].get(g, 0.0)) * theirs[n].get(g, 0.0) for g, w in ours[n].items())
                if norms[n] and lengths[n]:
                    total += product / (norms[n] * lengths[n]) * math.exp(-((bigrams - others) ** 2) / 72)
        scores.append(10 * total / 4 / len(several))
    return scores


def described(path: Path, images: int) -> list[list[list[str]]]:
    """Read the captions of images from a file in Karpathy's form."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        found = json.load(file)["images"]
    return [[sentence["tokens"] for sentence in image["sentences"]] for image in found[:images]]


def drawn(images: int) -> list[list[list[str]]]:
    """Draw five captions of each image; the k-th word is 1/k as frequent as the first."""
    chance = random.Random(0)
    words, weights = [f"word{k}" for k in range(2500)], [1 / (k + 1) for k in range(2500)]
    lengths = [[max(4, round(chance.gauss(11, 3))) for _ in range(5)] for _ in range(images)]
    return [[chance.choices(words, weights, k=length) for length in several] for several in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="a file in Karpathy's form, .gz or not")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(0)
    references = described(args.captions, 5000) if args.captions else drawn(5000)
    words = sorted({word for several in references for caption in several for word in caption})
    number = {word: k for k, word in enumerate(words, END + 1)}
    ids = [[[number[word] for word in caption] for caption in several] for several in references]
    scorer = CiderD(ids, end=END)
    closed = [[[*caption, END] for caption in several] for several in ids]
    lines = [[" ".join(map(str, caption)) for caption in several] for several in closed]
    table = document_frequencies(lines)
    print("| images | samples of each | the usual, ms | ours, ms | ratio |\n|---:|---:|---:|---:|---:|")
    for images, samples in BATCHES:
        chosen = chance.sample(range(len(references)), images)
        said = []
        for image in chosen:
            for _ in range(samples):
                own, other = chance.choice(ids[image]), chance.choice(chance.choice(ids))
                said.append([*own[: len(own) // 2], *other[len(other) // 2 :], END])
        rows = torch.full((len(said), max(map(len, said))), END)
        for row, caption in zip(rows, said, strict=True):
            row[: len(caption)] = torch.tensor(caption)
        rows = rows.view(images, samples, -1)
        texts, right = (
            [" ".join(map(str, caption)) for caption in said],
            [lines[i] for i in chosen for _ in range(samples)],
        )
        expected = np.array(usual(texts, right, table)).reshape(images, samples)
        np.testing.assert_allclose(scorer(rows, chosen), expected, rtol=1e-9, atol=1e-12)
        found = ratios(lambda: usual(texts, right, table), lambda: scorer(rows, chosen), args.rounds)  # noqa: B023
        times = f"{1000 * found.baseline:.1f} | {1000 * found.candidate:.2f}"
        print(f"| {images:,} | {samples} | {times} | {found} |", flush=True)
    built = ratios(lambda: document_frequencies(lines), lambda: CiderD(ids, end=END), 5)
    print(f"\nReading the references, once: {built.candidate:.2f} s.")


if __name__ == "__main__":
    main()
