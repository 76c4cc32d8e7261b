"""How speed and memory are compared: interleaved rounds on one thread, and what a call takes from the allocator."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Ratios(NamedTuple):
    """How many times faster the candidate is than the baseline, over all rounds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    baseline: float
    """Median seconds of one call of the baseline."""
    candidate: float
    """Median seconds of one call of the candidate."""

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of processor time of one call, the mean of ``repeats``.

    Processor time rather than the clock's: it does not count the time in which a neighbour has the processor.
    """
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def ratios(
    baseline: Callable[[], Any], candidate: Callable[[], Any], rounds: int = 21, *, at_least: float = 0.02
) -> Ratios:
    """Compare the speed of two calls on the CPU: each round times both, in turns first, and gives one ratio.

    Args:
        baseline: What the candidate is compared with.
        candidate: What is measured; a ratio above 1 says that it is faster.
        rounds: Rounds, each of which gives one ratio.
        at_least: Seconds that each side takes in a round, by repeating its call.
    """
    sides = (baseline, candidate)
    for side in sides:
        side()
    repeats = [max(1, round(at_least / max(seconds(side, 2), 1e-7))) for side in sides]
    times: list[tuple[float, float]] = []
    for turn in range(rounds):
        taken = [0.0, 0.0]
        for i in (0, 1) if turn % 2 else (1, 0):
            taken[i] = seconds(sides[i], repeats[i])
        times.append((taken[0], taken[1]))
    low, median, high = statistics.quantiles((before / after for before, after in times), n=4)
    before, after = (statistics.median(side) for side in zip(*times, strict=True))
    return Ratios(median, low, high, before, after)


def peak(call: Callable[[], Any]) -> int:
    """Bytes that one call holds from the allocator at its worst moment, over what was held before it.

    Counts what the call itself allocates, its result included; memory from before that it frees counts as nothing.
    """
    call()  # what the first call sets up stays out
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result  # after the profile: the result counts
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event["args"] for event in events if event["name"] == "[memory]"]
    held: dict[int, int] = {}
    now = most = 0
    for event in sorted(memory, key=lambda event: event["Ev Idx"]):
        if event["Bytes"] > 0:
            held[event["Addr"]] = event["Bytes"]
            now += event["Bytes"]
        else:
            now -= held.pop(event["Addr"], 0)
        most = max(most, now)
    return most
