"""Speed and memory of attention that reads regions word by word: ``python -m benchmarks.memory``.

Five captions of every image ask 12 times for what to read, and gradients go to queries and parameters; what is prepared
is included. Beside it the common form: the memory is repeated for every caption, and its keys are made at every step.
Prints a Markdown table for one thread of a processor; ratios are medians over interleaved rounds with their quartiles,
above 1 where ours is faster. Each row has a process of its own.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak, ratios
from visattn.attention.memory.additive import AdditiveAttention
from visattn.attention.memory.core import MemoryAttention
from visattn.attention.memory.multi_head import MultiHeadAttention
from visattn.attention.memory.multiplicative import MultiplicativeAttention

IMAGES, CAPTIONS, STEPS, REGIONS, MEMORY, WIDTH = 20, 5, 12, 49, 1280, 512
MODULES: dict[str, Callable[[], MemoryAttention]] = {
    "additive": lambda: AdditiveAttention(WIDTH, MEMORY, width=WIDTH),
    "multiplicative": lambda: MultiplicativeAttention(WIDTH, MEMORY),
    "multi-head": lambda: MultiHeadAttention(WIDTH, MEMORY),
}


def additive(module: Any, query: Tensor, memory: Tensor) -> Tensor:
    hidden = torch.tanh(module.key(memory) + module.query(query)[:, None])
    weights = module.score(hidden).squeeze(2).softmax(1)
    return (weights[:, :, None] * memory).sum(1)


def multiplicative(module: Any, query: Tensor, memory: Tensor) -> Tensor:
    weights = torch.bmm(module.key(memory), query[:, :, None]).softmax(1)
    return (weights * memory).sum(1)


def multi_head(module: Any, query: Tensor, memory: Tensor) -> Tensor:
    asked, keys, values = (
        layer(x).unflatten(2, (module.heads, -1)).transpose(1, 2)
        for layer, x in ((module.query, query[:, None]), (module.key, memory), (module.value, memory))
    )
    weights = (asked @ keys.mT * module.scale).softmax(3)
    return module.out((weights @ values).transpose(1, 2).flatten(1))


PLAIN = {"additive": additive, "multiplicative": multiplicative, "multi-head": multi_head}


def row(task: tuple[str, int]) -> str:
    name, rounds = task
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, memory = MODULES[name](), torch.randn(IMAGES, REGIONS, MEMORY)
    queries = [torch.randn(IMAGES, CAPTIONS, WIDTH, requires_grad=True) for _ in range(STEPS)]
    wanted = [*queries, *module.parameters()]

    def ours() -> list[Tensor]:
        prepared = module.prepare(memory)
        return [module(query, prepared)[0] for query in queries]

    def plain() -> list[Tensor]:
        repeated = memory.repeat_interleave(CAPTIONS, 0)
        found = (PLAIN[name](module, query.flatten(0, 1), repeated) for query in queries)
        return [each.unflatten(0, (IMAGES, CAPTIONS)) for each in found]

    def step(form: Callable[[], list[Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(torch.stack(form()).square().sum(), wanted)

    torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-4)
    measured = ratios(step(plain), step(ours), rounds)
    simply, lean = (peak(step(form)) / 2**20 for form in (plain, ours))
    return f"| {name} | {measured.candidate * 1e3:.0f} | {measured} | {lean:.0f} | {simply:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each comparison")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, one thread\n")
    print(f"{IMAGES} images, {CAPTIONS} captions each, {REGIONS} regions of {MEMORY} features, {STEPS} steps\n")
    print("| attention | ours, ms | ratio | ours, MiB | common form, MiB |\n|---|---:|---:|---:|---:|")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for line in pool.imap(row, [(name, arguments.rounds) for name in MODULES]):
            print(line, flush=True)


if __name__ == "__main__":
    main()
