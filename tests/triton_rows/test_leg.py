"""The interpreted leg runs with the rest: it cannot be left out by not asking for it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from sepo.ops import selected_logprob

HERE = Path(__file__).parent
FILES = sorted(file.name for file in HERE.glob("test_interpreted_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted_leg(file):
    triton, release = pytest.importorskip("triton"), lambda x: tuple(map(int, x.split(".")[:2]))
    old = release(triton.__version__) < (3, 7)  # it takes an int of an array of one
    if old and release(numpy.__version__) >= (2, 4):
        pytest.skip(f"triton 3.6's interpreter needs numpy < 2.4, got {numpy.__version__}")
    allowed = ("-W", "default:Conversion of an array:DeprecationWarning") if old else ()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *allowed, HERE / file],
        cwd=HERE.parents[1], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    # 5: nothing was collected, which is no success either
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_refuses_a_cpu_without_the_interpreter():
    pytest.importorskip("triton")
    rows, targets = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    message = "needs a GPU, or TRITON_INTERPRET=1 at import, got tensors on cpu"
    with pytest.raises(ValueError, match=message):
        selected_logprob(torch.ones(3, 4), torch.ones(5, 4), rows, targets, impl="triton")


def test_without_triton_the_operations_import_and_say_so():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, sepo.ops
from sepo_kernels.devices import why_not_triton
print(why_not_triton(torch.ones(1)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parents[1],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((".", "python"))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "triton is not installed" in done.stdout
