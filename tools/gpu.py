"""The GPU leg: build, measure, test and sanitise from the source tree, with nothing installed.

    make gpu, or: python tools/gpu.py [--json PATH] [--minutes 26] [--only head kl select]

Needs torch and triton for CUDA, nvcc and pytest; what make gpu-wheels has put into runs/gpu-wheels is
used. Every stage is a process with a time limit of its own (tools/leg/order.py): a case that dies takes
no other, and what a stage leaves unused goes to those after it. The last line names what was not
measured. Exit status: 0 all is well, 1 a stage failed, 2 no CUDA device, 3 something was not measured.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a program: its own folder is no place to import from
    sys.path[:1] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402

from bench import report  # noqa: E402
from tools.leg import found, order, wheels  # noqa: E402
from tools.leg.stages import run_stages  # noqa: E402

NO_DEVICE = "no CUDA device: nothing was measured"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append here; default bench/results/<GPU>.jsonl")
    parser.add_argument("--minutes", type=float, default=26.0, help="for everything asked for")
    parser.add_argument(
        "--only", nargs="+", choices=order.GROUPS[1:], help="these groups of stages"
    )
    parser.add_argument("part", nargs="?", choices=PARTS, help="this stage only, without a limit")
    args, start = parser.parse_args(argv), time.monotonic()
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return 2
    path = (args.json or report.default_path("cuda")).resolve()
    if args.part:
        return PARTS[args.part](path)
    about = surroundings()
    todo = order.stages(path, tuple(args.only or ()))
    left = 60 * args.minutes - (time.monotonic() - start)
    scale = left / max(1, sum(stage.seconds for stage in todo))
    before = path.stat().st_size if path.exists() else 0
    append = lambda result: write_line(path, about | vars(result))
    results = run_stages(todo, scale=scale, env=environment(), done=append)
    asked = {order.ENVIRONMENT, *(args.only or order.GROUPS)}
    left_out = [group for group in order.GROUPS if group not in asked]
    text, code = found.summary(results, found.rows(path, before), left_out)
    print(f"\nresults are in {path}\n{text}", flush=True)
    return code


def environment() -> dict[str, str]:
    """Of every stage: the source tree instead of an installation, and one architecture to compile."""
    major, minor = torch.cuda.get_device_capability()
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", wheels.SITE))),
        "PYTHONUNBUFFERED": "1",  # what was printed before a stage is stopped is seen
        "SEPO_EXT": "cuda-only",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(min(16, os.cpu_count() or 1))),
        # contenders of other sizes take turns: what one freed shall be of use to the next
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
    }


def surroundings() -> dict[str, str]:
    """What a result needs beside it: machine, versions, commit."""
    device = torch.cuda.get_device_properties(0)
    return {
        "machine": device.name,
        "memory": f"{device.total_memory / 2**30:.0f} GiB",
        "capability": f"{device.major}.{device.minor}",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": said(sys.executable, "-c", "import triton; print(triton.__version__)"),
        "nvcc": said("nvcc", "--version"),
        "commit": report.commit(),
    }


def said(*command: str) -> str:
    """The last line that a program prints; "unknown" if it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def tell_surroundings(path: Path) -> int:
    for name, value in surroundings().items():
        print(f"{name:12} {value}")
    return 0


PARTS = {"environment": tell_surroundings, "wheels": lambda path: wheels.install()}


def write_line(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    # as an exception, so that the stage under way is stopped too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
