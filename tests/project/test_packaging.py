"""What a user types to install, with pip's own isolation; what the wheel holds.

The environments here offer the suite's torch by a .pth file: installing it again takes minutes.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from processes import ROOT

from sepo_kernels import extension

SOURCES = {
    str(path.relative_to(ROOT)).removeprefix("python/")
    for folder in ("sepo_kernels", "python/sepo")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".j2", ".css", ".js", ".jsonl", ".txt")  # the page, the demo's pairs
}
RELEASE = ".".join(torch.__version__.split(".")[:2])
# enough of csrc/cpu for one operation: all of it takes minutes
FEW_SOURCES = ("bfloat16_tiles.cpp", "operators.h", "segment_reduce.cpp")
FEW_OPERATORS = """
#include "operators.h"
#include <torch/library.h>
TORCH_LIBRARY_FRAGMENT(sepo, m) {
  m.def("native_bfloat16_tiles() -> bool", &sepo::bfloat16_tiles);
  m.def("native_segment_sum(Tensor values, Tensor cu_rows) -> Tensor");
}
TORCH_LIBRARY_IMPL(sepo, CPU, m) { m.impl("native_segment_sum", &sepo::segment_sum); }
"""
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """The source tree: building leaves folders behind."""
    to = tmp_path / "source"
    for folder in ("sepo_kernels", "python", "csrc"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("*.so"))
    for file in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, to)
    return to


@pytest.fixture
def python(tmp_path) -> Path:
    """Of a fresh environment that has torch, as after `pip install torch`, and not sepo."""
    venv.create(tmp_path / "venv", symlinks=True)
    (offer,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (offer / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path / "venv" / "bin" / "python"


def environment(**variables: str) -> dict[str, str]:
    """A user's: nothing of the suite's own."""
    ours = {"PYTHONPATH", "SEPO_EXT", "SEPO_CPU", "CXX"} - variables.keys()
    return {k: v for k, v in os.environ.items() if k not in ours} | variables


def pip(python: Path, *arguments, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *arguments], env=environment(**variables), capture_output=True, text=True
    )
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("needs a package registry, as isolated builds do")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compiler
@pytest.mark.slow
def test_pip_install_builds_the_kernels(tree, python, tmp_path):
    cut_down(tree / "csrc" / "cpu")
    pip(python, "install", "--no-deps", tree)
    code = """
import importlib.metadata as metadata, torch, sepo.ops
from sepo_kernels import extension
total = sepo.ops.segment_sum(torch.arange(5.0), torch.tensor([0, 2, 5])).tolist()
print(sepo.__file__, total, extension.why_not("native_segment_sum", torch.device("cpu")))
print(extension.in_force())
print(*metadata.requires("sepo"), metadata.distribution("sepo").read_text("WHEEL"))
"""
    best = extension.level_of_this_cpu()
    levels = [None, "DEFAULT"] if best == "DEFAULT" else [None, "DEFAULT", "AVX2", best]
    for level in levels:
        env = environment(**({} if level is None else {"SEPO_CPU": level}))
        command = [python, "-W", "error:sepo:RuntimeWarning", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert str(tmp_path / "venv") in done.stdout and "[1.0, 9.0] None" in done.stdout
        assert f"{level or ''} of {best}" in done.stdout and f"for torch {RELEASE}" in done.stdout
        assert f"torch=={RELEASE}.*" in done.stdout and "Tag: cp311-abi3-" in done.stdout


def cut_down(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in FEW_SOURCES:
            path.unlink()
    (folder / "operators.cpp").write_text(FEW_OPERATORS)


@pytest.mark.slow
def test_a_wheel_without_kernels_holds_every_source_and_runs(tree, python, tmp_path):
    # neither a compiler nor torch: the wheel is for every machine and says so
    (offer,) = python.parents[1].rglob("torch.pth")
    offer.unlink()
    wheel = ("wheel", "--no-deps", "-w", tmp_path, tree)
    pip(python, *wheel, CXX="/nowhere/c++")
    built = tmp_path / "sepo-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        assert SOURCES <= set(names) and not [name for name in names if name.endswith(".so")]
        metadata = archive.read("sepo-0.1.0.dist-info/METADATA").decode()
        archive.extractall(tmp_path / "site")
    assert "Requires-Dist: torch>=2.11\n" in metadata
    code = """
import sys
# an editable installation would offer the tree's extension
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sepo.ops
import torch, sepo.commands.main
print(sepo.ops.__file__)
print(len([w for w in caught if issubclass(w.category, RuntimeWarning)]), "warnings")
print(sepo.ops.segment_sum(torch.ones(3), torch.tensor([0, 3])).tolist())
sepo.commands.main.run(["env"])
"""
    none_at_hand, none_wanted = {"CXX": "/nowhere/c++"}, {"SEPO_EXT": "none", "CXX": "true"}
    for warnings, extra in ((1, {"CXX": "true"}), (0, none_at_hand), (0, none_wanted)):
        env = environment(PYTHONPATH=str(tmp_path / "site"), **extra)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert str(tmp_path) in done.stdout and "sepo 0.1.0" in done.stdout
        assert f"\n{warnings} warnings\n" in done.stdout and "[3.0]" in done.stdout
        assert "extension on cpu: the native extension is not here; build it" in done.stdout


@pytest.mark.parametrize("variables", [{"SEPO_EXT": "none"}, {"CXX": "/nowhere/c++"}], ids=str)
def test_tests_of_kernels_that_were_left_out_are_skipped_with_the_reason(tree, variables):
    done = run_tests_of(tree, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped and all("the native extension is not here" in line for line in skipped)
    assert " passed, " in done.stdout


def test_tests_fail_where_a_build_left_no_kernels(tree):
    done = run_tests_of(tree, CXX="true")
    assert done.returncode == 2 and "RuntimeWarning: sepo runs in plain PyTorch" in done.stdout


def run_tests_of(tree: Path, **variables: str) -> subprocess.CompletedProcess:
    """The tests of sums over segments, in a tree without libraries."""
    for folder in ("helpers", "ops"):
        shutil.copytree(ROOT / "tests" / folder, tree / "tests" / folder)
    shutil.copy(ROOT / "tests" / "conftest.py", tree / "tests")
    command = (
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_segment_reduce.py",
    )
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree, env=environment(**variables), capture_output=True, text=True,
    )  # fmt: skip


@needs_compiler
def test_a_failed_compilation_says_how_to_go_on(tree):
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        path.write_text("#error no such machine\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree, env=environment(SEPO_EXT="cpu"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "no such machine" in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sepo: ") and "SEPO_EXT=none pip install" in last


def test_the_build_asks_for_torch_where_it_is_lacking(monkeypatch):
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    monkeypatch.delenv("SEPO_EXT", raising=False)
    monkeypatch.setattr(backend, "compiler", lambda: "/usr/bin/c++")
    asks = backend.get_requires_for_build_wheel
    assert backend.get_requires_for_build_editable is asks
    assert asks() == []  # it is here
    monkeypatch.setattr(backend, "find_torch", lambda: False)
    assert asks() == ["torch>=2.11"]
    monkeypatch.setenv("SEPO_EXT", "none")
    assert asks() == []
    monkeypatch.delenv("SEPO_EXT")
    monkeypatch.setattr(backend, "compiler", lambda: None)
    assert asks() == []
