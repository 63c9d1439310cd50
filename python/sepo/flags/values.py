"""The values of a configuration held against its annotations, which Python and YAML don't do."""

import math
import os
from dataclasses import Field, fields
from enum import Enum
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from sepo.errors import InputError

EXPECTED: dict[
    type, tuple[str, type | tuple[type, ...]]
] = {  # kind of value -> (in words, what is one)
    int: ("a whole number", Integral),
    float: ("a number", Real),
    bool: ("true or false", bool),
    str: ("text", (str, os.PathLike, bool)),  # bool: of flags that take a path, or true
}


def check_values(args: Any) -> None:  # a dataclass
    """Raises InputError, naming the flag, for a value of another type, or of no choice that there
    is, and for a number that isn't finite. Fields of several types are left to who reads them.
    """
    cls: type = type(args)
    for name, found in kinds(cls).items():
        value, of = getattr(args, name), found - {NoneType}
        _check_finite(name, value)
        if value is None and NoneType in found:
            continue
        if choices := _choices(args.__dataclass_fields__[name], of):
            if value not in choices:
                words = " | ".join(map(str, choices))
                raise InputError(f"--{name}: expected {words}, got {in_yaml(value)}")
        elif len(of) == 1 and (kind := next(iter(of))) in EXPECTED:
            words, types = EXPECTED[kind]
            is_switch = isinstance(value, bool) and kind in (int, float)
            if is_switch or not isinstance(value, types):
                got = repr(value) if isinstance(value, str) else in_yaml(value)
                raise InputError(f"--{name}: expected {words}, got {got}")


def _check_finite(name: str, value) -> None:
    """Raises InputError for NaN and infinity, which no flag can be, wherever in its value."""
    parts = value.values() if isinstance(value, dict) else value
    for part in parts if isinstance(value, dict | list | tuple) else ():
        _check_finite(name, part)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name}: expected a finite number, got {value}")


@cache
def kinds(cls: type) -> dict[str, set[type]]:
    """List what each field of a dataclass, or of its bases, takes: int, list, an Enum, ..."""
    found: dict[str, set[type]] = {field.name: set() for field in fields(cls) if field.init}
    for base in cls.__mro__[:-1]:
        for name, hint in get_type_hints(base).items():
            if name in found:
                parts = get_args(hint) if get_origin(hint) not in (list, dict) else (hint,)
                classes = [get_origin(part) or part for part in parts or (hint,)]
                found[name] |= {kind for kind in classes if isinstance(kind, type)}
    return found


def _choices(field: Field, found: set[type]) -> list:
    enums = [kind for kind in found if issubclass(kind, Enum)]
    return [choice.value for choice in enums[0]] if enums else [*field.metadata.get("choices", ())]


def in_yaml(value: Any) -> str:
    """A value as a user writes it."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value)
