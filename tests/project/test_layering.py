"""Who may import whom. A new arrow is a design decision: change this table in its own commit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.rooms import arrows, circles, imported, modules

ROOT = Path(__file__).parents[2]
# room: the rooms that it may import, from the bottom up
BASE = {"sepo.errors", "sepo.terminal", "sepo.system"}
READ = BASE | {"sepo.data"}
RUN = READ | {"sepo.attention", "sepo.ops", "sepo.model"}
WORK = RUN | {"sepo.flags", "sepo_kernels"}
ALLOWED = {
    "sepo_kernels": set(),
    "sepo._moved": set(),
    "sepo.terminal": set(),
    "sepo.losses": set(),
    "sepo.errors": {"sepo.terminal"},
    "sepo.system": {"sepo.errors", "sepo_kernels"},
    "sepo.flags": READ | {"sepo_kernels"},
    "sepo.ops": {"sepo.losses", "sepo_kernels"},
    "sepo.data": BASE,
    "sepo.attention": READ | {"sepo_kernels"},
    "sepo.model": READ | {"sepo.attention", "sepo.ops"},
    "sepo.masks": RUN,
    "sepo.score": RUN,
    "sepo.patch": RUN,
    "sepo.trainer": WORK | {"sepo.losses", "sepo.masks"},
    "sepo.transfer": READ,
    "sepo.report": READ,
    "sepo.cost": WORK | {"sepo.trainer"},
    "sepo.demo": RUN | {"sepo.score", "sepo.trainer", "sepo_kernels"},
    "sepo.train": WORK | {"sepo.trainer"},
}
LAST = {"sepo.commands", "sepo.__main__"}  # may import all; no other room imports them


def test_rooms_import_what_they_may():
    found = arrows(ROOT)
    assert set(found) == set(ALLOWED) | LAST
    for room, used in found.items():
        if room not in LAST:
            assert used <= ALLOWED[room], f"{room} may not import {used - ALLOWED[room]}"


def test_no_module_needs_itself():
    assert circles(ROOT) == []


def test_nothing_imports_bench_or_tests():
    for path in modules(ROOT).values():
        used = {name.split(".")[0] for name in imported(path)}
        assert not used & {"bench", "tests", "tools"}, path


def test_implementations_do_not_import_each_other_or_the_reference():
    """Reference and implementations share nothing but what is no implementation of anything."""
    shared = {"layout", "loops", "counts"}
    for op in sorted(p for p in (ROOT / "sepo_kernels").iterdir() if (p / "__init__.py").exists()):
        names = {p.stem for p in op.glob("*.py")} - {"__init__"} - shared
        assert "reference" in names, f"{op}: no definition"
        for path in op.glob("*.py"):
            prefix = f"sepo_kernels.{op.name}."
            used = {n.removeprefix(prefix).split(".")[0] for n in imported(path) if prefix in n}
            used &= names - {path.stem}
            if path.stem == "__init__":
                used &= {"reference"}
            assert not used, f"{path}: may not import {used}"


def test_losses_need_torch_only():
    roots = {name.split(".")[0] for name in imported(ROOT / "python" / "sepo" / "losses.py")}
    assert roots - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("module", ["sepo", "sepo.ops", "sepo.losses"])
def test_import_is_cheap(module):
    code = f"import sys, {module}; print(*({{'transformers', 'datasets'}} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == []


def test_no_file_shadows_the_standard_library():
    """`python python/sepo/train.py` puts this folder first on the path."""
    named = {path.stem for path in (ROOT / "python" / "sepo").glob("*")}
    assert not named & sys.stdlib_module_names


def test_no_test_file_is_imported():
    """What two of them need lies in tests/helpers; a program's text that one holds is read too."""
    by_name = re.compile(r"^\s*(?:from|import) (?:[\w.]+\.)?test_\w+", re.MULTILINE)
    paths = [path for name in ("tests", "bench", "tools") for path in (ROOT / name).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): by_name.findall(path.read_text()) for path in paths}
    assert not {path: lines for path, lines in found.items() if lines}
