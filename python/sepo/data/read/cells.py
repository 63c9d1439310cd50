"""One cell of a row, checked: messages, strings, token ids, weights.

Every function takes the row's id and the field's name for its message, and raises InputError for a
value of the wrong type. Null is never an error: it becomes the empty value of its kind.
"""

import re
from typing import Any

import numpy as np

from sepo.data.read import strict_json
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
OWN_KWARGS = {  # of apply_chat_template: what a row may not tell it
    "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip


def messages(value: Any, pair_id: str, field: str) -> list[dict]:
    """Messages with role and content; other keys pass through to the chat template."""
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError(
            f"pair {pair_id}: expected {field} to be messages or a string, got {kind(value)}"
        )
    return [_message(item, pair_id, field) for item in value]


def unquoted(value: Any, pair_id: str, field: str) -> Any:
    """A cell's value, or the messages that are written in it as JSON, as in a CSV file.

    Raises InputError for what Python prints of them, which no one can read back for sure.
    """
    if not isinstance(value, str) or not re.match(
        r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:", value
    ):
        return value
    try:
        found = strict_json.loads(value)
    except strict_json.DuplicateKeyError as error:
        raise InputError(f"pair {pair_id}: expected {field} to be messages, got {error}") from None
    except ValueError:
        if re.match(r"\s*\[\s*\{\s*'", value) and value.rstrip().endswith("]"):
            raise InputError(
                f"pair {pair_id}: expected {field} to be a string, messages, or messages as JSON, "
                f"got what Python prints of a list: {short(value)}"
            ) from None
        return value
    names = ({"role", "content"}, {"from", "value"})
    is_all = all(isinstance(m, dict) and any(n <= m.keys() for n in names) for m in found)
    return found if is_all else value


def _message(item: Any, pair_id: str, field: str) -> dict:
    if not isinstance(item, dict):
        raise InputError(
            f"pair {pair_id}: expected {field} to hold messages with role and content, "
            f"got {short(item)}"
        )
    if item.get("role") is None:
        name = item.get("from")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise InputError(
                f"pair {pair_id}: expected each message of {field} to have a role, or a `from` "
                f"out of {known}; got {short(name)}"
            )
        rest = {k: v for k, v in item.items() if k not in ("role", "from", "value")}
        item = {"role": role, "content": item.get("value"), **rest}
    role, content = item["role"], item.get("content")
    if not isinstance(role, str) or not isinstance(content, str | list | None):
        raise InputError(
            f"pair {pair_id}: expected role and content in {field} to be strings, "
            f"got {kind(role)} and {kind(content)}"
        )
    for key, value in item.items():
        if not isinstance(value, str):
            _check_json(value, pair_id, f"{key} in {field}")
    return item


def _check_json(value: Any, pair_id: str, field: str) -> None:
    """A template would print the type's name of anything else, a date say, in place of the value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_json(item, pair_id, field)
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise InputError(
            f"pair {pair_id}: expected {field} to hold what JSON can say, got {kind(value)} "
            f"({short(value)}); store it as text"
        )


def system_turn(row: dict, pair_id: str) -> list[dict]:
    text = string(row.get("system"), pair_id, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def tools(row: dict, pair_id: str) -> list | None:
    tools = _json_cell(row, pair_id, "tools")
    if tools and not isinstance(tools, list):
        raise InputError(f"pair {pair_id}: expected tools to be a list, got {kind(tools)}")
    return tools or None


def template_kwargs(row: dict, pair_id: str) -> dict | None:
    """Read what the row tells its chat template, under the name that TRL gives the column."""
    field = "chat_template_kwargs"
    kwargs = _json_cell(row, pair_id, field)
    if kwargs and not isinstance(kwargs, dict):
        raise InputError(f"pair {pair_id}: expected {field} to be an object, got {kind(kwargs)}")
    if taken := sorted(OWN_KWARGS.intersection(kwargs or ())):
        raise InputError(
            f"pair {pair_id}: expected {field} to hold what the chat template reads, got {taken[0]}"
        )
    return kwargs or None


def history(row: dict, pair_id: str) -> list[dict]:
    """LLaMA-Factory's earlier turns: pairs of what the user and the assistant said."""
    pairs = _json_cell(row, pair_id, "history") or []
    turns = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise InputError(
                f"pair {pair_id}: expected history to hold pairs of strings, what the user and the "
                f"assistant said, got {short(pair)}"
            )
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns


def is_filled(value: Any) -> bool:
    """Whether a cell says anything; JSON in a cell of text may say that it does not."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _json_cell(row: dict, pair_id: str, field: str) -> Any:
    value = row.get(field)
    if not is_filled(value):
        return None
    if isinstance(value, str):
        return _json(value, pair_id, field)
    _check_json(value, pair_id, field)
    return value


def string(value: Any, pair_id: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"pair {pair_id}: expected {field} to be a string, got {kind(value)}")
    return value


def token_ids(value: Any, pair_id: str, field: str) -> np.ndarray:  # (T,) int32
    array = _array(value, pair_id, field)
    if array.size and array.dtype.kind not in "iu":
        raise InputError(
            f"pair {pair_id}: expected {field} to be whole numbers, got {short(value)}"
        )
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise InputError(f"pair {pair_id}: expected {field} to be token ids, got {array.min()}")
    return array.astype(np.int32)


def weight(row: dict, pair_id: str, side: str, count: int) -> np.ndarray | None:  # (T,) float32
    given = [n for n in (f"{side}_mask", f"{side}_weights") if row.get(n) not in (None, "")]
    if not given:
        return None
    if len(given) == 2:
        raise InputError(f"pair {pair_id}: expected {given[0]} or {given[1]}, got both")
    field = given[0]
    array = _array(row[field], pair_id, field)
    if array.dtype.kind not in "iufb" or len(array) != count:
        raise InputError(
            f"pair {pair_id}: expected {field} to hold {count} numbers, one for each token of "
            f"{side}_ids, got {len(array)}: {short(row[field])}"
        )
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)  # in which 1e300 is infinite
    if not (good := np.isfinite(narrow) & (array >= 0)).all():
        raise InputError(
            f"pair {pair_id}: expected {field} to be finite and >= 0, got {array[~good][0]}"
        )
    if field.endswith("mask") and not (good := np.isin(array, (0, 1))).all():
        raise InputError(
            f"pair {pair_id}: expected {field} to be 0 or 1 (else: weights), got {array[~good][0]}"
        )
    return narrow


def _array(value: Any, pair_id: str, field: str) -> np.ndarray:
    if isinstance(value, str):  # a cell of a CSV file
        value = _json(value, pair_id, field) if value.strip() else []
    value = [] if value is None else value
    if not isinstance(value, list | np.ndarray):
        raise InputError(
            f"pair {pair_id}: expected {field} to be a list of numbers, got {kind(value)}"
        )
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal length
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise InputError(
            f"pair {pair_id}: expected {field} to be one flat list, got {short(value)}"
        )
    return array


def _json(text: str, pair_id: str, field: str) -> Any:
    try:
        return strict_json.loads(text)
    except strict_json.DuplicateKeyError as error:
        raise InputError(f"pair {pair_id}: expected {field} to be JSON, got {error}") from None
    except ValueError:
        raise InputError(
            f"pair {pair_id}: expected {field} to be JSON, got {short(text)}"
        ) from None


def kind(value: Any) -> str:
    return type(value).__name__


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
