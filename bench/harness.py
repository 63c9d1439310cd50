"""One case, all its contenders: first the gate, then memory, then rounds in turn.

A contender that is missing is skipped with its reason, one that is wrong is refused with its error:
neither has a speed. A case makes its inputs; these know what is right, and what a call costs.
"""

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from bench import ledger, measure, precision
from bench.contender import Contender

ROUNDS = 5
EMULATED = "torch multiplies bfloat16 slowly on this machine; --providers {} has it measured"


@dataclass
class Row:
    """One contender in one case; times in seconds, errors as the inputs' `errors` says."""

    suite: str
    case: str
    provider: str  # the contender's label
    status: str = "skipped"  # | "refused" | "passed", by the gate | "measured"
    ours: bool = False
    reason: str = ""
    note: str = ""
    seconds: list[float] = field(default_factory=list)  # of each round; of a step, a pair's
    median: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    flop: float = 0.0  # that the work can't do without; of a step no padding, no recomputation
    bytes: float = 0.0  # each input read once, each output written once; of a step the weights' own
    roof: float | None = None  # share of the roof measured in the same rounds
    errors: dict[str, float] = field(default_factory=dict)  # in the precision that is timed
    # an operation's
    version: str = ""
    shape: dict = field(default_factory=dict)
    rate: str = ""
    times_gemm: float | None = None  # median over the median of the bare products of this run
    times_sepo: float | None = None  # median over that of sepo's "auto" of this run
    extra_bytes: int | None = None  # allocator's peak above the inputs, gradients included
    beyond_gradients_bytes: int | None = None
    gradient_ratios: dict[str, float] = field(default_factory=dict)  # error over a baseline's
    # a step's, of a pair
    contender: str = ""
    attention: str = ""
    group: str = ""
    objective: str = ""
    tokens: float = 0.0  # through the policy's trunk, padding included
    rows: float = 0.0  # through the head
    peak_bytes: float = 0.0  # beyond what lies there between two steps, and the gradients
    total_bytes: float = 0.0  # with all that: weights, gradients, AdamW's moments, a reference
    mfu: float | None = None  # over the GPU's dense bfloat16 peak
    float32_errors: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict:
        """As a file has it: of the two kinds of fields, those of its suite."""
        names = [f.name for f in dataclasses.fields(self)]
        operation, step = names.index("version"), names.index("contender")
        other = names[operation:step] if self.suite == "step" else names[step:]
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in other}


class Job:
    """A case as the run takes it: `gate`, and after all cases' gates `ready`, `turn`, `finish`."""

    def __init__(
        self,
        case,
        contenders: Sequence[Contender] = (),  # none: the inputs bring them
        *,
        device: str,
        rounds: int = ROUNDS,
        slow_too: bool = True,  # peers whose products torch emulates here: minutes a call
    ):
        self.case, self.device, self.rounds, self.slow_too = case, device, rounds, slow_too
        self.name, self.suite, self.legend = case.name, case.suite, case.legend
        self.contenders = [c for c in contenders if case.takes(c)]
        self.rows: list[Row] = []
        self.about: dict = {}  # of every row in a file

    def records(self) -> list[dict]:
        return [row.record() for row in self.rows]

    def gate(self) -> list[Row]:
        """A row a contender, in their order; inputs that can be made again are let go of."""
        inputs = self._made()
        self.contenders = inputs.contenders or self.contenders
        self.rows = [self._row(contender) for contender in self.contenders]
        objectives = [contender.objective for contender in self.contenders]
        both = zip(self.contenders, self.rows, strict=True)
        for contender, row in sorted(both, key=lambda pair: objectives.index(pair[0].objective)):
            self._gate(contender, row, inputs)
        self._inputs = inputs if self.case.kept else None
        return self.rows

    def ready(self) -> None:
        """Inputs, memory, and a call each, so that nothing compiles in the rounds."""
        self._inputs = self._inputs or self._made()
        calls, rounds = {}, {}
        for contender, row in self._passed():
            ledger.at(f"{self.name}: {row.provider}")
            try:
                few = self._inputs.ready(contender, row)
            except Exception as error:  # out of memory, which the gate's yardsticks had left
                _out(row, measure.said(error))
            if row.status != "passed":
                self._recover(self._inputs)
                continue
            calls[row.provider] = self._inputs.call(contender)
            if few is not None:
                rounds[row.provider] = few
        self._turns = measure.Turns(calls, self.device, rounds)
        self._roof = measure.Roof(self.device, self.case.dtype)
        self._done = 0

    def turn(self) -> None:
        self._done += 1
        self._inputs.number = self._done
        self._roof.turn()
        self._turns.turn()

    def finish(self) -> list[Row]:
        """The rows with their times; the inputs are let go of."""
        inputs, roof, timed = self._inputs, self._roof, {}
        for contender, row in self._passed():
            if reason := self._turns.failed.get(row.provider):
                _out(row, reason)
                continue
            seconds = self._turns.seconds[row.provider]
            if not seconds and contender.rounds != 0:
                continue
            row.seconds, row.status = inputs.scaled(seconds), "measured"
            inputs.describe(contender, row, self._done)
            if row.seconds:
                low, row.median, high = np.percentile(row.seconds, (25, 50, 75)).tolist()
                row.quartiles = low, high
                row.roof = roof.share(row.flop, row.bytes, row.median)
                row.rate = contender.rate(inputs, row.median)
                timed[row.provider] = row
        over = lambda row, name: row.median / timed[name].median if name in timed else None
        for row in timed.values():
            row.times_gemm, row.times_sepo = over(row, "gemm"), over(row, "sepo")
        self.roof, self.heading = str(roof), inputs.heading
        self.about = inputs.about | roof.rates
        del self._inputs, self._turns, self._roof, inputs
        gc.collect()  # modules are cycles; the next case's memory is not to be theirs
        return self.rows

    def text(self) -> str:
        return self.case.text(self.rows, self.roof, self.heading)

    def _made(self):
        if not self.case.kept:
            torch.compiler.reset()  # a peer recompiled too often would silently run eager
        return self.case.inputs(self.device)

    def _row(self, contender: Contender) -> Row:
        about = {k: getattr(contender, k) for k in ("ours", "attention", "group", "objective")}
        about |= dict(contender=contender.name, shape=self.case.shape)
        return Row(self.suite, self.name, contender.label, **about)

    def _gate(self, contender: Contender, row: Row, inputs) -> None:
        peer = contender.gated and not contender.ours
        slow = precision.quick(self.case.dtype, self.device) != self.case.dtype
        if slow and peer and not self.slow_too:
            row.reason = EMULATED.format(contender.name)
            return
        what = f"{self.name}: {row.provider}"
        if ledger.died_in(what):
            row.status, row.reason = "refused", "the process died in it"
            return
        ledger.at(what)
        judge(contender, row, inputs)
        if row.status == "refused":
            self._recover(inputs)

    def _recover(self, inputs) -> None:
        inputs.forget()
        measure.recover(self.device)

    def _passed(self) -> list[tuple[Contender, Row]]:
        both = zip(self.contenders, self.rows, strict=True)
        return [(contender, row) for contender, row in both if row.status == "passed"]


def judge(contender: Contender, row: Row, inputs) -> None:
    """The gate for one: missing, wrong in a precision that it is compared in, or passed."""
    if reason := contender.why_not(inputs):
        row.reason = reason
        return
    row.version, row.note = contender.version(), contender.note(inputs)
    row.status = "passed"
    for fields, limits in inputs.passes(contender):
        reason, errors = check(contender, inputs, limits)
        for name in fields:
            setattr(row, name, errors)
        if reason:
            row.status, row.reason = "refused", reason
            break
    if row.errors and contender.objective == "weighted":
        for baseline, errors in inputs.baselines.items():
            for name in errors.keys() & row.errors.keys():
                ratio = row.errors[name] / max(errors[name], 1e-30)
                row.gradient_ratios[f"{name}/{baseline}"] = ratio


def check(
    contender: Contender,
    inputs,
    limits: dict[str, float | None],  # of every error; None: any
) -> tuple[str, dict[str, float]]:  # why it is refused or "", errors
    """Of one call. Nothing is timed whose answer is wrong."""
    try:
        result = inputs.result_of(contender)
    except Exception as error:  # a peer may fail in any way; the others are still to be measured
        return measure.said(error), {}
    if not contender.gated:
        return "", {}
    if absent := [name for name in inputs.due(contender.objective) if name not in result]:
        return f"gives no {', '.join(absent)}", {}
    errors = inputs.errors(result, contender.objective)
    wrong = [
        f"{name} is off by {error:.2e}, limit {limits[name]:.2e}"
        for name, error in errors.items()
        if limits[name] is not None and not error <= limits[name]  # a NaN is wrong
    ]
    return "; ".join(wrong), errors


def _out(row: Row, reason: str) -> None:
    """It has no speed; of a saving that is left off that's no failure of ours: it is plain PyTorch."""
    row.status, row.reason = "skipped" if row.group == "savings" else "refused", reason


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
