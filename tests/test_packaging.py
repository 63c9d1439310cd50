"""The tree in the README is the tree on disk, and a wheel holds all of it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from processes import ROOT

SOURCES = {
    str(path.relative_to(ROOT)).removeprefix("python/")
    for folder in ("sepo_kernels", "python/sepo")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".j2", ".css", ".js", ".jsonl", ".txt")  # the page, the demo's pairs
}


def test_readme_tree():
    tree = re.search(r"```\n(csrc/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    found, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        path = folder + name if line.startswith(" ") else name
        folder = path if not line.startswith(" ") else folder
        assert (ROOT / path).exists(), path
        found.add(path)
    modules = {f"python/{s}" for s in SOURCES if s.count("/") == 1 and s.startswith("sepo/")}
    assert modules - {"python/sepo/__init__.py"} <= found


@pytest.mark.slow
def test_a_wheel_holds_every_source_and_runs_without_the_tree(tmp_path):
    source = tmp_path / "source"  # building leaves folders behind
    for folder in ("sepo_kernels", "python", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # without a compiler's work, which the suite's own installation has done: minutes
    subprocess.run(
        [*wheel, "-w", tmp_path, source], check=True, env=os.environ | {"SEPO_EXT": "none"}
    )
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert SOURCES <= set(archive.namelist())
        archive.extractall(tmp_path / "site")
    code = """
import sys
# an editable installation would offer the tree's extension
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import torch, sepo.ops, sepo.cli
from sepo_kernels import extension
print(sepo.ops.__file__, extension.why_not("native_segment_sum", torch.device("cpu")))
print(sepo.ops.segment_sum(torch.ones(3), torch.tensor([0, 3])).tolist())
sepo.cli.run(["env"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in done.stdout and "sepo 0.1.0" in done.stdout
    assert "the native extension is not here" in done.stdout and "[3.0]" in done.stdout
