"""What the leg found, in words: a line a stage, and a last one that names what has no number."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tools.leg.stages import FAILED, PASSED, Result
from tools.leg.wheels import RIVALS

WELL, NOT_WELL, NOT_MEASURED = 0, 1, 3  # exit statuses


def rows(path: Path, start: int) -> list[dict]:
    """The benchmark's rows that came after so many bytes; a line that was cut off is none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        found = [_parsed(line) for line in file.read().decode(errors="replace").splitlines()]
    return [row for row in found if row is not None and "case" in row]


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def absent_rivals(records: Sequence[dict]) -> list[str]:
    """Those that make gpu-wheels carries and are not here, and all that is here and can't be imported."""
    said = (re.fullmatch(r"(\S+) is not installed", row["reason"]) for row in records)
    missing = {match[1] for match in said if match}
    absent = [f"{name} (a rival, not installed)" for name in RIVALS if name in missing]
    for row in records:
        if re.match("(Import|ModuleNotFound)Error", row["reason"]):
            absent.append(f"{row['provider']} ({row['reason']})")
    return list(dict.fromkeys(absent))


def dead_rivals(records: Sequence[dict]) -> list[str]:
    """Rivals that were refused a time: wrong, out of memory, or the death of their process."""
    return list(
        dict.fromkeys(
            f"{row['provider']} in {row['case']}"
            for row in records
            if not row["ours"] and row["status"] == "refused"
        )
    )


def summary(
    results: Sequence[Result],
    records: Sequence[dict],
    left_out: Sequence[str] = (),  # groups that were not asked for
) -> tuple[str, int]:  # text, exit status
    """Well is only a leg that measured all it was asked for, beside every rival."""
    width = max(len(r.stage) for r in results)
    lines = [
        f"{r.stage:{width}} {r.status:8} {r.seconds:6.1f} s{'  ' + r.reason if r.reason else ''}"
        for r in results
    ]
    if refused := dead_rivals(records):
        lines.append(f"refused rivals: {', '.join(refused)}")
    bad = [r.stage for r in results if r.status == FAILED]
    without = [r.stage for r in results if r.status not in (PASSED, FAILED)]
    without += absent_rivals(records)
    parts = [f"not well: {', '.join(bad)}"] if bad else []
    parts += [f"not measured: {', '.join(without)}"] if without else []
    parts = parts or ["all is well" if not left_out else "all that was asked for is well"]
    parts += [f"not asked for: {', '.join(left_out)}"] if left_out else []
    code = NOT_WELL if bad else NOT_MEASURED if without else WELL
    return "\n".join([*lines, "; ".join(parts)]), code
