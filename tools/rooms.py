"""Count rooms and arrows: `python tools/rooms.py [ROOT ...]`, imports read with ast.

A room is a package or a single module at the first level of `sepo`, and `sepo_kernels`; an arrow is
an import from one room into another; floors are the longest chain of arrows. A circle is a set of
modules that import each other at their top level.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("python/sepo", "sepo_kernels")


def modules(root: Path) -> dict[str, Path]:
    """Dotted names of all modules below `root`, with their files."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to((root / package).parent).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)


def room(name: str) -> str | None:
    """The room that a dotted name belongs to, None outside the project and for `sepo` itself."""
    parts = name.split(".")
    if parts[0] == "sepo_kernels":
        return parts[0]
    # "import sepo" alone is __init__, which loads the trainer when it is named
    return ".".join(parts[:2]) if parts[0] == "sepo" and len(parts) > 1 else None


def arrows(root: Path) -> dict[str, set[str]]:
    """Map each room to the rooms that it imports."""
    known = modules(root)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        if own := room(name):
            used = {room(_module(target, known)) for target in imported(path)}
            found[own] = found.get(own, set()) | used - {None, own}
    return found


def floors(graph: dict[str, set[str]]) -> int:
    """Length of the longest chain of arrows, counted in rooms."""
    depth: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in depth:
            depth[node] = 0  # while it is being counted: a circle ends here
            depth[node] = 1 + max((height(target) for target in graph.get(node, ())), default=0)
        return depth[node]

    return max(map(height, graph))


def circles(root: Path) -> list[set[str]]:
    """List the modules that need each other to be imported, a set a circle.

    A package's __init__ that gathers its modules' names is not their importer.
    """
    known = modules(root)
    graph = {
        name: {_module(t, known) for t in imported(path, inside_functions=False)} & known.keys()
        for name, path in known.items()
        if path.name != "__init__.py"
    }
    graph = {name: targets & graph.keys() for name, targets in graph.items()}
    while leaves := [n for n, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    return [_reached(name, graph) for name in graph if name in _reached(name, graph)]


def _reached(name: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [name]
    while todo:
        new = graph.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def _module(target: str, known: dict[str, Path]) -> str:
    """The module that defines an imported name."""
    while target not in known and "." in target:
        target = target.rpartition(".")[0]
    return target


def lines(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def main(roots: list[str]) -> int:
    for root in map(Path, roots or ["."]):
        graph = arrows(root)
        counts = ", ".join(
            f"{name} {lines(root / name)}"
            for name in ("python/sepo", "sepo_kernels", "bench", "tests")
        )
        found = circles(root)
        print(f"{root}: {len(graph)} rooms, {floors(graph)} floors, "
              f"{sum(map(len, graph.values()))} arrows, {len(found)} modules in circles")  # fmt: skip
        print(f"  lines: {counts}")
        for name in sorted(graph):
            print(f"  {name}: {' '.join(sorted(graph[name])) or '-'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
