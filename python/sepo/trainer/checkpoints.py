"""Which checkpoint is whole, and of which run: a mark, written last, with every file's hash."""

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sepo.data.hidden import size_name
from sepo.data.store.manifest import sealed, unsealed
from sepo.errors import InputError
from sepo.flags.renamed import today
from sepo.system.files import Atomic

MARK = "sepo_checkpoint.json"
NO_MARK = f"no whole {MARK}, which is written last (--save_only_model writes none)"
FORMAT = 4
READABLE = (3, FORMAT)  # format 3 knows less of its run


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None. Says which ones it passes over, and why."""
    for path in sorted(_checkpoints(output_dir), key=_step_of_name, reverse=True):
        if (reason := why_torn(path)) is None:
            return str(path)
        logging.getLogger(__name__).warning(f"{path} is passed over: {reason}")
    return None


def why_torn(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint can't be continued from, None if it can; without `contents`: sizes alone."""
    mark = read_mark(checkpoint)
    if mark is None:
        return NO_MARK
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
    """Read what was written about a checkpoint, under today's names; None if nothing whole was."""
    try:
        mark = unsealed(json.loads((Path(checkpoint) / MARK).read_text()))
        known = mark["format"] in READABLE and {"step", "run", "unlogged", "files"} <= mark.keys()
        return _with_todays_names(mark) if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_mark(
    checkpoint: Path,
    *,
    step: int,
    run: dict,  # see sepo.trainer.identity
    flags: dict,
    unlogged: list,  # a rank: what its next line of the log needs of the steps before
) -> None:
    """Declare a checkpoint whole, once all its files are on the disk."""
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    for path in (*names, *{str(Path(name).parent) for name in names}):
        _sync(checkpoint / path)  # a mark that outlives what it vouches for would be a lie
    sizes = {name: (checkpoint / name).stat().st_size for name in names}
    files = {name: [sizes[name], digest] for name, digest in _hashes(checkpoint, names).items()}
    mark = {"format": FORMAT, "step": step, "run": run, "flags": flags}
    mark |= {"unlogged": unlogged, "files": files}
    with Atomic(checkpoint / MARK, "0") as temporary:
        temporary.write_text(json.dumps(sealed(mark), indent=1) + "\n")


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves none that looks whole."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def check_room(output_dir: Path, num_bytes: int) -> None:
    """Raise InputError where the disk has less left than the weights of one checkpoint take."""
    free = shutil.disk_usage(output_dir).free
    if free < num_bytes:
        raise InputError(
            f"{output_dir}: expected room for the weights, {size_name(num_bytes)}, "
            f"but the disk has {size_name(free)} left"
        )


def rotate(
    output_dir: str | Path,
    limit: int | None,  # None or 0: all are kept
    newest: Path,  # is kept, whatever the limit
    best: str | Path | None = None,  # likewise
) -> None:
    """Delete the checkpoints beyond the limit: torn ones first, then by step.

    What lies beyond the newest step is of a run that was given up, and goes before what led to it.
    """
    if not limit or limit < 0:
        return
    kept = {newest} | ({Path(best)} if best else set())
    end, rest = _step_of_name(newest), [p for p in _checkpoints(output_dir) if p not in kept]
    worth = lambda p: (
        why_torn(p, contents=False) is None,
        _step_of_name(p) <= end,
        _step_of_name(p),
    )
    for path in sorted(rest, key=worth, reverse=True)[max(limit - len(kept), 0) :]:
        remove(path)


def completed_step(checkpoint: str | Path | None) -> int:
    """The optimiser step at which training goes on; 0 without a checkpoint.

    Raises InputError for one that is not whole; contents are not read, only sizes.
    """
    if checkpoint is None:
        return 0
    _check_whole(Path(checkpoint), contents=False)
    return whole_mark(checkpoint)["step"]


def whole_mark(checkpoint: str | Path) -> dict:
    """What was written about a checkpoint. Raises InputError for one without a whole mark."""
    if (mark := read_mark(checkpoint)) is None:
        raise InputError(f"{checkpoint} is not a complete checkpoint: {NO_MARK}")
    return mark


def find_checkpoint(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """Find what `resume_from_checkpoint` means. Raises InputError for a path that is not whole."""
    if asked is True:
        return last_checkpoint(output_dir)
    if not asked:
        return None
    _check_whole(Path(asked))
    return str(asked)


def _check_whole(checkpoint: Path, *, contents: bool = True) -> None:
    if (reason := why_torn(checkpoint, contents=contents)) is not None:
        raise InputError(f"{checkpoint} is not a complete checkpoint: {reason}")


def _with_todays_names(mark: dict) -> dict:
    """The mark of an older version with --penalty as --dpop_lambda, and so on.

    A run's `fraction` may stay "mass": its identity says what was selected, not how it was asked.
    """
    now = lambda values: today(values)[0]
    run = mark["run"]
    run = run | now({name: run[name] for name in ("first_token",) if name in run})
    return mark | {
        "run": run | {name: now(run[name]) for name in ("loss",) if name in run},
        **{name: now(mark[name]) for name in ("flags",) if name in mark},
    }


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


def _checkpoints(output_dir: str | Path) -> list[Path]:
    found = Path(output_dir).glob("checkpoint-*")
    return [p for p in found if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]


def _step_of_name(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
