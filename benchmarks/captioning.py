"""Speed of training and decoding a captioner beside the form of tutorials: ``python -m benchmarks.captioning``.

Both have the weights of one :class:`ShowAttendAndTell`. The common form repeats the regions for every caption, makes
their keys at every step, says each step's words in the loop, on the captions that are still going on, sorted by length;
and it searches one image at a time, whose beams narrow as sentences end. A training step is the cross entropy of the
true words and its gradients; the regions are given, as from a frozen backbone. That the losses and the best sentences
agree is checked. Prints a Markdown table for one thread of a processor; ratios are medians over interleaved rounds
with their quartiles, above 1 where ours is faster. Each row has a process of its own.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak, ratios
from visattn.models.decoders import ShowAttendAndTell, beam

END, WORDS, LONGEST = 0, 9490, 20
WIDTH = 512


class Size(NamedTuple):
    """How much there is to tell of."""

    images: int
    captions: int
    regions: int
    features: int

    def __str__(self) -> str:
        return f"{self.images} images × {self.captions}, {self.regions} regions × {self.features}"


TRAINING = (Size(8, 1, 196, 2048), Size(32, 1, 196, 2048), Size(20, 5, 49, 1280))
SEARCH = (Size(16, 1, 196, 2048), Size(16, 1, 49, 1280))


def decoder(size: Size) -> ShowAttendAndTell:
    torch.manual_seed(0)
    return ShowAttendAndTell(WORDS, size.features, gate="vector", output="state", first="begin", dropout=0.0)


def look(d: Any, regions: Tensor, hidden: Tensor) -> Tensor:
    """Read from the regions, whose keys are made anew."""
    keys = d.attention.key(regions) + d.attention.query(hidden)[:, None]
    weights = d.attention.score(keys.tanh()).squeeze(2).softmax(1)
    return (regions * weights[:, :, None]).sum(1) * d.gate(hidden).sigmoid()


def advance(d: Any, word: Tensor, regions: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step of the cell, by torch's own."""
    cell = d.cells[0]
    x = torch.cat((word, look(d, regions, hidden)), 1)
    weights = torch.cat((cell.known.weight, cell.found.weight), 1)
    return torch.lstm_cell(x, (hidden, memory), weights, cell.hidden.weight, cell.known.bias, None)


def usual_loss(d: Any, regions: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
    """The mean cross entropy of the words; the regions come once for every caption."""
    lengths, order = lengths.sort(descending=True)
    regions, words = regions[order], words[order]
    hidden, memory = d.start(regions.mean(1)).tanh().chunk(2, 1)
    read = torch.cat((d.words.first.expand(len(words), 1, -1), F.embedding(words[:, :-1], d.words.weight)), 1)
    logits = regions.new_zeros(len(words), words.shape[1], WORDS)
    for t in range(words.shape[1]):
        n = int((lengths > t).sum())
        hidden, memory = advance(d, read[:n, t], regions[:n], hidden[:n], memory[:n])
        logits[:n, t] = d.out(hidden)
    there = torch.arange(words.shape[1]) < lengths[:, None]
    return F.cross_entropy(logits[there], words[there])


def our_loss(d: ShowAttendAndTell, regions: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
    said = d(d.prepare(regions), words[:, :, :-1], lengths)
    there = torch.arange(words.shape[2]) < lengths[..., None]
    return F.cross_entropy(d.write(said.features[there]), words[there])


@torch.no_grad()
def usual_search(d: Any, regions: Tensor, width: int) -> tuple[list[int], float]:
    """The best sentence about one image, and its log-probability."""
    regions = regions[None].expand(width, -1, -1)
    hidden, memory = d.start(regions.mean(1)).tanh().chunk(2, 1)
    said: list[list[int]] = [[] for _ in range(width)]
    totals, word = torch.zeros(width, 1), d.words.first.expand(width, -1)
    ended: list[tuple[list[int], float]] = []
    for t in range(LONGEST):
        hidden, memory = advance(d, word, regions[: len(said)], hidden, memory)
        scores = totals + F.log_softmax(d.out(hidden), 1)
        left = scores[0] if t == 0 else scores.flatten()
        best, places = left.topk(width - len(ended))
        beams, words = places // WORDS, places % WORDS
        said = [[*said[int(b)], int(w)] for b, w in zip(beams, words, strict=True)]
        going = [i for i, w in enumerate(words) if w != END]
        ended += [(said[i], float(best[i])) for i in range(len(said)) if i not in going]
        if not going:
            break
        said = [said[i] for i in going]
        hidden, memory, totals = hidden[beams[going]], memory[beams[going]], best[going, None]
        word = F.embedding(words[going], d.words.weight)
    ended += [(s, float(total)) for s, total in zip(said, totals, strict=False)] if len(ended) < width else []
    return max(ended, key=lambda sentence: sentence[1])


def train(size: Size, rounds: int) -> str:
    d = decoder(size)
    regions = torch.randn(size.images, size.regions, size.features)
    lengths = torch.randint(8, LONGEST, (size.images, size.captions))
    lengths.view(-1)[0] = LONGEST
    words = torch.randint(1, WORDS, (size.images, size.captions, LONGEST))
    wanted = list(d.parameters())
    each = regions.repeat_interleave(size.captions, 0)

    def step(loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(), wanted)

    def plain() -> Tensor:
        return usual_loss(d, each, words.flatten(0, 1), lengths.flatten())

    def ours() -> Tensor:
        return our_loss(d, regions, words, lengths)

    torch.testing.assert_close(step(ours)(), step(plain)(), rtol=1e-3, atol=1e-5)
    measured = ratios(step(plain), step(ours), rounds)
    most, lean = (peak(step(form)) / 2**20 for form in (plain, ours))
    return f"| training step | {size} | {measured.candidate * 1e3:.0f} | {measured} | {lean:.0f} | {most:.0f} |"


def taught(d: ShowAttendAndTell, sentences: int = 12, steps: int = 50) -> ShowAttendAndTell:
    """Teach some sentences of drawn words, so that those that are searched end, at different lengths."""
    lengths = torch.randint(6, LONGEST, (1, sentences))
    words = torch.randint(1, WORDS, (1, sentences, LONGEST))
    words.scatter_(2, lengths[..., None] - 1, END)
    optimizer = torch.optim.Adam(d.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        our_loss(d, torch.randn(1, 4, d.attention.holds), words, lengths).backward()
        optimizer.step()
    return d


def search(size: Size, rounds: int, width: int = 5) -> str:
    d = taught(decoder(size)).eval()
    regions = torch.randn(size.images, size.regions, size.features)

    def plain() -> list[tuple[list[int], float]]:
        return [usual_search(d, each, width) for each in regions]

    def ours() -> Any:
        return beam(d, d.prepare(regions), end=END, width=width, longest=LONGEST, alpha=0.0)

    found, expected = ours(), plain()
    alike = sum(
        words[:length].tolist() == best
        for words, length, (best, _) in zip(found.words[:, 0], found.lengths[:, 0].tolist(), expected, strict=True)
    )
    better = all(ours > best - 1e-3 for ours, (_, best) in zip(found.log_probs[:, 0], expected, strict=True))
    measured = ratios(plain, ours, rounds)
    lengths = f"{int(found.lengths[:, 0].min())}–{int(found.lengths[:, 0].max())} words"
    same = f"{alike} of {size.images} sentences alike, {'none' if better else 'some'} less likely than the other's"
    return f"| beam {width} | {size}, {lengths}; {same} | {measured.candidate * 1e3:.0f} | {measured} | | |"


def row(task: tuple[str, Size, int]) -> str:
    kind, size, rounds = task
    torch.set_num_threads(1)
    return train(size, rounds) if kind == "train" else search(size, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("train", "search"), help="one of the two")
    args = parser.parse_args()
    tasks = [("train", size, args.rounds) for size in TRAINING] + [("search", size, args.rounds) for size in SEARCH]
    print("| what | of | ms | times as fast | MiB | MiB, common form |\n|---|---|---:|---:|---:|---:|")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for line in pool.imap(row, [task for task in tasks if args.only in (None, task[0])]):
            print(line, flush=True)


if __name__ == "__main__":
    main()
