"""Print so that text of the data neither steers the terminal nor breaks on its encoding."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TextIO

_held: list[Callable] | None = None  # what would show what libraries say; None: they say it at once


def escaped(text: str) -> str:
    """The text with line breaks as they are and every other control character as its escape."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str, *, out: TextIO | None = None) -> None:
    """Print lines that may hold ids, paths and words of the data. `out`: stdout if not given."""
    write(escaped(text), out=out)


def write(text: str, *, out: TextIO | None = None) -> None:
    """Print as it is, with escapes for what the output's encoding has no character for."""
    out = sys.stdout if out is None else out
    encoding = getattr(out, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=out)


class StdoutError(Exception):
    """Say that what was printed could not be written: a full disk, under `sepo ... >file`."""


@contextmanager
def standard_streams() -> Iterator[None]:
    """All three there, stdout escaping what it can't encode, raising StdoutError and flushed.

    One that whoever started this had closed leads nowhere: the next file opened would get its
    number, and whatever a library prints. A reader that is gone is BrokenPipeError, as usual.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    given = sys.stdout
    if hasattr(given, "reconfigure"):
        given.reconfigure(errors="backslashreplace")
    sys.stdout = stdout = _Stdout(given)
    try:
        yield
        stdout.flush()
    finally:
        sys.stdout = given
        if stdout.failed or not stdout.can_flush():
            # what it still has would be refused once more at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), given.fileno())


class _Stdout:
    """Another stream, whose errors say whose they are."""

    def __init__(self, stream: TextIO):
        self._stream, self.failed = stream, False

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._do(self._stream.write, text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def can_flush(self) -> bool:
        try:
            self._stream.flush()
        except OSError:
            return False
        return True

    def _do(self, call: Callable, *arguments):
        try:
            return call(*arguments)
        except BrokenPipeError:
            self.failed = True
            raise
        except OSError as error:
            self.failed = True
            raise StdoutError(f"stdout: can't be written: {error.strerror}") from error


@contextmanager
def held_warnings() -> Iterator[None]:
    """Warnings, and what is logged, wait for `release_warnings`, or the end.

    A refusal is to be one line alone, and other libraries warn of what they are about to fail at.
    """
    global _held
    show, emit = warnings.showwarning, logging.StreamHandler.emit

    def held(shown: Callable) -> Callable:
        return lambda *what: shown(*what) if _held is None else _held.append(partial(shown, *what))

    _show_with(held(show), held(emit))
    _held = []
    try:
        yield
    finally:
        release_warnings()
        _show_with(show, emit)


def _show_with(show: Callable, emit: Callable) -> None:
    warnings.showwarning = show
    logging.StreamHandler.emit = emit  # type: ignore[method-assign]  # which handlers look up


def release_warnings(*, shown: bool = True) -> None:
    """From here on warnings are shown at once; first those that were held, if they are to be."""
    global _held
    held, _held = _held or [], None
    for show in held if shown else ():
        show()
