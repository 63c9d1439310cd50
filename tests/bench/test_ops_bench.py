"""make bench-ops: pytest-benchmark saves our operations and compares them, gated as in bench/run.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.contender import missing

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    missing("pytest-benchmark") is not None, reason="pytest-benchmark is not installed"
)


def ops(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """As the Makefile calls it, on a case of a moment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_benchmark.plugin"]
    command += ["bench/test_ops.py", "-k", "topk-30", f"--benchmark-storage={folder}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python")))}
    env.pop("PYTEST_XDIST_WORKER", None)  # a worker's child: pytest-benchmark would measure nothing
    return subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_saved_run_is_compared(tmp_path):
    done = ops(tmp_path, "--benchmark-save=first")
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = tmp_path.glob("*/0001_first.json")
    (found,) = json.loads(saved.read_text())["benchmarks"]
    assert found["group"] == "topk-30" and found["stats"]["rounds"] == 5
    assert found["extra_info"]["errors"] == {"wrong": 0.0}
    done = ops(tmp_path, "--benchmark-compare=*_first")
    assert done.returncode == 0 and "0001_first" in done.stdout
