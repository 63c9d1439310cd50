"""One writer a folder: a lock that the kernel keeps, so that a kill lets it go."""

import errno
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sepo.errors import InputError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # a file system without them
ATTEMPTS = 1000  # to take a lock that others let go in the middle of it
_held: dict[tuple[Path, int], list[int]] = {}  # (file, thread) -> its descriptor, once a holding


@contextmanager
def lock(folder: str | os.PathLike, name: str = "sepo") -> Iterator[None]:
    """Make a folder and hold `name` in it; afterwards lock and folders go, if nothing was written.

    Who holds it may take it again. Raises InputError where another process holds it, and for a
    folder that can't be made or written to.
    """
    if not os.fspath(folder):
        raise InputError("expected a folder to write to, got an empty name")
    made: list[Path] = []  # folders, the deepest first
    file = Path(os.path.realpath(folder)) / f".{name}.lock"
    holdings = _held.get(key := (file, threading.get_ident()))
    try:
        if holdings is None:
            holdings = _held[key] = [_acquire(file, Path(folder), made)]
        else:
            holdings.append(holdings[0])
        try:
            yield
        finally:
            descriptor = holdings.pop() if holdings else None  # none in a forked process
            if descriptor is not None and not holdings:
                del _held[key]
                file.unlink(missing_ok=True)  # while held, or it might be another's
                os.close(descriptor)
    finally:
        for empty in made:
            try:
                empty.rmdir()
            except OSError:  # not empty, or gone
                break


def contents(folder: str | os.PathLike) -> list[Path]:
    """List what lies in a folder but its locks, which a kill leaves as files."""
    return [p for p in Path(folder).iterdir() if not (p.name[0] == "." and p.suffix == ".lock")]


def _acquire(file: Path, folder: Path, made: list[Path]) -> int:
    try:
        for _ in range(ATTEMPTS):
            if (descriptor := _try(file, folder, made)) is not None:
                return descriptor
        raise FileNotFoundError(errno.ENOENT, "one in which no file can be made")  # as in /proc
    except OSError as error:
        above = [place for place in folder.absolute().parents if os.path.isfile(place)]
        found = "a file" if os.path.isfile(folder) else error.strerror
        found = f"{above[0]}, a file" if above else found
        raise InputError(f"{folder}: expected a folder to write to, got {found}") from error


def _try(file: Path, folder: Path, made: list[Path]) -> int | None:
    """None if who held it before took the file or its folder away in the middle of this."""
    made += [p for p in (file.parent, *file.parent.parents) if not p.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        return None
    try:
        _flock(descriptor, folder)
        if _is_named(descriptor, file):
            with suppress(OSError):  # a full disk: whoever writes here will say so
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _flock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise InputError(
            f"{folder} is being written to by {who}: expected one writer, wait for its end or "
            "choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logging.getLogger(__name__).warning(
            f"{folder}: its file system has no locks, so a second writer would not be noticed"
        )


def _is_named(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _forget() -> None:
    """A forked process holds nothing: its parent's lock ends with the parent."""
    for holdings in _held.values():
        os.close(holdings[0])
        holdings.clear()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
