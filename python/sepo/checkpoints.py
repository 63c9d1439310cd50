"""Which checkpoint is whole, and of which run: a mark, written last, with every file's hash."""

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sepo.data.files import Atomic
from sepo.data.manifest import sealed, unsealed
from sepo.errors import InputError

MARK = "sepo_checkpoint.json"
FORMAT = 3
RUN = {  # what a run is, so that "continue at step n" means something -> how a message calls it
    "method": "--method",
    "pairs": "number of pairs",
    "pairs_per_step": "--pairs_per_step",
    "fraction": "--fraction",
    "rejected_fraction": "--rejected_fraction",
    "mass": "--mass",
    "first_token": "--first_token",
    "seed": "seed of the pairs' order (--data_seed, else --seed)",
    "lengths": "data (hash of the lengths of its pairs)",
    "trained": "number of trained parameters",
}


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None. Says which ones it passes over, and why."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if _step_of_name(p) is not None]
    for path in sorted(found, key=_step_of_name, reverse=True):
        if (reason := why_torn(path)) is None:
            return str(path)
        logging.getLogger(__name__).warning(f"{path} is passed over: {reason}")
    return None


def why_torn(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint can't be continued from, None if it can; without `contents`: sizes alone."""
    mark = read_mark(checkpoint)
    if mark is None:
        return f"no whole {MARK}, which is written last (--save_only_model writes none)"
    files = mark["files"]
    for name, (size, _) in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name}: expected {size} bytes, found {found}"
    if contents:
        for name, digest in _hashes(checkpoint, list(files)).items():
            if digest != files[name][1]:
                return f"{name}: its contents are not those that were written"
    return None


def read_mark(checkpoint: str | Path) -> dict | None:
    """What was written about a checkpoint, None if nothing whole was."""
    try:
        mark = unsealed(json.loads((Path(checkpoint) / MARK).read_text()))
        return mark if mark["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_mark(
    checkpoint: Path,
    *,
    step: int,
    run: dict,  # of the keys of RUN, and "loss": the flags that the loss reads
    unlogged: list,  # a rank: what its next line of the log needs of the steps before
) -> None:
    """Declare a checkpoint whole, once all its files are on the disk."""
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    for path in (*names, *{str(Path(name).parent) for name in names}):
        _sync(checkpoint / path)  # a mark that outlives what it vouches for would be a lie
    sizes = {name: (checkpoint / name).stat().st_size for name in names}
    files = {name: [sizes[name], digest] for name, digest in _hashes(checkpoint, names).items()}
    mark = {"format": FORMAT, "step": step, "run": run, "unlogged": unlogged, "files": files}
    with Atomic(checkpoint / MARK, "0") as temporary:
        temporary.write_text(json.dumps(sealed(mark), indent=1) + "\n")


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves none that looks whole."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def completed_step(checkpoint: str | Path | None) -> int:
    """The optimiser step at which training goes on; 0 without a checkpoint.

    Raises InputError for one that is not whole; contents are not read, only sizes.
    """
    if checkpoint is None:
        return 0
    _check_whole(Path(checkpoint), contents=False)
    return read_mark(checkpoint)["step"]


def find_checkpoint(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """What `resume_from_checkpoint` means. Raises InputError for a path that is not whole."""
    if asked is True:
        return last_checkpoint(output_dir)
    if not asked:
        return None
    _check_whole(Path(asked))
    return str(asked)


def check_same_run(checkpoint: str | Path, run: dict) -> None:
    """Raises InputError, naming the first difference, for a checkpoint of another run."""
    mark = read_mark(checkpoint)
    if mark is None:
        return
    found = _in_words(run)
    for words, expected in _in_words(mark["run"]).items():
        if expected != found.get(words):
            raise InputError(
                f"{checkpoint} is of another run: expected {words} {expected}, got {found[words]}"
            )


def _in_words(run: dict) -> dict:
    """The run as a message calls it; its method comes first, and decides which flags follow."""
    named = {words: run[key] for key, words in RUN.items()}
    return named | {f"--{name}": value for name, value in run["loss"].items()}


def _check_whole(checkpoint: Path, *, contents: bool = True) -> None:
    if (reason := why_torn(checkpoint, contents=contents)) is not None:
        raise InputError(f"{checkpoint} is not a complete checkpoint: {reason}")


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing drops the GIL
        return dict(zip(names, threads.map(digest, names), strict=True))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _step_of_name(path: Path) -> int | None:
    suffix = path.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdigit() else None
