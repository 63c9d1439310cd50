"""Rows for eyes (a table a case) and for files (one JSON object a line)."""

import dataclasses
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from bench.harness import ROUNDS, Row

ROOT = Path(__file__).parents[1]
HEADER = (
    f"{'':23}{'ms':>9}{'q1':>9}{'q3':>9}{'x gemm':>8}{'x sepo':>8}{'MiB':>8}{'+grads':>8}"
    f"  {'values':<9}{'dX':<9}{'dW':<9}{'dX plain/once':<15}{'dW plain/once':<15}"
)
LEGEND = """\
ms: median of the rounds, q1 and q3 their quartiles. x gemm: over the bare products of this run.
x sepo: over impl="auto". MiB: allocator's peak above the inputs, gradients included; +grads: beyond
the gradients. values: largest error of log-probabilities and KL in nats; l: of the loss, where a
provider returns only that; topk: tokens chosen wrongly. dX, dW: largest error over largest entry.
Truth is float64. plain/once: that error over plain PyTorch's in this dtype, and over that of products
whose dZ was rounded once. Nothing is timed whose error is over its limit."""


def table(rows: list[Row]) -> str:
    """Rows of one case."""
    lines = [f"\n{rows[0].case}: " + ", ".join(f"{k} {v}" for k, v in rows[0].shape.items() if v)]
    lines.append(HEADER)
    for row in rows:
        name = f"{'>' if row.ours else ' '} {row.provider:21}"
        if row.status == "measured":
            lines.append((name + _numbers(row)).rstrip())
        else:
            lines.append(f"{name}{row.status}: {row.reason}")
    return "\n".join(lines)


def _numbers(row: Row) -> str:
    ratio = lambda x: f"{x:8.2f}" if x is not None else f"{'':8}"
    size = lambda x: f"{x / 2**20:8.1f}" if x is not None else f"{'':8}"
    times = "".join(f"{1e3 * x:9.2f}" for x in (row.median, *row.quartiles))
    errors = row.errors
    values = [v for name, v in errors.items() if not name.startswith("grad")]
    mark = "l" if "loss" in errors else ""
    cells = [f"{max(values):.0e}{mark}" if values else ""]
    names = "grad_hidden", "grad_weight"
    cells += [f"{errors[name]:.1e}" if name in errors else "" for name in names]
    text = "".join(f"{cell:<9}" for cell in cells)
    for name in names:
        found = [row.gradient_ratios.get(f"{name}/{base}") for base in ("plain", "once")]
        text += f"{'/'.join(f'{x:.2f}' for x in found) if None not in found else '':<15}"
    few = f"{len(row.seconds)} rounds" if len(row.seconds) < ROUNDS else ""
    notes = "; ".join(x for x in (row.rate, row.note, few) if x)
    sizes = size(row.extra_bytes) + size(row.beyond_gradients_bytes)
    return f"{times}{ratio(row.times_gemm)}{ratio(row.times_sepo)}{sizes}  {text}{notes}"


def versions(rows: list[Row]) -> list[str]:
    return sorted({row.version for row in rows if row.version})


def append(rows: list[Row], path: Path, device: str) -> None:
    about = surroundings(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(about | dataclasses.asdict(row)) + "\n")


def default_path(device: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")
    return ROOT / "bench" / "results" / f"head-{slug}.jsonl"


def surroundings(device: str) -> dict:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
    }


def machine(device: str) -> str:
    """GPU name, or CPU model with the number of cores this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    model = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The commit, "+dirty" with uncommitted changes; "unknown" outside a checkout."""
    git = lambda *args: subprocess.run(
        ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        # results are appended while they are made: they do not change what was measured
        dirty = git("status", "--porcelain", "--", ".", ":!bench/results")
        return git("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
