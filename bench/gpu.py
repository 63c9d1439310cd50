"""The GPU leg: build, test, sanitise and measure from the source tree, with nothing installed.

    make gpu, or: python bench/gpu.py [--json PATH] [--minutes 8]

Needs torch and triton for CUDA, nvcc and pytest. Every stage is a process with a time limit of its
own; what one leaves unused goes to those after it, and one that fails does not hide the others.
Exit status: 0 all is well, 1 a stage failed, 2 no CUDA device.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a program: its own folder is no place to import from
    sys.path[:1] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402

from bench import jobs, report  # noqa: E402

NO_DEVICE = "no CUDA device: nothing was measured"
PASSED, FAILED, STOPPED, SKIPPED = "passed", "failed", "stopped", "skipped"


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float  # its share of the eight minutes
    commands: tuple[tuple[str, ...], ...]  # one after the other, until one fails
    absent: str = ""  # why it cannot run here, if it cannot
    may_run_out: bool = False  # of time, without a failure of the leg


@dataclass(frozen=True)
class Result:
    stage: str
    status: str
    seconds: float
    reason: str
    ok: bool


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append here; default bench/results/<GPU>.jsonl")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("part", nargs="?", choices=PARTS, help="this stage only, without a limit")
    args, start = parser.parse_args(argv), time.monotonic()
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return 2
    path = (args.json or report.default_path("cuda")).resolve()
    if args.part:
        return PARTS[args.part](path)
    about = surroundings()
    todo = stages(path)
    left = 60 * args.minutes - (time.monotonic() - start)
    scale = left / sum(stage.seconds for stage in todo)
    append = lambda result: write_line(path, about | vars(result))
    results = run_stages(todo, scale=scale, env=environment(), done=append)
    print(f"\n{summary(results)}\nresults are in {path}", flush=True)
    return 0 if all(result.ok for result in results) else 1


def stages(path: Path) -> tuple[Stage, ...]:
    """What the leg does, in order."""
    python, leg = sys.executable, str(Path("bench") / "gpu.py")
    own = lambda part: ((python, leg, part, "--json", str(path)),)
    pytest = (python, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider")
    # warnings of another build of torch are not ours, and would be errors
    pytest += ("-W", "default", "-rs", "--durations=5")
    waits = "tests/gpu/test_gpu_waits.py"
    sanitizer, program = find_sanitizer(), (python, "tests/gpu/sanitized.py")
    absent = "" if sanitizer else "compute-sanitizer is not on this machine"
    # the API errors are torch's own questions to the driver
    memcheck = (sanitizer, "--tool", "memcheck", "--report-api-errors", "no")
    racecheck = (sanitizer, "--tool", "racecheck")
    watched = lambda tool: ((*tool, "--error-exitcode", "9", *program),)
    # --force: an extension without CUDA kernels may lie there, and be newer than its sources
    build = (python, "setup.py", "build_ext", "--inplace", "--force")
    return (
        Stage("environment", 10, own("environment")),
        Stage("build", 120, (build,)),
        Stage("tests", 140, ((*pytest, "tests/gpu", f"--ignore={waits}"),)),
        Stage("memcheck", 35, watched(memcheck), absent),
        Stage("racecheck", 25, watched(racecheck), absent, may_run_out=True),
        Stage("waits", 25, ((*pytest, waits),)),
        Stage("benchmark", 75, own("benchmark")),
        Stage("end to end", 50, own("end-to-end"), jobs.lacking("step"), may_run_out=True),
    )


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
        status, reason = run_stage(stage, deadline, env)
        ok = status in (PASSED, SKIPPED) or (status == STOPPED and stage.may_run_out)
        results.append(Result(stage.name, status, round(time.monotonic() - start, 1), reason, ok))
        done(results[-1])
    return results


def run_stage(
    stage: Stage,
    deadline: float,  # on the monotonic clock
    env: dict[str, str] | None,
) -> tuple[str, str]:  # status, reason
    if stage.absent:
        return SKIPPED, stage.absent
    for command in stage.commands:
        left = deadline - time.monotonic()
        if left <= 0:
            return STOPPED, "no time was left"
        try:
            # a group of its own, so that compilers and workers can be stopped with it
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, process_group=0
            )
        except OSError as error:
            return FAILED, str(error)
        try:
            code = process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            return STOPPED, f"after {left:.0f} s"
        finally:
            if process.returncode is None:  # out of time, or the leg itself is stopped
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != 0:
            return FAILED, f"exit status {code}"
    return PASSED, ""


def summary(results: Sequence[Result]) -> str:
    lines = [
        f"{r.stage:12} {r.status:8} {r.seconds:6.1f} s{'  ' + r.reason if r.reason else ''}"
        for r in results
    ]
    bad = [r.stage for r in results if not r.ok]
    return "\n".join([*lines, f"not well: {', '.join(bad)}" if bad else "all is well"])


def environment() -> dict[str, str]:
    """Of every stage: the source tree instead of an installation, and one architecture to compile."""
    major, minor = torch.cuda.get_device_capability()
    return os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python"))),
        "PYTHONUNBUFFERED": "1",  # what was printed before a stage is stopped is seen
        "SEPO_EXT": "cuda",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(min(16, os.cpu_count() or 1))),
    }


def find_sanitizer() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places])
    )


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


def benchmark(path: Path) -> int:
    """Fails if ours is wrong anywhere, or if nothing of ours was measured."""
    from bench import run

    # '*': the long cases too
    suites = "--suite", "head", "select", "attention", "--case", "*"
    return run.main([*suites, "--device", "cuda", "--json", str(path)])


def end_to_end(path: Path) -> int:
    """Whole steps of a Llama of about 1B and of SmolLM2; a peer that is missing is only named."""
    from bench import run
    from bench.end_to_end import models

    options = ["--device", "cuda", "--json", str(path), "--pairs", "16", "--rounds", "5"]
    names = "llama-1b-shape", models.smollm2_here()
    return max(run.main(["--case", "step", "--model", name, *options]) for name in names)


PARTS = {"environment": tell_surroundings, "benchmark": benchmark, "end-to-end": end_to_end}


def write_line(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    # as an exception, so that the stage under way is stopped too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
