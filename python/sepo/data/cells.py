"""One cell of a row, checked: messages, strings, token ids, weights.

Every function takes the row's id and the field's name for its message, and raises InputError for a
value of the wrong type. Null is never an error: it becomes the empty value of its kind.
"""

import json
from typing import Any

import numpy as np

from sepo.errors import InputError

# ShareGPT's names; a role column holds the template's own names and is passed through
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def messages(value: Any, id: str, field: str) -> list[dict]:
    """Messages with role and content; other keys pass through to the chat template."""
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError(
            f"row {id}: expected {field} to be messages or a string, got {kind(value)}"
        )
    return [_message(item, id, field) for item in value]


def _message(item: Any, id: str, field: str) -> dict:
    if not isinstance(item, dict):
        raise InputError(
            f"row {id}: expected {field} to hold messages with role and content, got {short(item)}"
        )
    # tables fill the keys that other rows have with None
    extra = {key: _without_none(value) for key, value in item.items() if value is not None}
    if "role" in extra:
        role, content = extra.pop("role"), extra.pop("content", None)
    else:
        name, content = extra.pop("from", None), extra.pop("value", None)
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise InputError(
                f"row {id}: expected each message of {field} to have a role, or a `from` out of "
                f"{known}; got {short(name)}"
            )
    if not isinstance(role, str) or not isinstance(content, str | list | None):
        raise InputError(
            f"row {id}: expected role and content in {field} to be strings, "
            f"got {kind(role)} and {kind(content)}"
        )
    return {"role": role, "content": content, **extra}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def system_turn(row: dict, id: str) -> list[dict]:
    text = string(row.get("system"), id, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def tools(row: dict, id: str) -> list | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, id, "tools")
    if tools and not isinstance(tools, list):
        raise InputError(f"row {id}: expected tools to be a list, got {kind(tools)}")
    return [_without_none(tool) for tool in tools] if tools else None


def string(value: Any, id: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"row {id}: expected {field} to be a string, got {kind(value)}")
    return value


def token_ids(value: Any, id: str, field: str) -> np.ndarray:  # (T,) int32
    array = _array(value, id, field)
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"row {id}: expected {field} to be whole numbers, got {short(value)}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise InputError(f"row {id}: expected {field} to be token ids, got {array.min()}")
    return array.astype(np.int32)


def weight(row: dict, id: str, side: str, count: int) -> np.ndarray | None:  # (T,) float32
    given = [n for n in (f"{side}_mask", f"{side}_weights") if row.get(n) not in (None, "")]
    if not given:
        return None
    if len(given) == 2:
        raise InputError(f"row {id}: expected {given[0]} or {given[1]}, got both")
    field = given[0]
    array = _array(row[field], id, field)
    if array.dtype.kind not in "iufb" or len(array) != count:
        raise InputError(
            f"row {id}: expected {field} to hold {count} numbers, one for each token of "
            f"{side}_ids, got {len(array)}: {short(row[field])}"
        )
    if not (good := np.isfinite(array) & (array >= 0)).all():
        raise InputError(f"row {id}: expected {field} to be finite and >= 0, got {array[~good][0]}")
    if field.endswith("mask") and not (good := np.isin(array, (0, 1))).all():
        raise InputError(
            f"row {id}: expected {field} to be 0 or 1 (else: weights), got {array[~good][0]}"
        )
    return array.astype(np.float32)


def _array(value: Any, id: str, field: str) -> np.ndarray:
    if isinstance(value, str):  # a cell of a CSV file
        value = _json(value, id, field) if value.strip() else []
    value = [] if value is None else value
    if not isinstance(value, list | np.ndarray):
        raise InputError(f"row {id}: expected {field} to be a list of numbers, got {kind(value)}")
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal length
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise InputError(f"row {id}: expected {field} to be one flat list, got {short(value)}")
    return array


def _json(text: str, id: str, field: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(f"row {id}: expected {field} to be JSON, got {short(text)}") from None


def kind(value: Any) -> str:
    return type(value).__name__


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
