"""Types of the commands' flags, which say what they expected; and what is said of idle ones."""

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sepo.errors import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class FlagType(Generic[T]):
    """Read a flag's value, or raise ArgumentTypeError saying what was expected."""

    read: Callable[[str], T]
    metavar: str  # what help shows for a value: see sepo.flags.parser.Help

    def __call__(self, text: str) -> T:
        return self.read(text)


def whole_number(least: int, most: int | None = None) -> FlagType[int]:
    """A whole number of at least `least`, at most `most`."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text}")
        return value

    return FlagType(read, "N")


positive = whole_number(1)
seed = whole_number(0, 2**32 - 1)  # numpy's generators take no other


def _share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text}")
    return value


share = FlagType(_share, "X")


def device(text: str) -> str:
    """A device that this machine can compute on."""
    import torch

    try:
        found = torch.device(text)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device that is here, as cpu or cuda:0, got {text} ({one_line(error)})"
        ) from None
    return text


def say_idle(notes: list[str]) -> None:
    """One line of warning a note, of a flag that does nothing."""
    for note in notes:
        logging.getLogger(__name__).warning(note)
