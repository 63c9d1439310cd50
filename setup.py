"""Two import roots and one optional extension. SEPO_EXT: auto (default), none, cpu or cuda."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

# what at::vec needs to be the vector of this machine: torch's own flags, by its own name for it
CAPABILITY = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def cpu_flags() -> list[str]:
    """Flags for the vector width that torch uses here; SEPO_CPU=AVX2 asks for another."""
    import torch

    name = os.environ.get("SEPO_CPU", torch.backends.cpu.get_cpu_capability())
    flags = CAPABILITY.get(name, [])
    defines = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"] if flags else []
    # unknown pragmas: at::vec's own, once for each line that includes it
    quiet = ["-Wall", "-Wno-unknown-pragmas"]
    return ["-O3", "-fopenmp", "-fno-math-errno", *quiet, *flags, *defines]


def what_is_lacking() -> str | None:
    """What a build needs and does not find here."""
    if importlib.util.find_spec("torch") is None:
        return "torch at build time: pip install --no-build-isolation"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler) else f"a C++ compiler: {compiler}"


def extension() -> dict:
    """Build arguments for sepo_kernels._C; none without sources or, under "auto", without torch."""
    mode = os.environ.get("SEPO_EXT", "auto")
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f'SEPO_EXT is "{mode}", expected auto, none, cpu or cuda')
    if mode == "none":
        return {}
    lacking = what_is_lacking()
    if lacking:
        if mode == "auto":
            print(f"sepo: without the native extension, for lack of {lacking}", file=sys.stderr)
            return {}
        raise SystemExit(f"SEPO_EXT={mode} needs {lacking}")
    import torch
    from torch.utils import cpp_extension

    # what can be compiled, not what this machine can run: build machines have no GPU
    can_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    if mode == "cuda" and not can_cuda:
        raise SystemExit("SEPO_EXT=cuda needs a CUDA build of torch and nvcc")
    cuda = mode == "cuda" or (mode == "auto" and can_cuda)
    folders = ("csrc", "csrc/cpu", "csrc/cuda") if cuda else ("csrc", "csrc/cpu")
    sources = sorted(str(path) for f in folders for path in Path(f).glob("*.c[pu]*"))
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    flags = {"cxx": cpu_flags(), **({"nvcc": ["-O3"]} if cuda else {})}
    headers = sorted(map(str, Path("csrc").rglob("*.h")))
    module = kind("sepo_kernels._C", sources, extra_compile_args=flags, depends=headers)
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
    }


setup(
    packages=find_packages("python") + find_packages(include=["sepo_kernels", "sepo_kernels.*"]),
    package_dir={"sepo": "python/sepo"},
    **extension(),
)
