"""Time and memory of calls that take turns, so that a busy machine is busy for all of them."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: dict[str, int],  # of each call; one with fewer drops out first
    device: str,
) -> dict[str, list[float]]:  # seconds, one a round
    """A, B, C, A, B, C, ...; every call must have run before, so that nothing compiles here."""
    seconds = {name: [] for name in calls}
    for turn in range(max(rounds.values(), default=0)):
        for name, call in calls.items():
            if turn < rounds[name]:
                seconds[name].append(clock(call, device))
    return seconds


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value, three times that."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The allocator's peak above what is alive now; what a library maps by itself is not seen."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = prof.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        alive += size
        peak = max(peak, alive)
    return peak


def clock(call: Callable[[], object], device: str) -> float:
    gc.collect()  # a cycle of the provider before must not be collected in this one's time
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result  # not before the clock has stopped: freeing is the caller's
    return seconds
