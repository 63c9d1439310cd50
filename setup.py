"""Two import roots and one optional extension. SEPO_EXT: auto (default), none, cpu or cuda."""

import os
from pathlib import Path

from setuptools import find_packages, setup


def extension() -> dict:
    """Build arguments for sepo_kernels._C; none without sources or, under "auto", without torch."""
    mode = os.environ.get("SEPO_EXT", "auto")
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f'SEPO_EXT is "{mode}", expected auto, none, cpu or cuda')
    if mode == "none" or not list(Path("csrc").rglob("*.cpp")):
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if mode == "auto":
            return {}
        raise SystemExit(
            f"SEPO_EXT={mode} needs torch here: pip install --no-build-isolation"
        ) from error
    # what can be compiled, not what this machine can run: build machines have no GPU
    can_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    if mode == "cuda" and not can_cuda:
        raise SystemExit("SEPO_EXT=cuda needs a CUDA build of torch and nvcc")
    cuda = mode == "cuda" or (mode == "auto" and can_cuda)
    sources = sorted(map(str, Path("csrc").rglob("*.cpp")))
    sources += sorted(map(str, Path("csrc").rglob("*.cu"))) if cuda else []
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    flags = {"cxx": ["-O3"], "nvcc": ["-O3"]} if cuda else {"cxx": ["-O3"]}
    return {
        "ext_modules": [kind("sepo_kernels._C", sources, extra_compile_args=flags)],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
    }


setup(
    packages=find_packages("python") + find_packages(include=["sepo_kernels", "sepo_kernels.*"]),
    package_dir={"sepo": "python/sepo"},
    **extension(),
)
