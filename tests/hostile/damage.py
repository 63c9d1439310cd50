"""A store and a checkpoint to be damaged, and what counts as having noticed."""

from collections.abc import Callable
from pathlib import Path

from tiny_trainer import make_trainer
from whole_stores import read_all, whole_pairs, write_whole

from sepo.errors import InputError
from sepo.trainer.checkpoints import find_checkpoint, read_mark

REFUSED, HARMLESS, SILENT = "refused", "harmless", "silent"


def make_store(path: Path) -> Path:
    return write_whole(path, whole_pairs(12, length=9), per_part=4)


def make_checkpoint(path: Path) -> Path:
    flags = dict(method="sepo", optim="adamw_torch", max_steps=2, logging_steps=3)
    make_trainer(path, save_strategy="steps", save_steps=2, **flags).train()
    return path / "checkpoint-2"


def read_checkpoint(path: Path) -> list:
    """What a run goes on with: every file that the mark names, and what it says."""
    found = Path(find_checkpoint(str(path), path.parent))
    mark = read_mark(found)
    return [mark, *((found / name).read_bytes() for name in sorted(mark["files"]))]


READ: dict[str, tuple[Callable[[Path], Path], Callable[[Path], list]]] = {
    "store": (make_store, read_all),
    "checkpoint": (make_checkpoint, read_checkpoint),
}


def outcome(read: Callable[[Path], list], path: Path, expected: list) -> str:
    """Of one reading of what was damaged; any exception but a refusal is a fault of its own."""
    try:
        return HARMLESS if read(path) == expected else SILENT
    except InputError:
        return REFUSED
