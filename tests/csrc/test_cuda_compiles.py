"""nvcc compiles the CUDA sources for every GPU we mean, without spills and within shared memory.

It compiles them where torch has no CUDA, too: only the binding includes torch.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import ROOT

ARCHITECTURES = ("80", "90", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SHARED_LIMIT = 48 * 1024  # bytes a block has without asking for more
REGISTER_LIMIT = 64  # a thread's share with 1024 threads in a block


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    nvcc = ["nvcc", "-O3", "-Xptxas", "-v", *targets, "-c", source, "-o", tmp_path / "kernels.o"]
    said = subprocess.run(nvcc, check=True, capture_output=True, text=True).stderr
    assert "warning" not in said, said
    kernels = said.split("Compiling entry function")[1:]
    assert {re.search(r"for 'sm_(\d+)'", kernel)[1] for kernel in kernels} == {*ARCHITECTURES}
    for kernel in kernels:
        # "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
        assert set(re.findall(r"(\d+) bytes (?:stack|spill)", kernel)) == {"0"}, kernel
        assert int(re.search(r"Used (\d+) registers", kernel)[1]) <= REGISTER_LIMIT, kernel
        shared = re.search(r"(\d+) bytes smem", kernel)  # not named where there is none
        assert shared is None or int(shared[1]) <= SHARED_LIMIT, kernel


@pytest.mark.slow
def test_the_binding_fits_torch(tmp_path):
    # torch's build writes this file; one without CUDA has no need of it
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.touch()
    torch_headers = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-Xcompiler=-fsyntax-only", "-I", tmp_path, "-I", torch_headers]
    binding = ROOT / "csrc" / "cuda" / "bind.cpp"
    nvcc = ["nvcc", *flags, "-c", binding, "-o", tmp_path / "bind.o"]
    done = subprocess.run(nvcc, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
