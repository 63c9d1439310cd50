"""One case, all its providers: first the gate, then memory, then rounds in turn.

A provider that is missing is skipped with its reason, one that is wrong is refused with its error:
neither has a speed.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from bench import dtypes, measure, report
from bench.leg import ledger
from bench.provider import Provider
from bench.roof import Roof

ROUNDS = 5
# seconds a call: above it a peer is out of the race, and SLOW_ROUNDS tell by how much
SLOW, SLOW_ROUNDS = 8.0, 2
EMULATED = "torch multiplies bfloat16 slowly on this machine; --providers {} has it measured"


@dataclass
class Row:
    """One provider in one case; times in seconds, errors as the operation's `errors` says."""

    suite: str
    case: str
    provider: str
    version: str
    status: str  # "skipped" | "refused" | "passed", by the gate | "measured"
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
    flop: float = 0.0  # that the work can't do without
    bytes: float = 0.0  # each input read once, each output written once
    roof: float | None = None  # share of the roof measured in the same rounds
    extra_bytes: int | None = None  # allocator's peak above the inputs, gradients included
    beyond_gradients_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    gradient_ratios: dict[str, float] = field(default_factory=dict)  # error over a baseline's

    @property
    def label(self) -> str:
        return self.provider


class CaseJob:
    """A case as the run takes it: `gate`, and after the gates of all cases `ready`, `turn`, `finish`."""

    def __init__(
        self,
        case,
        providers: Sequence[Provider],
        *,
        device: str,
        rounds: int = ROUNDS,
        slow_too: bool = True,  # peers whose products torch emulates here: minutes a call
    ):
        self.case, self.device, self.rounds, self.slow_too = case, device, rounds, slow_too
        self.name, self.suite = case.name, case.suite
        self.providers = [p for p in providers if takes_part(p, case)]
        self.rows: list[Row] = []
        self.legend = report.LEGEND

    def gate(self) -> list[Row]:
        """A row a provider, in their order; the truth and the inputs are let go of again."""
        torch.compiler.reset()  # a peer recompiled too often would silently run eager
        inputs = self.case.inputs(self.device)
        self.rows = [self._gate(provider, inputs) for provider in self.providers]
        return self.rows

    def ready(self) -> None:
        """Inputs again, memory, and a call each, so that nothing compiles in the rounds."""
        torch.compiler.reset()
        self._inputs = inputs = self.case.inputs(self.device)
        calls, rounds = {}, {}
        for provider, row in zip(self.providers, self.rows, strict=True):
            if row.status != "passed":
                continue
            call = partial(provider.run, inputs)
            ledger.at(f"{self.name}: {provider.name}")
            start = time.perf_counter()
            try:
                call()
                seconds = time.perf_counter() - start
                size = measure.peak_bytes(call, self.device)
            except Exception as error:  # out of memory, which the gate's yardsticks had left
                row.status, row.reason = "refused", measure.said(error)
            if row.status == "refused":
                measure.recover(self.device)
                continue
            calls[provider.name] = call
            if provider.gated and not provider.ours and seconds > SLOW:
                rounds[provider.name] = SLOW_ROUNDS
            if provider.gated:
                row.extra_bytes = size
                row.beyond_gradients_bytes = size - inputs.gradient_bytes
        self._turns = measure.Turns(calls, self.device, rounds)
        self._roof = Roof(self.device, self.case.dtype)

    def turn(self) -> None:
        self._roof.turn()
        self._turns.turn()

    def finish(self) -> list[Row]:
        """The rows with their times; the inputs are let go of."""
        timed = {}
        for provider, row in zip(self.providers, self.rows, strict=True):
            if reason := self._turns.failed.get(provider.name):
                row.status, row.reason = "refused", reason
                continue
            row.seconds = self._turns.seconds.get(provider.name, [])
            if not row.seconds:
                continue
            low, row.median, high = measure.quartiles(row.seconds)
            row.quartiles, row.status = (low, high), "measured"
            row.flop, row.bytes = self._inputs.flop, self._inputs.bytes
            row.roof = self._roof.share(row.flop, row.bytes, row.median)
            row.rate = provider.work(self._inputs, row.median) if not provider.gated else ""
            timed[provider.name] = row
        for row in timed.values():
            row.times_gemm = _ratio(row, timed.get("gemm"))
            row.times_sepo = _ratio(row, timed.get("sepo"))
        self.roof, self.about = str(self._roof), self._roof.rates
        del self._inputs, self._turns, self._roof
        return self.rows

    def text(self) -> str:
        return report.table(self.rows, self.roof)

    def _gate(self, provider: Provider, inputs) -> Row:
        peer = provider.gated and not provider.ours
        slow = dtypes.quick(self.case.dtype, self.device) != self.case.dtype
        if slow and peer and not self.slow_too:
            return _row(provider, self.case, reason=EMULATED.format(provider.name))
        what = f"{self.name}: {provider.name}"
        if ledger.died_in(what):
            row = _row(provider, self.case, reason="the process died in it")
            row.status = "refused"
            return row
        ledger.at(what)
        row = _gate(provider, self.case, inputs)
        if row.status == "refused":
            measure.recover(self.device)
        return row


def takes_part(provider: Provider, case) -> bool:
    name = provider.name.partition(":")[0]  # "sepo" in a case's list means all of ours
    return name not in case.without and (not case.only or name in case.only)


def _gate(provider: Provider, case, inputs) -> Row:
    row = _row(provider, case)
    if reason := provider.why_not(inputs):
        row.reason = reason
        return row
    row.version, row.note = provider.version(), provider.note(inputs)
    try:
        result = provider.run(inputs)
    except Exception as error:  # a peer may fail in any way; the others are still to be measured
        row.status, row.reason = "refused", measure.said(error)
        return row
    if not provider.gated:
        row.status = "passed"
        return row
    absent = [name for name in inputs.due(provider.objective) if name not in result]
    if absent:
        row.status, row.reason = "refused", f"gives no {', '.join(absent)}"
        return row
    row.errors = inputs.errors(result, provider.objective)
    limits = inputs.limits(provider.ours, provider.objective)
    wrong = [
        f"{name} is off by {error:.2e}, limit {limits[name]:.2e}"
        for name, error in row.errors.items()
        if not error <= limits[name]  # a NaN is wrong
    ]
    row.status, row.reason = ("refused", "; ".join(wrong)) if wrong else ("passed", "")
    if provider.objective == "weighted":
        for baseline, errors in inputs.baselines.items():
            for name, error in errors.items():
                if name in row.errors:
                    row.gradient_ratios[f"{name}/{baseline}"] = row.errors[name] / max(error, 1e-30)
    return row


def _row(provider: Provider, case, reason: str = "") -> Row:
    about = case.suite, case.name, provider.name, "", "skipped", provider.ours
    return Row(*about, reason, shape=_shape(case))


def _shape(case) -> dict:
    about = dataclasses.asdict(case) | {"M": getattr(case, "M", None)}
    hidden = "name", "only", "without", "long"
    return {k: str(v) if k == "dtype" else v for k, v in about.items() if k not in hidden}


def _ratio(row: Row, other: Row | None) -> float | None:
    return row.median / other.median if other is not None and other.median else None


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
