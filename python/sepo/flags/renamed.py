"""Old names of flags and of their values, and what says the same now: one table for every command.

The command line, YAML files, `SePOConfig(...)` and checkpoints of before are read with it.
"""

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from sepo.flags.options import say_idle

T = TypeVar("T")
NAMES = {  # old flag -> the one that takes its value
    "alpha": "tdpo2_alpha",
    "mask": "mask_kind",
    "penalty": "dpop_lambda",
    "recompute": "selective_checkpointing",
    "reference_model_name_or_path": "reference",
    "split": "dataset_split",
}
VALUES = {  # flag and its old value -> the flag and value that say it
    ("first_token", "official"): ("first_token", "released"),
    ("form", "code"): ("form", "released"),
    ("fraction", "mass"): ("select", "mass"),
    ("rejected_fraction", "mass"): ("rejected_select", "mass"),
    ("selective_checkpointing", "cheap"): ("selective_checkpointing", True),
    ("selective_checkpointing", "nothing"): ("selective_checkpointing", False),
}
_OLD_NAMES = {new: old for old, new in NAMES.items()}


def today(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Flags and values as they are called now, and a line for each that was called otherwise.

    An old name counts where the new one is there too: who copies a configuration and changes it by
    an old name means the change.
    """
    found, lines = dict(values), []
    for name, value in values.items():
        flag, says = _today(name, value)
        if (flag, says) != (name, value):
            del found[name]
            lines.append(_line(name, value, flag, says))
    found |= dict(_today(*item) for item in values.items() if _today(*item) != item)
    return found, lines


def today_on_the_command_line(
    argv: list[str],
    known: set[str],  # what the command takes: --gamma, ...
) -> tuple[list[str], list[str]]:
    """The same of a command line's words."""
    found, lines, i = [], [], 0
    while i < len(argv) and argv[i] != "--":
        flag, equals, own = argv[i].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        value = own if equals else next(iter(argv[i + 1 :]), None)
        now, says = _today(name, value)
        if not flag.startswith("--") or now == name and says == value or f"--{now}" not in known:
            found.append(argv[i])
            i += 1
            continue
        lines.append(_line(name, value, now, says))
        found += [f"--{now}={_word(says)}"] if equals or says != value else [f"--{now}"]
        i += 1 if equals or says == value else 2
    return found + argv[i:], lines


def overridden(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values, as they are called now, under those that the command line gave."""
    left = {
        name: value
        for name, value in file.items()
        if not given.keys() & {NAMES.get(name, name), _today(name, value)[0]}
    }
    found, lines = today(left)
    say_renamed(lines)
    return {**found, **given}


def say_renamed(lines: list[str]) -> None:
    """One line of warning each, once and not once a rank."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say_idle(lines)


def takes_old_names(cls: type[T]) -> type[T]:
    """Let a dataclass be made with, and asked by, the old names of its fields."""
    changed: Any = cls  # a checker takes no class whose __init__ is another
    make = changed.__init__

    @wraps(make)
    def __init__(self, *values, **named):
        named, lines = today(named)
        say_renamed(lines)
        make(self, *values, **named)

    changed.__init__ = __init__
    for old, new in NAMES.items():
        if new in changed.__dataclass_fields__:
            setattr(cls, old, property(_reader(new), _writer(new)))
    return cls


def _reader(new: str) -> Callable:
    """Old values too: who asks by an old name compares with them."""
    before = {says: value for (name, value), (_, says) in VALUES.items() if name == new}
    return lambda self: before.get(getattr(self, new), getattr(self, new))


def _writer(new: str) -> Callable:
    return lambda self, value: setattr(self, *_today(new, value))


def _today(name: str, value: Any) -> tuple[str, Any]:
    name = NAMES.get(name, name)
    return VALUES.get((name, value), (name, value)) if isinstance(value, str) else (name, value)


def _line(name: str, value: Any, flag: str, says: Any) -> str:
    if not isinstance(value, str) or (NAMES.get(name, name), value) not in VALUES:
        return f"--{name} is now --{flag}"
    return f"--{_OLD_NAMES.get(name, name)} {value} is now --{flag} {_word(says)}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
