"""JSON in which an object has each key once.

Python's reader keeps the last of two equal keys and says nothing, so a column or a message's text
would be lost.
"""

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has a key twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKeyError(f"the key {twice!r} twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def loads(text: str) -> Any:
    """Return the value that the text holds. Raises ValueError, DuplicateKeyError among them."""
    return _DECODER.decode(text)
