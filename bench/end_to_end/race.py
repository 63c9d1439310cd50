"""All contenders on the same rounds: first the gate, then memory, then the rounds in turn."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from bench import measure
from bench.end_to_end import flops, gate
from bench.end_to_end.contender import Contender
from bench.end_to_end.weights import Weights
from bench.leg import ledger
from bench.roof import Roof
from sepo.data.types import ScoredPair


@dataclass
class Row:
    """One contender; tokens, rows, seconds and peak_bytes are a pair's."""

    contender: str
    attention: str
    group: str
    objective: str
    status: str = "skipped"  # | "refused" | "passed", by the gate | "measured"
    reason: str = ""
    note: str = ""
    suite: str = "step"
    case: str = ""
    tokens: float = 0.0  # through the policy's trunk, padding included
    rows: float = 0.0  # through the head
    seconds: list[float] = field(default_factory=list)  # of each round
    median: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    peak_bytes: float = 0.0  # beyond what lies there between two steps, and the gradients
    total_bytes: float = 0.0  # with all that: weights, gradients, AdamW's moments, a reference
    flop: float = 0.0  # that the model needs: no padding, no recomputation
    bytes: float = 0.0  # weights, gradients and AdamW's moments, moved as seldom as a step can
    roof: float | None = None  # share of the roof measured in the same rounds
    mfu: float | None = None  # over the GPU's dense bfloat16 peak
    float32_errors: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # in the precision that is timed

    @property
    def label(self) -> str:
        return f"{self.contender} ({self.attention})" if self.attention else self.contender

    @property
    def ours(self) -> bool:
        return self.group in ("sepo", "savings")


class Race:
    """As the run takes it: `gate`, and after all gates `ready`, `turn`, `finish`."""

    def __init__(
        self,
        contenders: list[Contender],
        weights: Weights,
        rounds: list[list[ScoredPair]],  # round 0 is the gate's
        *,
        case: str = "",
        truth: Callable[[str, Weights, list], gate.Truth] = gate.truth,  # objective, weights, pairs
        dtype: torch.dtype = torch.bfloat16,  # that is timed
    ):
        self.contenders, self.weights, self.deal = contenders, weights, rounds
        self.truth, self.dtype = truth, dtype
        self.rounds, self.device = len(rounds) - 1, weights.model.device.type
        self.rows = [
            Row(c.name, c.attention, c.group, c.objective, case=case, reason=c.absent)
            for c in contenders
        ]

    def gate(self) -> list[Row]:
        """A row a contender, in their order; one that is wrong or missing has no speed."""
        both = list(zip(self.contenders, self.rows, strict=True))
        for objective in dict.fromkeys(c.objective for c in self.contenders if c.step):
            expected = self.truth(objective, self.weights, self.deal[0])
            for contender, row in both:
                if contender.step and contender.objective == objective:
                    if ledger.died_in(self._what(row)):
                        row.status, row.reason = "refused", "the process died in it"
                        continue
                    ledger.at(self._what(row))
                    check = partial(gate.check, contender, expected, self.weights)
                    _gate(contender, row, check, self.dtype)
        return self.rows

    def ready(self) -> None:
        """Memory, and a step of each, so that the optimiser has its states and nothing compiles."""
        calls, turns = {}, {}
        for contender, row in self._racing():
            ledger.at(self._what(row))
            try:
                _memory(row, contender, self.weights, self.deal)
            except Exception as error:
                _out(row, measure.said(error))
            if row.status != "passed":
                self.weights.optimizer.zero_grad()
                measure.recover(self.device)
                continue
            calls[contender.label] = partial(self._step, contender)
            if contender.turns is not None:
                turns[contender.label] = contender.turns
        self._turns, self._roof = (
            measure.Turns(calls, self.device, turns),
            Roof(self.device, self.dtype),
        )
        self._number = 0

    def turn(self) -> None:
        """One round: gradients, clipping and AdamW of each contender, on the same pairs."""
        self._number += 1
        self._roof.turn()
        self._turns.turn()

    def finish(self) -> list[Row]:
        """The rows with their times."""
        done = self.deal[1 : 1 + self._number]
        moved = _bytes(self.weights) * len(done)
        for contender, row in self._racing():
            if reason := self._turns.failed.get(contender.label):
                _out(row, reason)
                continue
            seconds = self._turns.seconds[contender.label]
            _describe(row, contender, seconds, done, moved, self._roof)
        self.roof, self.about = str(self._roof), self._roof.rates
        return self.rows

    def _what(self, row: Row) -> str:
        return f"{row.case}: {row.label}"

    def _racing(self) -> list[tuple[Contender, Row]]:
        both = zip(self.contenders, self.rows, strict=True)
        return [(contender, row) for contender, row in both if row.status == "passed"]

    def _step(self, contender: Contender) -> None:
        contender.step(self._number)
        self.weights.finish()


def _out(row: Row, reason: str) -> None:
    """It has no speed; of a saving that is left off that's no failure of ours: it is plain PyTorch."""
    row.status, row.reason = "skipped" if row.group == "savings" else "refused", reason


def _gate(contender: Contender, row: Row, check: Callable, dtype: torch.dtype) -> None:
    reason = ""
    if dtype == torch.float32:  # nothing is lowered: what is timed is compared, once
        contender.lower()
        reason, row.float32_errors = check(gate.FLOAT32)
        row.errors = row.float32_errors
    else:
        if contender.float32:
            reason, row.float32_errors = check(gate.FLOAT32)
        if not reason:
            contender.lower()
            reason, row.errors = check(gate.BFLOAT16)
    row.status, row.reason = ("refused", reason) if reason else ("passed", "")


def _memory(row: Row, contender: Contender, weights: Weights, rounds: list) -> None:
    """Of the longest round, with gradients there already: they are not the contender's."""
    longest = max(range(1, len(rounds)), key=lambda number: contender.work(number).tokens)
    for parameter in weights.parameters:
        parameter.grad = parameter.new_zeros(parameter.shape)
    peak = measure.peak_bytes(lambda: contender.step(longest), weights.model.device.type)
    row.peak_bytes = peak / len(rounds[longest])
    row.total_bytes = peak + weights.static_bytes + contender.keeps_bytes
    weights.finish()  # so that the optimiser has its states before anything is timed


def _describe(
    row: Row,
    contender: Contender,
    seconds: list[float],
    rounds: list[list],  # those that were raced
    moved: float,  # bytes, of all of them
    roof: Roof,
) -> None:
    """What was measured, and the work it took: of all rounds, so that all rows have the same."""
    row.note, row.status = contender.note, "measured"
    row.seconds = [t / len(pairs) for t, pairs in zip(seconds, rounds, strict=False)]
    if row.seconds:
        low, row.median, high = measure.quartiles(row.seconds)
        row.quartiles = low, high
    work, pairs = [contender.work(n + 1) for n in range(len(rounds))], sum(map(len, rounds))
    row.tokens, row.rows = sum(w.tokens for w in work) / pairs, sum(w.rows for w in work) / pairs
    row.flop, row.bytes = sum(w.flops for w in work) / pairs, moved / pairs
    if row.seconds:
        row.roof = roof.share(row.flop, row.bytes, row.median)
    if seconds and (peak := flops.peak()):
        row.mfu = sum(w.flops for w in work[: len(seconds)]) / sum(seconds) / peak


def _bytes(weights: Weights) -> float:
    """Of a step: weights read forward and backward, then the optimiser's reads and writes."""
    # gradients written and read, both moments read and written, weights read and written
    return weights.static_bytes / 4 * (2 + 2 + 4 + 2)
