"""What a training step takes, part by part, before and after compilation: ``python -m benchmarks.steps``.

A ResNet-50 with CBAM in every block, and captioners on the maps of a frozen backbone: that of
``configs/caption_flickr8k.yaml``, whose steps a compiler would unroll for every pattern of lengths, so that it is not
compiled, and a transformer. Forward (with the loss), backward and the optimizer are timed one after another, all forms
of a network in turns. Prints Markdown tables for one thread of a processor: medians in ms over the rounds, and how many
times as fast as the first form a step is, with quartiles. Each network has a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visattn
from visattn.models.decoders import Decoder, ShowAttendAndTell, TransformerDecoder

PARTS = ("forward", "backward", "optimizer")
IMAGES, WORDS, LONGEST = 8, 2540, 20


class Form(NamedTuple):
    """A network, and what a step does with it."""

    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    def step(self) -> list[float]:
        """Take a step, and return the seconds of processor time of its parts."""
        self.optimizer.zero_grad()
        times = [time.process_time()]
        loss = self.loss()
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        self.optimizer.step()
        times.append(time.process_time())
        return [after - before for before, after in pairwise(times)]


def classification(compiled: bool, *, channels_last: bool, fused: bool) -> Form:
    torch.manual_seed(0)
    network: nn.Module = visattn.insert(timm.create_model("resnet50"), visattn.CBAM)
    images, labels = torch.randn(IMAGES, 3, 224, 224), torch.randint(1000, (IMAGES,))
    if channels_last:
        network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True, fused=fused)
    forward = torch.compile(network) if compiled else network
    return Form(lambda: F.cross_entropy(forward(images), labels), optimizer)


def captioning(make: Callable[[], Decoder], compiled: bool, *, fused: bool, ends: bool) -> Form:
    torch.manual_seed(0)
    decoder = make()
    network = nn.ModuleDict({"regions": nn.Sequential(nn.Linear(1280, 384), nn.ReLU()), "decoder": decoder})
    maps, lengths = torch.randn(20, 49, 1280), torch.randint(8, LONGEST, (20, 5))
    lengths[0, 0] = LONGEST
    words = torch.randint(1, WORDS, (20, 5, LONGEST))
    there = torch.arange(LONGEST) < lengths[..., None]
    optimizer = torch.optim.AdamW(network.parameters(), fused=fused)

    def said(maps: Tensor) -> Tensor:
        prepared = decoder.prepare(network["regions"](maps))
        return decoder(prepared, words[:, :, :-1], lengths if ends else None).features

    forward = torch.compile(said) if compiled else said
    return Form(lambda: F.cross_entropy(decoder.write(forward(maps)[there]), words[there]), optimizer)


def recurrent() -> Decoder:
    return ShowAttendAndTell(WORDS, 384, embedding=256, gate="vector", first="begin", tied=True)


def transformer() -> Decoder:
    return TransformerDecoder(WORDS, 384, width=384, heads=6, depth=3)


NETWORKS: dict[str, dict[str, Callable[[], Form]]] = {
    f"ResNet-50 with CBAM, {IMAGES} images of 224 × 224": {
        "as it is": partial(classification, False, channels_last=False, fused=False),
        "compiled": partial(classification, True, channels_last=False, fused=True),
        "compiled, channels last": partial(classification, True, channels_last=True, fused=True),
    },
    "captioner, recurrent, 20 images × 5 captions, 49 regions × 1280": {
        "captions padded": partial(captioning, recurrent, False, fused=False, ends=False),
        "captions leave where they end": partial(captioning, recurrent, False, fused=True, ends=True),
    },
    "captioner, transformer, 20 images × 5 captions, 49 regions × 1280": {
        "as it is": partial(captioning, transformer, False, fused=False, ends=True),
        "compiled": partial(captioning, transformer, True, fused=True, ends=True),
    },
}


def measure(name: str, rounds: int) -> str:
    torch.set_num_threads(1)
    forms = [make() for make in NETWORKS[name].values()]
    for form in forms:
        form.step()
        form.step()
    times = [[form.step() for form in forms] for _ in range(rounds)]
    lines = [f"| {name} | {' | '.join(PARTS)} | step | times as fast |", f"|---|{'---:|' * (len(PARTS) + 2)}"]
    for k, called in enumerate(NETWORKS[name]):
        each = [statistics.median(taken[k][part] for taken in times) for part in range(len(PARTS))]
        whole = [sum(taken[k]) for taken in times]
        low, ratio, high = statistics.quantiles([sum(taken[0]) / sum(taken[k]) for taken in times], n=4)
        shown = " | ".join(f"{1e3 * seconds:.0f}" for seconds in (*each, statistics.median(whole)))
        lines.append(f"| {called} | {shown} | {f'{ratio:.2f} ({low:.2f}–{high:.2f})' if k else ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for table in pool.imap(partial(measure, rounds=args.rounds), NETWORKS):
            print(table, end="\n\n", flush=True)


if __name__ == "__main__":
    main()
