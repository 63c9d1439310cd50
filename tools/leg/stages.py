"""Stages: a process each, with a limit of its own. None takes another with it."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ledger

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, STOPPED, SKIPPED = "passed", "failed", "stopped", "skipped"


@dataclass(frozen=True)
class Stage:
    name: str
    group: str
    seconds: float  # its share; what it leaves unused goes to those after it
    command: tuple[str, ...]
    absent: str = ""  # why it cannot run here, if it cannot
    again: int = 0  # times that it is started anew after its process died, without what killed it


@dataclass(frozen=True)
class Result:
    stage: str
    status: str
    seconds: float
    reason: str


def run_stages(
    todo: Sequence[Stage],
    *,
    scale: float = 1.0,  # of the stages' seconds
    env: dict[str, str] | None = None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run all of them; each is stopped when its share and what was left over are used up."""
    deadline, results = time.monotonic(), []
    for stage in todo:
        deadline += scale * stage.seconds
        print(f"\n== {stage.name}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            status, reason = _run(stage, deadline, env, Path(folder) / "ledger")
        results.append(Result(stage.name, status, round(time.monotonic() - start, 1), reason))
        done(results[-1])
    return results


def _run(
    stage: Stage,
    deadline: float,  # on the monotonic clock
    env: dict[str, str] | None,
    path: Path,  # of the ledger
) -> tuple[str, str]:  # status, reason
    if stage.absent:
        return SKIPPED, stage.absent
    env = (os.environ if env is None else env) | {ledger.VARIABLE: str(path)}
    deaths = []
    for _ in range(1 + stage.again):
        left = deadline - time.monotonic()
        if left <= 0:
            return STOPPED, "; ".join([*deaths, "no time was left"])
        try:
            code = _wait(stage.command, env, left)
        except OSError as error:
            return FAILED, str(error)
        if code is None:
            return STOPPED, "; ".join([*deaths, f"after {left:.0f} s"])
        if code == ledger.REFUSED:
            said = path.read_text().splitlines() if path.exists() else []
            return SKIPPED, said[-1] if said else "it refused"
        if code >= 0 and code != ledger.BROKEN:
            break
        how = signal.Signals(-code).name if code < 0 else "the device is broken"
        deaths.append(f"its process died in {mark(path)} ({how})")
    else:
        return FAILED, "; ".join(deaths)
    if code != 0:
        deaths.append(f"exit status {code}")
    return (FAILED, "; ".join(deaths)) if deaths else (PASSED, "")


def mark(path: Path) -> str:
    """The last thing that a dead process was at, which is marked."""
    found = path.read_text().splitlines() if path.exists() else []
    last = found[-1] if found and not found[-1].startswith(ledger.DEAD) else "its start"
    with path.open("a") as file:
        file.write(f"{ledger.DEAD}{last}\n")
    return last


def _wait(command: Sequence[str], env: dict[str, str], left: float) -> int | None:
    """Its exit status; None: it was stopped, with all that it had started."""
    # a group of its own, so that compilers and workers can be stopped with it
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, process_group=0
    )
    try:
        return process.wait(timeout=left)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:  # out of time, or the leg itself is stopped
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
