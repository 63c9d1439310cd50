"""Print the calls from `sepo train` to the head's product: `python tools/hops.py [ARGUMENTS]`.

ARGUMENTS are those of `sepo train`; without any, a tiny run on the CPU is made. Only this project's
functions are counted, of the first product that the head's forward makes.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("python/sepo", "sepo_kernels")


class Hop(NamedTuple):
    file: str
    function: str


def hops(run: Callable[[], object]) -> list[Hop]:
    """Run, and list the project's functions on the stack of a step's first product of the head.

    Outermost first, the product's own last; empty if no step was made.
    """
    found: list[Hop] = []
    multiply = torch.mm

    def watched(*args, **kwargs):
        if not found and _file(sys._getframe(1)).startswith("sepo_kernels"):
            path = _path(sys._getframe(1))
            if below_training_step(path):  # else it is the comparison of `prepare_model`
                found.extend(path)
        return multiply(*args, **kwargs)

    torch.mm = watched
    try:
        run()
    finally:
        torch.mm = multiply
    return found


def below_training_step(path: list[Hop]) -> list[Hop]:
    """List what `training_step` calls, and what that calls, down to the product."""
    names = [hop.function.rpartition(".")[2] for hop in path]
    return path[names.index("training_step") + 1 :] if "training_step" in names else []


def _path(frame) -> list[Hop]:
    path = []
    while frame is not None:
        if _file(frame).startswith(FOLDERS):
            path.insert(0, Hop(_file(frame), frame.f_code.co_qualname))
        frame = frame.f_back
    return path


def _file(frame) -> str:
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""


def main(arguments: list[str]) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests" / "helpers")]
    from sepo.commands.main import run as sepo

    with tempfile.TemporaryDirectory() as folder:
        if not arguments:
            from training_run import make_run

            arguments = make_run(Path(folder), max_steps=1, save_strategy="no")
            arguments += ["--output_dir", str(Path(folder) / "out")]
        path = hops(lambda: sepo(["train", *arguments]))
    for name, part in (("sepo train", path), ("training_step", below_training_step(path))):
        print(
            f"{len(part)} hops from {name} to the product, in {len({h.file for h in part})} files"
        )
    for hop in path:
        print(f"  {hop.file}: {hop.function}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
