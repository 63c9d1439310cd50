"""Time and memory of calls that take turns, so that a busy machine is busy for all of them; and the
roof over a case: a matrix product and a copy, timed in the same rounds as the case itself."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench import ledger
from bench.precision import quick

SIDE = {"cpu": 2048, "cuda": 8192}  # of the product's square matrices
SIZE = {"cpu": 2**27, "cuda": 2**30}  # bytes that the copy reads, and as many that it writes


class Turns:
    """A, B, C, A, B, C, ...; every call must have run before, so that nothing compiles here."""

    def __init__(
        self,
        calls: dict[str, Callable[[], object]],
        device: str,
        rounds: dict[str, int] | None = None,  # of a call that drops out before the others
    ):
        self.calls, self.device, self.rounds = calls, device, rounds or {}
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.failed: dict[str, str] = {}  # calls that raised something and are out of it, and what

    def turn(self) -> None:
        """One round."""
        for name, call in self.calls.items():
            done = self.seconds[name]
            if name not in self.failed and len(done) < self.rounds.get(name, len(done) + 1):
                try:
                    done.append(clock(call, self.device))
                except Exception as error:
                    self.failed[name] = said(error)
                if name in self.failed:  # out of the except clause, which holds what the call held
                    recover(self.device)


def said(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0]


def recover(device: str) -> None:
    """Let go of what a failed call has left; the process ends if the device is of no more use."""
    gc.collect()
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:  # of a kernel, and from now on of everything
        print(f"the device is broken: {said(error)}", flush=True)
        raise SystemExit(ledger.BROKEN) from error


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


class Roof:
    """What this machine reaches in these minutes, whatever its data sheet says."""

    def __init__(self, device: str, dtype: torch.dtype):
        dtype = quick(dtype, device)  # what can be reached is what is fastest
        side, generator = SIDE[device], torch.Generator(device).manual_seed(0)
        # drawn: a GPU multiplies zeros faster, and tells of a roof that nothing can reach
        draw = lambda: torch.randn(side, side, generator=generator, device=device).to(dtype)
        self.dtype, self.side = dtype, side
        a, b, c = draw(), draw(), draw()
        source = torch.ones(SIZE[device], dtype=torch.uint8, device=device)
        target = source.clone()
        calls = {"gemm": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
        for call in calls.values():
            call()
        self._turns = Turns(calls, device)
        self.turn = self._turns.turn
        self._bytes = 2 * SIZE[device]

    @property
    def flop_rate(self) -> float:  # FLOP a second
        return 2 * self.side**3 / statistics.median(self._turns.seconds["gemm"])

    @property
    def byte_rate(self) -> float:  # bytes a second, read and written ones
        return self._bytes / statistics.median(self._turns.seconds["copy"])

    @property
    def rates(self) -> dict[str, float]:  # for the rows in a file
        return {"roof_flop_rate": self.flop_rate, "roof_byte_rate": self.byte_rate}

    def share(self, flop: float, size: float, seconds: float) -> float:
        """Of the roof: 1 if nothing but the work itself took time, at these rates."""
        return max(flop / self.flop_rate, size / self.byte_rate) / seconds

    def __str__(self) -> str:
        return (
            f"roof: {_short(self.flop_rate)}FLOP/s in a {str(self.dtype).partition('.')[2]} product "
            f"of {self.side}³, {_short(self.byte_rate)}B/s in a copy"
        )


def _short(rate: float) -> str:
    return f"{rate / 1e12:.1f} T" if rate >= 1e12 else f"{rate / 1e9:.1f} G"
