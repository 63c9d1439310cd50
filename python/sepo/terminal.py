"""What a command prints: text of the data neither steers the terminal nor breaks on its encoding."""

import sys
from typing import TextIO


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
