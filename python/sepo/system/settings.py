"""The environment variables that are read, checked before who reads them is imported."""

import os

from sepo.errors import InputError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun sets them


def check_settings() -> None:
    """Raises InputError, naming the variable; and in a folder that somebody has removed."""
    try:
        os.getcwd()
    except OSError as error:  # in which MKL ends the process, and relative paths are none
        raise InputError(f"the current folder: expected one to start in, got {error}") from error
    for name in RANKS:
        least = 1 if name.endswith("WORLD_SIZE") else -1  # which some launchers mean none by
        try:
            if not least <= int(os.environ.get(name, 1)) < 2**31:
                raise ValueError
        except ValueError:
            raise InputError(
                f"{name}: expected a whole number, as torchrun sets it, got {os.environ[name]}"
            ) from None
    if "SEPO_CPU" in os.environ:
        try:
            import sepo_kernels.extension  # noqa: F401
        except ValueError as error:
            raise InputError(str(error)) from error
