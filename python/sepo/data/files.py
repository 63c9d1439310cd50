"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

from sepo.errors import InputError


class Atomic:
    """`with` a temporary name to write to; the file gets its own name once it is on the disk.

    The temporary file has a folder to itself, because a writer may put one of its own beside it
    (safetensors does) that a kill leaves there: `clear` takes both away.
    """

    def __init__(self, file: Path, owner: str):
        self.file, self._folder = file, file.with_name(f".{file.name}.{owner}.tmp")

    def __enter__(self) -> Path:
        self._folder.mkdir(exist_ok=True)
        return self._folder / self.file.name

    def __exit__(self, failed, *_) -> None:
        if not failed:
            temporary = self._folder / self.file.name
            _sync(temporary)  # before the rename, or a power cut may leave a name without content
            os.replace(temporary, self.file)
            _sync(self.file.parent)
        shutil.rmtree(self._folder)


def clear(folder: Path, owner: str) -> None:
    """Take away what a killed process left of `owner`'s files."""
    for stale in folder.glob(f".*.{owner}.tmp"):
        shutil.rmtree(stale)


def check_folder(path: Path, flag: str) -> None:
    """Raises InputError if a folder can't be made, or written to: before there is work to lose."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        what = "found a file" if there == path else f"{there} is a file"
        raise InputError(f"{flag} {path}: expected a directory, {what}")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"{flag} {path}: expected to write there, got {error.strerror}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
