"""The compiled half of the package, where it was built: its operators are torch.ops.sepo.native_*.

There is a library for each instruction set and torch release; one of them is loaded, once, at
import. SEPO_CPU names a lesser instruction set than the machine's. Implementations call `why_not`
and the operators; no other module knows that there are libraries.
"""

import os
import re
import shutil
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
# instruction sets; each includes those before it. The last has no library of its own: with it
# oneDNN multiplies bfloat16 tiles, by AMX where the CPU has it
LEVELS = ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16")
RELEASE = ".".join(torch.__version__.split(".")[:2])


def level_of_this_cpu() -> str:
    """Return the highest of LEVELS that this CPU has."""
    cpu = torch.cpu
    if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported():
        return "AVX512_BF16"
    if cpu._is_avx512_supported():
        return "AVX512"
    return "AVX2" if cpu._is_avx2_supported() else "DEFAULT"


def choose_level() -> str:
    """Return SEPO_CPU, or the level that the CPU has and torch may use (ATEN_CPU_CAPABILITY).

    Raises ValueError for an unknown name, and for one that the CPU lacks.
    """
    most, asked = level_of_this_cpu(), os.environ.get("SEPO_CPU")
    if asked is None:
        torch_uses = torch.backends.cpu.get_cpu_capability()
        if torch_uses == "AVX512":
            return most
        return min(most, torch_uses if torch_uses in LEVELS else "DEFAULT", key=LEVELS.index)
    name = asked.upper()
    if name not in LEVELS:
        raise ValueError(f"SEPO_CPU: expected one of {', '.join(LEVELS)}, got {asked}")
    if LEVELS.index(name) > LEVELS.index(most):
        raise ValueError(f"SEPO_CPU: expected at most {most}, which this CPU has, got {asked}")
    return name


def load(level: str) -> str | None:
    """Register the operators of the best library up to `level`; return None, or why none."""
    built = {release: paths for release in _releases() if (paths := _libraries(release))}
    if not built:
        return "the native extension is not here"
    if RELEASE not in built:
        have = ", ".join(sorted(built))
        return f"the native extension was built for torch {have}, this is torch {RELEASE}"
    libraries = built[RELEASE]
    names = [name for name in LEVELS[: LEVELS.index(level) + 1] if name.lower() in libraries]
    if not names and "cuda" not in libraries:
        have = ", ".join(sorted(libraries))
        return f"the native extension was built for {have}, this CPU has {level}"
    try:
        for name in (*names[-1:], "CUDA"):
            if name.lower() in libraries:
                torch.ops.load_library(libraries[name.lower()])
    except OSError as error:  # of another architecture, say
        reason = (
            str(error.__cause__ or error).strip().splitlines()[0]
        )  # torch adds which library alone
        return f"the native extension cannot be loaded ({reason})"
    return None


def why_not(operator: str, device: torch.device) -> str | None:
    """Return why `torch.ops.sepo.<operator>` has no kernel for tensors on `device`, or None."""
    if MISSING is not None:
        return MISSING
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    known = key is not None and hasattr(torch.ops.sepo, operator)
    if not known or not torch._C._dispatch_has_kernel_for_dispatch_key(f"sepo::{operator}", key):
        return f"the native extension was built without a {device.type} kernel for {operator}"
    return None


def in_force() -> str:
    """Say which instruction set is used, of which the CPU has; or why none is."""
    if MISSING is not None:
        return MISSING
    libraries = _libraries(RELEASE)
    built = ", ".join(name.lower() for name in LEVELS if name.lower() in libraries)
    tiles = "with" if BFLOAT16_TILES else "without"
    best = level_of_this_cpu()
    return f"{LEVEL} of {best}, {tiles} bfloat16 tiles; built: {built}, for torch {RELEASE}"


def how_to_build() -> str:
    """Return the command that builds the libraries for this torch."""
    tree = HERE.parent
    if (tree / "setup.py").exists():
        return f"cd {tree} && SEPO_EXT=cpu python setup.py build_ext --inplace"
    return "pip install --force-reinstall --no-deps --no-cache-dir with a C++ compiler at hand"


def _releases() -> list[str]:
    names = (re.search(r"_torch_(\d+)_(\d+)\.", path.name) for path in HERE.glob("_C_*"))
    return sorted({f"{m[1]}.{m[2]}" for m in names if m})


def _libraries(release: str) -> dict[str, Path]:
    """Return the libraries' paths by instruction set in small letters, or "cuda"."""
    end = f"_torch_{release.replace('.', '_')}"
    paths = [*HERE.glob(f"_C_*{end}.*so"), *HERE.glob(f"_C_*{end}.pyd")]
    return {path.name.removeprefix("_C_").partition(end)[0]: path for path in paths}


LEVEL = choose_level()
MISSING = load(LEVEL)
if MISSING is not None:
    MISSING += f"; build it with: {how_to_build()}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) and os.environ.get("SEPO_EXT") != "none":
        warnings.warn(f"sepo runs in plain PyTorch: {MISSING}", RuntimeWarning, stacklevel=2)
# whether oneDNN multiplies bfloat16 tiles with float32 sums: tried, since ONEDNN_MAX_CPU_ISA may
# forbid it; read at import, because Dynamo traces the functions that use it
BFLOAT16_TILES = (
    LEVEL == "AVX512_BF16"
    and hasattr(torch.ops.sepo, "native_bfloat16_tiles")
    and torch.ops.sepo.native_bfloat16_tiles()
)
