"""The manifest of a scored store: what was scored, by which models, and into how many parts."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sepo.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
IDENTITY = {  # manifest entries that make two runs the same run -> how a message calls them
    "format": "format version",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "oracle": "oracle weights",
    "oracle_dtype": "oracle dtype",
    "reference": "reference weights",
    "reference_dtype": "reference dtype",
    "source": "data",
    "keep": "kept columns",
    "pairs": "number of pairs",
    "pairs_per_part": "pairs per part",
}
# the same of newer entries, which a store has where its models' dtypes do not say it
LATER = {"oracle_arithmetic": "oracle arithmetic", "reference_arithmetic": "reference arithmetic"}
DTYPES = ("float64", "float32", "bfloat16", "float16")
MOST = 1 << 53  # pairs: no number that a store can mean is lost on the way through JSON


def read_manifest(path: Path) -> dict | None:
    """The manifest of a store, None if there is none.

    Raises InputError for another format, for a checksum that does not fit, and for an entry that
    is lacking or can't be what it says.
    """
    file = path / MANIFEST
    if not os.path.isfile(file):
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format"]
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: expected the JSON manifest of a scored store") from error
    if found != FORMAT:
        raise InputError(f"{file}: expected format version {FORMAT}, found {found}")
    try:
        manifest = unsealed(manifest)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    check_entries(file, manifest)
    return manifest


def begun_with(path: Path, entry: str) -> Any:
    """Read an entry of the manifest of a store that is continued; None if there is none yet."""
    return (read_manifest(path) or {}).get(entry)


def arithmetics_of(path: Path, roles: Iterable[str]) -> dict[str, str]:
    """In what the models of a store that is continued score; nothing if there is none yet."""
    manifest = read_manifest(path) or {}
    return {role: found for role in roles if (found := arithmetic_of(manifest, role))}


def arithmetic_of(manifest: dict, role: str) -> Any:
    return manifest.get(f"{role}_arithmetic") or manifest.get(f"{role}_dtype")


def check_same_run(path: Path, present: dict, wanted: dict) -> None:
    """Raise InputError for a store of another run, naming the first entry that differs."""
    for key, words in (IDENTITY | LATER).items():
        found, got = (_in_force(manifest, key) for manifest in (present, wanted))
        if found != got:
            shown, asked = str(found)[:32], str(got)[:32]  # hashes are long
            raise InputError(
                f"{path}: holds a store with another {words} ({shown}, this run: {asked}); "
                "choose another directory, or delete this one"
            )


def _in_force(manifest: dict, key: str) -> Any:
    role = key.removesuffix("_arithmetic")
    return arithmetic_of(manifest, role) if key in LATER else manifest.get(key)


def check_entries(file: Path, manifest: dict) -> None:
    """Raise InputError for an entry that is lacking or can't be what it says."""
    for key, (words, is_good) in ENTRIES.items():
        if key not in manifest and key in IDENTITY:
            raise InputError(f"{file}: expected {key}, {words}, got none")
        if key in manifest and not is_good(value := manifest[key]):
            raise InputError(f"{file}: expected {key} to be {words}, got {str(value)[:40]}")


def sealed(manifest: dict) -> dict:
    """Add a checksum to what is written of a dict."""
    return manifest | {"check": hash_json(manifest)}


def unsealed(written: dict) -> dict:
    """Undo `sealed`; older versions wrote no checksum. Raises ValueError for another."""
    if not isinstance(written, dict):
        raise ValueError(f"expected a JSON object, got {type(written).__name__}")
    value = {key: entry for key, entry in written.items() if key != "check"}
    if "check" in written and written["check"] != hash_json(value):
        raise ValueError("its contents are not those that were written")
    return value


def run_of(manifest: dict) -> str:
    """Names the run; every file of the store says it."""
    later = [[key, manifest[key]] for key in LATER if manifest.get(key) is not None]
    return hash_json([*(manifest.get(key) for key in IDENTITY), *later])


def num_parts(manifest: dict) -> int:
    return -(-manifest["pairs"] // manifest["pairs_per_part"])


def part_name(manifest: dict, part: int) -> str:
    return f"part-{part:05d}-of-{num_parts(manifest):05d}.parquet"


def pairs_of(manifest: dict, part: int) -> range:
    """Indices of the pairs that belong to a part."""
    size = manifest["pairs_per_part"]
    return range(part * size, min((part + 1) * size, manifest["pairs"]))


def about_part(manifest: dict, part: int) -> dict:
    """Describe a part for its own files, beside their contents."""
    pairs = pairs_of(manifest, part)
    return {"run": run_of(manifest), "part": part, "pairs": [pairs.start, pairs.stop]}


def hash_json(value: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _optional(is_good: Callable) -> Callable:
    return lambda value: value is None or is_good(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < MOST


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_plain(value: object) -> bool:
    """A dict that every reader of JSON understands: no number in it is NaN or infinite."""
    try:
        return isinstance(value, dict) and bool(json.dumps(value, allow_nan=False))
    except ValueError:
        return False


_TEXT, _SOME_TEXT = ("text", _is_text), ("text or null", _optional(_is_text))
_COUNT = (f"a whole number from 1 to {MOST - 1}", _is_count)
_SOME_COUNT = (f"{_COUNT[0]}, or null", _optional(_is_count))
_DTYPE = (f"{', '.join(DTYPES)} or null", _optional(DTYPES.__contains__))
_OBJECT = ("an object of finite numbers, or null", _optional(_is_plain))
ENTRIES = {  # entry -> what it is in words, and whether a value is that
    "tokenizer": _TEXT,
    "tokenizer_name": _SOME_TEXT,
    "chat_template": _TEXT,
    "source": _TEXT,
    "keep": ("a list of text", _is_list_of_text),
    "pairs": _COUNT,
    "pairs_per_part": _COUNT,
    "sepo": _SOME_TEXT,
    "reading": _OBJECT,
    "max_length": _SOME_COUNT,
    "hidden_width": _SOME_COUNT,
    "transferred": _OBJECT,
    "precision_check": _OBJECT,
    "arithmetic_reason": _SOME_TEXT,
    **dict.fromkeys(LATER, _SOME_TEXT),
}
for _role in ("oracle", "reference"):
    ENTRIES |= {_role: _SOME_TEXT, f"{_role}_name": _SOME_TEXT, f"{_role}_dtype": _DTYPE}
