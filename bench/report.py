"""Rows for eyes (a table a case) and for files (one JSON object a line)."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from bench.contender import missing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
ALONE = " alone"  # after an instruction set: torch uses no wider one
EMULATED = ", emulated"  # after that: though the CPU has more
# what takes instructions away, from torch, oneDNN, MKL and from us
VARIABLES = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "SEPO_CPU"
PACKAGES = "torch", "transformers", "triton", "trl", "liger-kernel", "cut-cross-entropy"
HEADER = (
    f"{'':23}{'ms':>9}{'q1':>9}{'q3':>9}{'x gemm':>8}{'x sepo':>8}{'GFLOP':>8}{'MB':>7}{'roof':>7}"
    f"{'MiB':>8}  {'values':<9}{'grads':<9}{'/plain':<8}"
)
LEGEND = """\
ms: median of the rounds, q1 and q3 their quartiles. x gemm: over the bare products of this run, of
float32 where the machine multiplies that faster than bfloat16; x sepo: over impl="auto". GFLOP, MB: what
the work can't do without; roof: the share of what a matrix product (again of the faster dtype) and a copy
reach in the same rounds. MiB: allocator's peak above the inputs, gradients included. values:
largest error of log-probabilities and KL in nats (l: of the loss, where a provider returns only that),
of an attention's output over its largest entry, of a selection in tokens; grads: largest error over
largest entry; /plain: that over plain PyTorch's in this dtype. Truth is float64. Nothing is timed whose
error is over its limit."""


def table(rows: list, roof: str = "") -> str:
    """Rows of one case (harness.Row), under its shape and the roof of its rounds."""
    shape = ", ".join(f"{k} {v}" for k, v in rows[0].shape.items() if v)
    most = max((len(row.seconds) for row in rows), default=0)
    lines = [f"\n{rows[0].case}: {shape}", *([f"{roof}; rounds: {most}"] if roof else []), HEADER]
    for row in rows:
        name = f"{'>' if row.ours else ' '} {row.provider:21}"
        if row.status == "measured":
            lines.append((name + _numbers(row, most)).rstrip())
        else:
            # the longest names fill their column
            lines.append(f"{name} {row.status}{': ' + row.reason if row.reason else ''}")
    return "\n".join(lines)


def _numbers(row, most: int) -> str:
    ratio = lambda x: f"{x:8.2f}" if x is not None else f"{'':8}"
    times = "".join(f"{1e3 * x:9.2f}" for x in (row.median, *row.quartiles))
    work = f"{row.flop / 1e9:8.1f}{row.bytes / 1e6:7.0f}{row.roof:7.0%}"
    size = f"{row.extra_bytes / 2**20:8.1f}" if row.extra_bytes is not None else f"{'':8}"
    grads = {name: x for name, x in row.errors.items() if name.startswith("grad")}
    values = [x for name, x in row.errors.items() if name not in grads]
    plain = [row.gradient_ratios.get(f"{name}/plain") for name in grads]
    cells = [
        f"{max(values):.0e}{'l' if 'loss' in row.errors else ''}" if values else "",
        f"{max(grads.values()):.1e}" if grads else "",
        f"{max(plain):.2f}" if plain and None not in plain else "",
    ]
    text = f"{cells[0]:<9}{cells[1]:<9}{cells[2]:<8}"
    few = f"{len(row.seconds)} rounds" if len(row.seconds) < most else ""
    notes = "; ".join(x for x in (row.rate, row.note, few) if x)
    return f"{times}{ratio(row.times_gemm)}{ratio(row.times_sepo)}{work}{size}  {text}{notes}"


def append(records: list[dict], path: Path, about: dict) -> None:
    """One JSON object a row, each with the machine, the versions, the commit and the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for found in records:
            file.write(json.dumps(about | found) + "\n")


def default_path(device: str) -> Path:
    return path_of(machine(device))


def path_of(machine: str) -> Path:
    name = machine.removesuffix(EMULATED).removesuffix(ALONE).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return RESULTS / f"{slug}.jsonl"


def surroundings(device: str) -> dict:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
    }


def versions() -> dict[str, str]:
    """Of the packages that are measured or that do the measuring, where they are installed."""
    return {name: importlib.metadata.version(name) for name in PACKAGES if not missing(name)}


def machine(device: str) -> str:
    """GPU name, or CPU model with the number of cores this process may use.

    A CPU without AVX-512, or with an AVX-512 that torch was told to do without, is another machine.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    model = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores{_narrow()}"


def _narrow() -> str:
    has = torch.cpu._is_avx512_supported(), torch.cpu._is_avx2_supported()
    most = next((name for name, there in zip(("AVX512", "AVX2"), has, strict=True) if there), None)
    used = torch.backends.cpu.get_cpu_capability()
    if most is None or used == "AVX512":
        return ""
    return f", {used}{ALONE}{'' if used == most else EMULATED}"


def short(commit: str) -> str:
    """For a title: what was uncommitted is still told."""
    return commit[:8] + ("+dirty" if commit.endswith("+dirty") else "")


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
