"""The one exception a user is meant to read, and how a command ends."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NoReturn

from sepo.terminal import StdoutError, held_warnings, release_warnings, say, standard_streams

# what the extras of pyproject.toml bring, by the names that are imported; datasets is in `train`
# too, and is asked for where it reads (sepo.data.read.load)
TRAIN = ("transformers", "accelerate", "safetensors", "pyarrow", "jinja2", "yaml", "tqdm")
REPORT = (*TRAIN, "matplotlib")
EXTRAS = {"train": TRAIN, "report": REPORT, "demo": (*REPORT, "gguf", "vaderSentiment")}


class InputError(ValueError):
    """Something the caller can mend: a file, row, field or flag, with what was expected.

    The command line prints the message alone and exits with code 2; any other exception is a bug
    and keeps its traceback.
    """


class MissingPackage(InputError, ImportError):
    """A package that one of the extras brings is not installed."""


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Turn a failed import into a MissingPackage that names the package and the extra.

    The name comes from a look at what is installed, because transformers hides which import failed
    behind its own. Where all of the extra is here, the error is another's and stays as it is.
    """
    try:
        yield
    except ImportError as error:
        missing = next((name for name in EXTRAS[extra] if find_spec(name) is None), None)
        if missing is None:
            raise
        raise MissingPackage(
            f"{what} needs {missing}, which is not installed: pip install 'sepo[{extra}]'"
        ) from error


def exit_with_one_line(main: Callable[[], None]) -> NoReturn:
    """Run a command; turn an InputError into one line on stderr and exit code 2."""
    with in_one_line():
        main()
    sys.exit(0)


@contextmanager
def in_one_line() -> Iterator[None]:
    """End the process as a command does: code 2 after an InputError, 130 and 141 as shells say.

    What stdout's encoding can't show is written as escapes. Warnings wait until it is known that
    there is no InputError to come: see `sepo.terminal.release_warnings`.
    """
    try:
        with standard_streams(), held_warnings():
            try:
                yield
            except InputError:
                release_warnings(shown=False)
                raise
    except (InputError, StdoutError) as error:
        say(f"sepo: error: {' '.join(str(error).split())}", out=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has seen enough: `sepo inspect ... | head`
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


def one_line(error: BaseException) -> str:
    """Say what another library's exception says: all of a short text, else its first line."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        return str(error).strip().splitlines()[0]
    return text or type(error).__name__


@contextmanager
def in_their_words(flag: str = "") -> Iterator[None]:
    """Turn what transformers and accelerate say of arguments into an InputError."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"{flag}{one_line(error)}") from error
