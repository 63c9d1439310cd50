"""setuptools' build backend, which builds the kernels against the torch that will run them.

pip builds in an environment of its own. If the interpreter that asked has torch, the build looks
there; if it has none, the build asks pip for one, as the installation does right after.
"""

import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need nothing of their own

TORCH = "torch>=2.11"


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *lacking_torch()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *lacking_torch()]


def lacking_torch() -> list[str]:
    wanted = os.environ.get("SEPO_EXT", "auto") != "none" and compiler() is not None
    return [TORCH] if wanted and not find_torch() else []


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def find_torch() -> bool:
    """Whether torch can be imported, from the environment behind an isolated build if need be."""
    if importlib.util.find_spec("torch") is not None:
        return True
    places = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    for place in (*places, site.getusersitepackages()):
        if (Path(place) / "torch").is_dir():
            sys.path.append(place)  # last: what builds comes from the build's own environment
            importlib.invalidate_caches()
            return True
    return False
