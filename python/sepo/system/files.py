"""Files that appear whole or not at all, and what killed processes leave of others."""

import fcntl
import os
import shutil
from pathlib import Path

from sepo.errors import InputError


class Atomic:
    """`with` a temporary name to write to; the file gets its own name once it is on the disk.

    The temporary file has a folder to itself, because a writer may put one of its own beside it
    (safetensors does) that a kill leaves there: `clear` takes both away. An OSError on the way, of
    a full disk say, becomes an InputError that names the file.
    """

    def __init__(self, file: Path, owner: str):
        self.file, self._folder = file, file.with_name(f".{file.name}.{owner}.tmp")

    def __enter__(self) -> Path:
        try:
            if not self._folder.is_dir():
                self._folder.unlink(missing_ok=True)
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from error
        return self._folder / self.file.name

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        try:
            if error is None:
                temporary = self._folder / self.file.name
                _sync(temporary)  # before the rename, or a power cut may leave a name alone
                os.replace(temporary, self.file)
                _sync(self.file.parent)
        except OSError as problem:
            error = problem
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> InputError:
        return InputError(f"{self.file}: can't be written: {error.strerror or error}")


def clear(folder: Path, owner: str, *, temporaries: str = ".*.tmp", locks: str = ".*.lock") -> None:
    """Take away what killed processes left of their files, and of locks by their owners' names.

    `owner` is who asks, and writes nothing now. What another owner has, who holds a lock, stays;
    so does everything on a file system without locks.
    """
    left: dict[str, list[Path]] = {path.name[1:-5]: [] for path in folder.glob(locks)}
    for path in folder.glob(temporaries):
        left.setdefault(path.name.split(".")[-2], []).append(path)
    for whose, paths in left.items():
        if whose == owner:
            _remove(paths)
            continue
        try:
            _remove_if_free(folder / f".{whose}.lock", paths)
        except OSError:
            continue  # somebody lives, or nobody can tell


def _remove_if_free(lock: Path, paths: list[Path]) -> None:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:  # of a version without locks
        return _remove(paths)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(paths)
        lock.unlink()
    finally:
        os.close(descriptor)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # of a version before folders
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
