"""Run the project in processes of its own, as users do."""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
FOLDERS = [ROOT / folder for folder in PYTEST["pythonpath"]]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(  # an empty entry would be the current folder
        filter(None, [*map(str, FOLDERS), os.environ.get("PYTHONPATH")])
    ),
    "OMP_NUM_THREADS": "1",  # the same sums in every process, and no more threads than cores
    "HF_HUB_OFFLINE": "1",
}
# beside it: as on a CPU without AVX-512
AVX2_ALONE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def python(code: str, *args) -> tuple[str, ...]:
    """The command that runs a program's text."""
    return (sys.executable, "-c", code, *args)


def start(
    *arguments: str, ranks: int = 1, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """`python -m ...`, or under torchrun on the loopback interface."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        env=ENVIRONMENT | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(
    *arguments: str,
    ranks: int = 1,
    timeout: int = 240,
    environment: dict[str, str] | None = None,  # beside what every process has
) -> str:
    """Run to the end and return what was printed; a failure shows it."""
    process = start(*arguments, ranks=ranks, environment=environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def wait_for_lines(process: subprocess.Popen, file: Path, lines: int) -> None:
    """Until so many lines are written; the process must not end by itself before."""
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def run_jobs(path: Path, jobs: list[dict]) -> list[dict]:
    """Train in forked processes, see workers/forks.py; what each job left stands in its "left"."""
    (path / "jobs.json").write_text(json.dumps(jobs))
    run(ROOT / "tests/workers/forks.py", path / "jobs.json")
    return json.loads((path / "jobs.json").read_text())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def exit_line(*arguments: str) -> str:
    """The one line that a refusal prints, of a process that exits with code 2."""
    process = start(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    lines = [line for line in output.splitlines() if "sepo: error" in line]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0]


def cut_short(size: int, *command: str, at: str = "sepo.commands.main.run") -> str:
    """The line that a command ends with, if from the call of `at` no file may be any longer."""
    module, name = at.rsplit(".", 1)
    code = f"""if True:
        import resource, {module}, sepo.commands.main
        call = {at}
        def cut(*arguments, **options):
            resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
            return call(*arguments, **options)
        {at} = cut
        sepo.commands.main.main()"""
    return exit_line("-c", code, *command)
