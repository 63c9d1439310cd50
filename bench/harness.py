"""One case, all its providers: first the gate, then memory, then rounds in turn.

A provider that is missing is skipped with its reason, one that is wrong is refused with its error:
neither has a speed.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bench import measure
from bench.provider import Provider

ROUNDS = 5
# seconds a call: above it a peer is out of the race, and SLOW_ROUNDS tell by how much
SLOW, SLOW_ROUNDS = 8.0, 2


@dataclass
class Row:
    """One provider in one case; times in seconds, errors as the operation's `errors` says."""

    case: str
    provider: str
    version: str
    status: str  # "measured" | "skipped" | "refused"
    ours: bool
    reason: str = ""
    note: str = ""
    shape: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    median: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    rate: str = ""
    times_gemm: float | None = None  # median over the median of the bare products of this run
    times_sepo: float | None = None  # median over that of sepo's "auto" of this run
    extra_bytes: int | None = None  # allocator's peak above the inputs, gradients included
    beyond_gradients_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    gradient_ratios: dict[str, float] = field(default_factory=dict)  # error over a baseline's


def run_case(
    case,
    providers: Sequence[Provider],
    *,
    device: str,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Rows in the order of `providers`; those the case leaves out have none."""
    torch.compiler.reset()  # a peer recompiled too often would silently run eager
    wanted = [p for p in providers if takes_part(p, case)]
    inputs = case.inputs(device)
    rows = {p.name: _gate(p, case, inputs) for p in wanted}
    inputs.forget_truth()
    calls, turns = {}, {}
    for provider in wanted:
        row = rows[provider.name]
        if row.status != "measured":
            continue
        calls[provider.name] = call = lambda run=provider.run: run(inputs)
        start = time.perf_counter()
        size = measure.peak_bytes(call, device)
        peer = provider.gated and not provider.ours
        slow = peer and time.perf_counter() - start > SLOW
        turns[provider.name] = min(rounds, SLOW_ROUNDS) if slow else rounds
        if provider.gated:
            row.extra_bytes = size
            row.beyond_gradients_bytes = size - inputs.gradient_bytes
    for name, seconds in measure.interleaved(calls, turns, device).items():
        rows[name].seconds = seconds
        low, rows[name].median, high = measure.quartiles(seconds)
        rows[name].quartiles = low, high
    for provider in wanted:
        row = rows[provider.name]
        if row.seconds:
            row.rate = provider.work(inputs, row.median) if not provider.gated else ""
            row.times_gemm = _ratio(row, rows.get("gemm"))
            row.times_sepo = _ratio(row, rows.get("sepo"))
    return list(rows.values())


def takes_part(provider: Provider, case) -> bool:
    name = provider.name.partition(":")[0]  # "sepo" in a case's list means all of ours
    return name not in case.without and (not case.only or name in case.only)


def _gate(provider: Provider, case, inputs) -> Row:
    row = Row(case.name, provider.name, "", "skipped", provider.ours, shape=_shape(case))
    if reason := provider.why_not(inputs):
        row.reason = reason
        return row
    row.version, row.note = provider.version(), provider.note(inputs)
    try:
        result = provider.run(inputs)
    except Exception as error:  # a peer may fail in any way; the others are still to be measured
        row.status, row.reason = "refused", f"{type(error).__name__}: {error}".split("\n")[0]
        return row
    if not provider.gated:
        row.status = "measured"
        return row
    absent = [name for name in inputs.due(provider.objective) if name not in result]
    if absent:
        row.status, row.reason = "refused", f"gives no {', '.join(absent)}"
        return row
    row.errors = inputs.errors(result, provider.objective)
    limits = inputs.limits(provider.ours)
    wrong = [
        f"{name} is off by {error:.2e}, limit {limits[name]:.2e}"
        for name, error in row.errors.items()
        if not error <= limits[name]  # a NaN is wrong
    ]
    row.status, row.reason = ("refused", "; ".join(wrong)) if wrong else ("measured", "")
    if provider.objective == "weighted":
        for baseline, errors in inputs.baselines.items():
            for name, error in errors.items():
                if name in row.errors:
                    row.gradient_ratios[f"{name}/{baseline}"] = row.errors[name] / max(error, 1e-30)
    return row


def _shape(case) -> dict:
    about = dataclasses.asdict(case) | {"M": getattr(case, "M", None)}
    hidden = "name", "only", "without", "long"
    return {k: str(v) if k == "dtype" else v for k, v in about.items() if k not in hidden}


def _ratio(row: Row, other: Row | None) -> float | None:
    return row.median / other.median if other is not None and other.median else None


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
