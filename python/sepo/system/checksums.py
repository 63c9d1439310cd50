"""Whether a store's file is the one that was written: what it says of itself, and its checksum.

CRC-32, because each opening reads every part: a flipped bit always shows, and adding it up takes a
tenth of the time that decoding takes.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from sepo.errors import InputError


def crc32_of_json(value: Any, start: int = 0) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode(), start)


def crc32_of_tensor(values: Tensor, start: int = 0) -> int:
    """Of the bytes of a tensor in memory."""
    return zlib.crc32(values.detach().contiguous().view(uint8).numpy().data, start)


def parse_about(file: Path, text: str | bytes) -> dict:
    """Read what a file says of itself. Raises InputError for what is no JSON object."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(file) from error
    if not isinstance(about, dict):
        raise damaged(file)
    return about


def check_about(file: Path, found: dict, expected: dict) -> None:
    """Raise InputError for a file of another run, or of another part, than `expected`.

    What `found` lacks is not looked at: an older version didn't write it.
    """
    if found.get("run") != expected["run"]:
        raise InputError(f"{file}: written by another run than the manifest beside it describes")
    for key, words in (("part", "part"), ("pairs", "pairs from and up to")):
        if key in found and found[key] != expected.get(key):
            raise InputError(
                f"{file}: expected {words} {expected.get(key)}, found {found[key]}; "
                "delete it and score again"
            )


def damaged(file: Path, where: str = "") -> InputError:
    return InputError(
        f"{file}{where}: its contents are not those that were written; delete it and score again"
    )
