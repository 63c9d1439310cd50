"""Who may import whom. A new arrow is a design decision: change this table in its own commit."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# module: what it may import of this project (itself is always allowed); a module of sepo that is
# not named here may import all but bench and tests, and nothing named here may import it
LEAVES = {"sepo.errors", "sepo.folder", "sepo.fingerprint", "sepo.lock", "sepo.terminal"}
FLAGS = {"sepo.inherited", "sepo.options", "sepo.packages", "sepo.values"}
DATA = {"sepo.data", *LEAVES}
MODEL = DATA | {"sepo.ops", "sepo.attention"}
RESPONSE = MODEL | {"sepo.model"}
SCORE = RESPONSE | {"sepo.feed", "sepo.response_logp", "sepo.precision"}
METHODS = {"sepo.losses", "sepo.ops", "sepo.config", *LEAVES, *FLAGS}
TRAINER = SCORE | METHODS | {"sepo_kernels", "sepo.score", "sepo.checkpoints"}
STEP = {
    "sepo.accepted",
    "sepo.adapters",
    "sepo.fused",
    "sepo.identity",
    "sepo.layers",
    "sepo.masked",
    "sepo.methods",
    "sepo.metrics",
    "sepo.prepared",
    "sepo.reference",
    "sepo.resumable",
    "sepo.routers",
    "sepo.tokens",
}
ALLOWED = {
    "sepo_kernels": set(),
    "sepo.losses": set(),
    "sepo.terminal": set(),
    "sepo.errors": {"sepo.terminal"},
    "sepo.folder": {"sepo.errors"},
    "sepo.fingerprint": {"sepo.errors", "sepo.folder"},
    "sepo.lock": {"sepo.errors"},
    "sepo.arithmetic": {"sepo_kernels"},
    "sepo.settings": {"sepo.errors", "sepo_kernels"},
    **dict.fromkeys(FLAGS, {"sepo.errors"}),
    "sepo.ops": {"sepo_kernels", "sepo.losses"},
    "sepo.data": LEAVES,
    "sepo.attention": DATA | {"sepo_kernels"},
    "sepo.decoder": MODEL,
    "sepo.model": MODEL | {"sepo.decoder"},
    "sepo.feed": RESPONSE,
    "sepo.response_logp": RESPONSE | {"sepo.feed"},
    "sepo.precision": RESPONSE | {"sepo.response_logp"},
    "sepo.score": SCORE,
    "sepo.reference": RESPONSE,
    "sepo.config": LEAVES | FLAGS | {"sepo.arithmetic", "sepo_kernels"},
    "sepo.checkpoints": DATA,
    "sepo.identity": DATA
    | METHODS
    | {"sepo.checkpoints", "sepo.methods", "sepo.prepared", "sepo.reference", "sepo.routers"},
    "sepo.resumable": {"sepo.checkpoints", "sepo.config", "sepo.identity", "sepo.metrics", *LEAVES},
    "sepo.methods": METHODS,
    "sepo.accepted": DATA | METHODS | {"sepo.methods", "sepo.metrics"},
    "sepo.metrics": METHODS | {"sepo.data", "sepo.methods"},
    "sepo.adapters": LEAVES | {"sepo.config"},
    "sepo.budget": set(),
    "sepo.layers": {"sepo.errors", "sepo_kernels"},
    "sepo.fused": RESPONSE | {"sepo.budget", "sepo.config", "sepo.decoder", "sepo.layers"},
    "sepo.masks": RESPONSE,
    "sepo.routers": DATA,
    "sepo.tokens": RESPONSE
    | METHODS
    | {"sepo.adapters", "sepo.masks", "sepo.methods", "sepo.routers"}
    | {"sepo.reference"},
    "sepo.masked": {"sepo.config", "sepo.masks", "sepo.resumable", "sepo.tokens"},
    "sepo.prepared": DATA | METHODS | {"sepo.methods"},
    "sepo.report": RESPONSE | {"sepo.options"},
    "sepo.trainer": TRAINER | STEP,
}
OUTSIDE = {"bench", "tests"}


def owner(module: str) -> str | None:
    """The row of the table a module belongs to, the longest that fits, or its own name."""
    parts = module.split(".")
    if parts[0] in OUTSIDE | {"sepo_kernels"}:
        return parts[0]
    if parts[0] != "sepo":
        return None
    # "import sepo" alone is __init__, which loads the trainer when it is named
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in ALLOWED), ".".join(parts[:2]))


def imports(path: Path) -> set[str]:
    """Absolute names of everything imported, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from sepo import data" imports sepo.data
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules():
    for root in (ROOT / "sepo_kernels", ROOT / "python" / "sepo"):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield ".".join(p for p in parts if p != "__init__"), path


def test_imports_follow_the_layers():
    for module, path in modules():
        me = owner(module)
        used = {owner(name) for name in imports(path)} - {None, me, "sepo"}
        assert not used & OUTSIDE, f"{path}: nothing imports {used & OUTSIDE}"
        if me in ALLOWED:
            assert used <= ALLOWED[me], f"{path}: {me} may not import {used - ALLOWED[me]}"


def test_implementations_do_not_import_each_other_or_the_reference():
    """Reference and implementations share nothing but what is no implementation of anything."""
    shared = {"schedule", "loops", "counts"}
    for op in sorted(p for p in (ROOT / "sepo_kernels").iterdir() if (p / "__init__.py").exists()):
        names = {p.stem for p in op.glob("*.py")} - {"__init__"} - shared
        assert "reference" in names, f"{op}: no definition"
        for path in op.glob("*.py"):
            prefix = f"sepo_kernels.{op.name}."
            used = {n.removeprefix(prefix).split(".")[0] for n in imports(path) if prefix in n}
            used &= names - {path.stem}
            if path.stem == "__init__":
                used &= {"reference"}
            assert not used, f"{path}: may not import {used}"


def test_losses_need_torch_only():
    roots = {name.split(".")[0] for name in imports(ROOT / "python" / "sepo" / "losses.py")}
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
