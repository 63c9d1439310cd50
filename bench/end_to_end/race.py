"""All contenders on the same rounds: first the gate, then memory, then the rounds in turn."""

from collections.abc import Callable
from dataclasses import dataclass, field

from bench import measure
from bench.end_to_end import flops, gate
from bench.end_to_end.contender import Contender
from bench.end_to_end.weights import Weights
from sepo.data.types import ScoredPair


@dataclass
class Row:
    """One contender; tokens, rows, seconds and peak_bytes are a pair's."""

    contender: str
    attention: str
    group: str
    objective: str
    status: str = "skipped"  # | "refused" | "measured"
    reason: str = ""
    note: str = ""
    tokens: float = 0.0  # through the policy's trunk, padding included
    rows: float = 0.0  # through the head
    seconds: list[float] = field(default_factory=list)  # of each round
    median: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    peak_bytes: float = 0.0  # beyond what lies there between two steps, and the gradients
    total_bytes: float = 0.0  # with all that: weights, gradients, AdamW's moments, a reference
    mfu: float | None = None  # over the GPU's dense bfloat16 peak
    float32_errors: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # in the precision that is timed

    @property
    def label(self) -> str:
        return f"{self.contender} ({self.attention})" if self.attention else self.contender


def race(
    contenders: list[Contender],
    weights: Weights,
    rounds: list[list[ScoredPair]],  # round 0 is the gate's
    *,
    truth: Callable[[str, Weights, list], gate.Truth] = gate.truth,  # objective, weights, pairs
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """A row a contender, in their order; one that is wrong or missing has no speed."""
    rows = {
        c.label: Row(c.name, c.attention, c.group, c.objective, reason=c.absent) for c in contenders
    }
    _gate([c for c in contenders if c.step], weights, rounds[0], rows, truth)
    running = [c for c in contenders if rows[c.label].status == "measured"]
    tell(f"gate: {len(running)} of {len(contenders)} contenders may run")
    device, calls, turns = weights.model.device.type, {}, {}
    for contender in running:
        row, name = rows[contender.label], contender.label
        _memory(row, contender, weights, rounds)
        tell(f"memory: {name} {row.peak_bytes / 2**20:.0f} MiB a pair")
        calls[name] = _turns(contender, weights, rounds)
        most = len(rounds) - 1
        turns[name] = most if contender.turns is None else min(most, contender.turns)
    times = measure.interleaved(calls, turns, device)
    for contender in running:
        _describe(rows[contender.label], contender, times[contender.label], rounds)
    return list(rows.values())


def _gate(
    contenders: list[Contender],
    weights: Weights,
    pairs: list,
    rows: dict[str, Row],
    truth: Callable,
) -> None:
    for objective in dict.fromkeys(c.objective for c in contenders):
        expected = truth(objective, weights, pairs)
        for contender in (c for c in contenders if c.objective == objective):
            row, reason = rows[contender.label], ""
            if contender.float32:
                reason, row.float32_errors = gate.check(contender, expected, weights, gate.FLOAT32)
            if not reason:
                contender.lower()
                reason, row.errors = gate.check(contender, expected, weights, gate.BFLOAT16)
            row.status, row.reason = ("refused", reason) if reason else ("measured", "")


def _memory(row: Row, contender: Contender, weights: Weights, rounds: list) -> None:
    """Of the longest round, with gradients there already: they are not the contender's."""
    longest = max(range(1, len(rounds)), key=lambda number: contender.work(number).tokens)
    for parameter in weights.parameters:
        parameter.grad = parameter.new_zeros(parameter.shape)
    peak = measure.peak_bytes(lambda: contender.step(longest), weights.model.device.type)
    row.peak_bytes = peak / len(rounds[longest])
    row.total_bytes = peak + weights.static_bytes + contender.keeps_bytes
    weights.finish()  # so that the optimiser has its states before anything is timed


def _turns(contender: Contender, weights: Weights, rounds: list) -> Callable[[], None]:
    """A call for each round: gradients, clipping, AdamW."""
    numbers = iter(range(1, len(rounds)))

    def turn() -> None:
        contender.step(next(numbers))
        weights.finish()

    return turn


def _describe(row: Row, contender: Contender, seconds: list[float], rounds: list) -> None:
    """What was measured, and the work it took: of all rounds, so that all rows have the same."""
    row.note = contender.note
    row.seconds = [t / len(pairs) for t, pairs in zip(seconds, rounds[1:], strict=False)]
    if row.seconds:
        low, row.median, high = measure.quartiles(row.seconds)
        row.quartiles = low, high
    work, pairs = [contender.work(n) for n in range(1, len(rounds))], sum(map(len, rounds[1:]))
    row.tokens, row.rows = sum(w.tokens for w in work) / pairs, sum(w.rows for w in work) / pairs
    if seconds and (peak := flops.peak()):
        row.mfu = sum(w.flops for w in work[: len(seconds)]) / sum(seconds) / peak
