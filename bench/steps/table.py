"""Tables for eyes, and the bars that the project set itself."""

import statistics

from bench.harness import Row

HEADER = (
    f"{'':32}{'tokens':>8}{'rows':>7}{'s a pair':>10}{'q1':>8}{'q3':>8}{'x sepo':>8}"
    f"{'MiB a pair':>12}{'total GiB':>11}{'GFLOP':>8}{'MB':>7}{'roof':>7}{'MFU':>7}  {'loss':<9}{'gradient':<9}"
)
LEGEND = """\
Of each pair: tokens through the policy's trunk (padding included), rows through the head, seconds of
a whole step (batch, forward, backward, clipping, AdamW): median and quartiles of the rounds, in which
all take turns on the same pairs. x sepo: median over rounds of the time over that of sepo 30 %, or of the
method by itself.
MiB a pair: the allocator's peak beyond weights, gradients, AdamW's moments and a reference; total: with
them, for the step. GFLOP: what the model needs (no padding, no recomputation); MB: weights, gradients
and moments, moved as seldom as a step can; roof: the share of what a product and a copy reach in this
run; MFU: of the GPU's data sheet.
loss, gradient: errors of what is timed, against float32 and plain PyTorch (the gradient's over its
length). Nothing is timed whose float32 answer is wrong by 1e-4 in the loss, 1e-3 in the gradient."""

Bars = tuple[tuple[str, str, float], ...]
SEPO, TRL_DPO, TRL_SIMPO = "sepo 30 %", "TRL DPO", "TRL SimPO"
BARS = (  # quick, slow, how many times at least
    (SEPO, TRL_DPO, 6.0),
    (SEPO, TRL_SIMPO, 4.0),
    ("simpo", TRL_SIMPO, 2.2),
    ("dpo, cached reference", TRL_DPO, 2.5),
)
KL_LEAST = 3.0  # of a step with a KL: times as fast as full softmaxes, and times less memory
MEMORY_BARS = (
    (SEPO, TRL_DPO, 3.0),
    (f"{SEPO}, checkpointing", f"{TRL_DPO}, checkpointing", 3.0),  # both as TRL has it by default
)


def table(rows: list[Row], base: str = SEPO) -> str:  # the contender that "x sepo" divides by
    lines, divisor = [HEADER], quickest(rows, base)
    for group in dict.fromkeys(row.group for row in rows):
        lines.append("")
        lines += [_line(row, divisor) for row in rows if row.group == group]
    return "\n".join(lines)


def _line(row: Row, base: Row | None) -> str:
    if row.status != "measured":
        return f"  {row.provider:30}{row.status}: {row.reason}"
    times = ratio(row, base)
    share = lambda x: "" if x is None else f"{x:.1%}"
    work = f"{row.flop / 1e9:8.0f}{row.bytes / 1e6:7.0f}{share(row.roof):>7}{share(row.mfu):>7}"
    text = f"  {row.provider:30}{row.tokens:8.0f}{row.rows:7.0f}"
    seconds = f"{row.median:10.3f}" + "".join(f"{x:8.3f}" for x in row.quartiles)
    text += seconds if row.seconds else f"{'':26}"
    text += f"{times:8.2f}" if times is not None else f"{'':8}"
    text += f"{row.peak_bytes / 2**20:12.0f}{row.total_bytes / 2**30:11.2f}{work}"
    return f"{text}  {row.errors['loss']:<9.0e}{row.errors['gradient']:<9.0e}{row.note}".rstrip()


def bars(rows: list[Row], faster: Bars = BARS, smaller: Bars = MEMORY_BARS) -> str:
    """Each bar with what was found; nothing of those that were not measured."""
    lines = []
    told = lambda text, found, least: lines.append(
        f"{text}: {'reaches' if found >= least else 'misses'} {least:g}"
    )
    for quick, slow, least in faster:
        times = ratio(quickest(rows, slow), quickest(rows, quick))
        if times is not None:
            told(f"{quick} is {times:.2f} x as fast as {slow}", times, least)
    for name, other, least in smaller:
        small, large = quickest(rows, name), quickest(rows, other)
        if small and large:
            times = large.peak_bytes / small.peak_bytes
            told(f"{name} needs 1/{times:.2f} of the memory of {other}", times, least)
    return "\n".join(lines)


def kl_bars(method: str) -> tuple[Bars, Bars]:
    """Faster, and smaller, than the straightforward step by at least KL_LEAST."""
    dense, found = f"dense {method}", [method, f"{method}, cheap again"]
    if method == "tdpo2":  # a mask reads the reference's layers, which no store keeps
        found.insert(1, "tdpo2, cached rows")
    faster = tuple((name, dense, KL_LEAST) for name in found)
    again = f"{method}, checkpointing", f"{dense}, checkpointing", KL_LEAST
    return faster, (*faster, again)


def quickest(rows: list[Row], name: str) -> Row | None:
    """The contender of that name, with its quickest attention."""
    found = [row for row in rows if row.status == "measured" and row.contender == name]
    return min(found, key=lambda row: row.median, default=None)


def ratio(slow: Row | None, quick: Row | None) -> float | None:
    """Median of the rounds that both have: each is the same pairs, minutes apart at most."""
    if slow is None or quick is None or not slow.seconds or not quick.seconds:
        return None
    return statistics.median(a / b for a, b in zip(slow.seconds, quick.seconds, strict=False))
