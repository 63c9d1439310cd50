"""bench/ has no import circle, and nothing outside of it, tools/ and tests/ imports it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """Everything that a module names, inside functions too: a package and what is taken of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_circle():
    """A module of a package named in `from package import module` is what is meant, not the package."""
    bench = modules(ROOT / "bench")
    graph = {}
    for name, path in bench.items():
        used = imported(path) & bench.keys() - {name}
        graph[name] = {u for u in used if not any(v.startswith(u + ".") for v in used)}
    assert len(graph) > 25
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("bench.harness") < order.index("bench.run")


def test_nothing_of_the_package_imports_bench():
    for folder in ("python", "sepo_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            roots = {name.partition(".")[0] for name in imported(path)}
            assert not roots & {"bench", "tools"}, path
