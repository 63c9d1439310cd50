"""Two import roots and the native extension. SEPO_EXT: auto (default), none, cpu,
cuda (both devices' kernels) or cuda-only.

The kernels of csrc/cpu are compiled once for each instruction set, into libraries of their own, of
which sepo_kernels/extension.py loads one. In a single library the linker would keep one copy of
each template that the sets share, perhaps the one that this CPU can't run.
"""

import copy
import os
import platform
import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file without its folder
from build_backend import TORCH, compiler, find_torch  # noqa: E402

DEPENDENCIES = ["numpy>=2.0"]  # and torch, for sepo.ops; the extras of pyproject.toml for the rest
# unknown pragmas: at::vec's own, once for each line that includes it
FLAGS = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
# gcc 12 says it of its own AVX-512 intrinsics, once for each that is inlined
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# what at::vec needs to be a vector of so many bits: torch's own flags, by its own names
LEVELS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", *QUIET],
}
OLDEST_PYTHON = "311"  # the libraries use none of Python's functions: one serves every later one


def levels() -> list[str]:
    return list(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ["DEFAULT"]


def what_is_lacking() -> str | None:
    if not find_torch():
        return "torch at build time: pip install torch, then again"
    return None if compiler() else f"a C++ compiler: {os.environ.get('CXX', 'c++')}"


def torch_release() -> str:
    import torch

    return ".".join(torch.__version__.split(".")[:2])


def extension() -> dict:
    """Build arguments for the native libraries; none without sources or, under "auto", torch."""
    mode = os.environ.get("SEPO_EXT", "auto")
    if mode not in ("auto", "none", "cpu", "cuda", "cuda-only"):
        raise SystemExit(f'SEPO_EXT is "{mode}", expected auto, none, cpu, cuda or cuda-only')
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
    if mode.startswith("cuda") and not can_cuda:
        raise SystemExit(f"SEPO_EXT={mode} needs a CUDA build of torch and nvcc")
    wanted = [] if mode == "cuda-only" else levels()
    modules = [library(cpp_extension.CppExtension, level, "csrc/cpu") for level in wanted]
    if mode.startswith("cuda") or (mode == "auto" and can_cuda):
        modules.append(library(cpp_extension.CUDAExtension, "cuda", "csrc/cuda"))
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": side_by_side(cpp_extension.BuildExtension)},
        "options": {"bdist_wheel": {"py_limited_api": f"cp{OLDEST_PYTHON}"}},
    }


def library(kind, level: str, folder: str):
    """One library; its name says which torch it is for, because no other could load it."""
    flags = [*FLAGS, *LEVELS.get(level, [])]
    if LEVELS.get(level):
        flags += [f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}"]
    return kind(
        f"sepo_kernels._C_{level.lower()}_torch_{torch_release().replace('.', '_')}",
        sorted(str(path) for path in Path(folder).glob("*.c[pu]*")),
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        extra_link_args=["-s"],
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        py_limited_api=True,
    )


def failed(error: Exception) -> str:
    return (
        f"the kernels cannot be compiled here ({error}). SEPO_EXT=none pip install . leaves them out,"
        " and everything runs in plain PyTorch"
    )


def side_by_side(build_ext):
    """Each library has a folder for its objects, since they share sources, and a ninja."""

    class BuildLibraries(build_ext):
        def build_extensions(self):
            if self.use_ninja:  # else nvcc would take the compiler's place in another's thread
                asked, libraries = int(os.environ.get("MAX_JOBS") or 0), len(self.extensions)
                self.parallel = min(asked or libraries, libraries)
                jobs = -(-(asked or os.cpu_count() or 1) // self.parallel)
                os.environ["MAX_JOBS"] = str(jobs)  # of one ninja
            try:
                super().build_extensions()
            except Exception as error:  # after what the compiler said, a traceback hides what to do
                raise SystemExit(f"sepo: {failed(error)}") from error

        def build_extension(self, ext):
            one = copy.copy(self)
            one.build_temp = str(Path(self.build_temp) / ext.name)
            super(BuildLibraries, one).build_extension(ext)

    return BuildLibraries


built = extension()
setup(
    packages=find_packages("python") + find_packages(include=["sepo_kernels", "sepo_kernels.*"]),
    package_dir={"sepo": "python/sepo"},
    # torch has no stable interface for what the kernels use: they need the release they are for
    install_requires=[f"torch=={torch_release()}.*" if built else TORCH, *DEPENDENCIES],
    **built,
)
