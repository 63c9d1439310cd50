"""Run the project in processes of its own, as users do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests"))),
    "OMP_NUM_THREADS": "1",  # the same sums in every process, and no more threads than cores
    "HF_HUB_OFFLINE": "1",
}


def start(*arguments: str, ranks: int = 1) -> subprocess.Popen:
    """`python -m ...`, or under torchrun on the loopback interface."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str, ranks: int = 1, timeout: int = 240) -> str:
    """Run to the end and return what was printed; a failure shows it."""
    process = start(*arguments, ranks=ranks)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output
