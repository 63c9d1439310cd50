"""The CPU sources compile for aarch64, where at::vec has vectors of its own, without warnings.

torch's headers are this machine's: what they choose by architecture, the compiler's macros say.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import ROOT

COMPILER = "aarch64-linux-gnu-g++"
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER} on PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source):
    headers = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-fopenmp", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = [COMPILER, *flags, "-fsyntax-only", "-isystem", headers, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
