"""Everything that is measured, and a way to run it where pytest is not installed."""

from collections.abc import Callable
from pathlib import Path

from bench import providers, report
from bench.harness import ROUNDS, Row, run_case
from bench.operations import head, kl, topk
from bench.provider import Provider

OPERATIONS = ((head, providers.HEAD), (kl, providers.KL), (topk, providers.TOPK))
QUICK = ("head-bf16-50", "kl-policy-ref", "topk-30")
EXTENTS = ("quick", "usual", "all")


def entries(device: str, extent: str) -> list[tuple[object, tuple[Provider, ...]]]:
    """Cases with the providers of their operation; `extent` is one of EXTENTS."""
    found = [
        (case, contenders)
        for module, contenders in OPERATIONS
        for case in module.cases(device)
        if extent == "all" or (case.name in QUICK if extent == "quick" else not case.long)
    ]
    # a run that is cut short has then measured what only a GPU can
    return sorted(found, key=lambda entry: "large" not in entry[0].name)


def run(
    device: str,
    path: Path,  # JSON lines are appended, a case at a time
    *,
    extent: str = "usual",
    rounds: int = ROUNDS,
    write: Callable[[str], None] = print,
) -> list[Row]:
    """Measure everything and print a table a case; the rows tell what was skipped or refused."""
    found = []
    write(f"{report.machine(device)}\n{report.LEGEND}")
    for case, contenders in entries(device, extent):
        rows = run_case(case, contenders, device=device, rounds=rounds)
        report.append(rows, path, device)
        write(report.table(rows))
        found += rows
    return found
