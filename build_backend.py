"""setuptools' build backend, which builds the kernels against the torch that will run them.

pip builds in an environment of its own. If the interpreter that asked has torch, the build looks
there; if it has none, the build asks pip for one, as the installation does right after.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  every other hook

TORCH = "torch>=2.11"


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    wanted = os.environ.get("SEPO_EXT", "auto") != "none" and compiler() is not None
    return [TORCH] if wanted and not find_torch() else []


get_requires_for_build_editable = get_requires_for_build_wheel


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def find_torch() -> bool:
    """Whether torch can be imported, from the environment behind an isolated build if need be."""
    if importlib.util.find_spec("torch") is None and (place := torch_outside()):
        sys.path.append(place)  # last: what builds comes from the build's own environment
        importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


def torch_outside() -> str | None:
    """Where the interpreter has torch when pip does not tell it where to look."""
    code = "import importlib.util as i; s = i.find_spec('torch'); print(s.origin if s else '')"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    asked = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True)
    origin = asked.stdout.decode().strip()
    return str(Path(origin).parents[1]) if origin and asked.returncode == 0 else None
