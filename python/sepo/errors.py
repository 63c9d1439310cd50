"""The one exception a user is meant to read."""

import sys
from collections.abc import Callable
from typing import NoReturn

from sepo.terminal import say


class InputError(ValueError):
    """Something the caller can mend: a file, row, field or flag, with what was expected.

    The command line prints the message alone and exits with code 2; any other exception is a bug
    and keeps its traceback.
    """


def exit_with_one_line(main: Callable[[], None]) -> NoReturn:
    """Run a command; turn an InputError into one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        say(f"sepo: error: {' '.join(str(error).split())}", out=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
