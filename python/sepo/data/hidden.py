"""The reference's hidden states on disk: one bfloat16 row a response token, read when asked for.

    part-00000-of-00042.safetensors   `hidden` (T_part, D_ref): the part's responses end to end,
                                      chosen before rejected; row t is the state that predicts token t
    reference_head.safetensors        what turns a row into logits

With them a run that needs the reference's whole distribution loads neither its trunk nor its
checkpoint. Files are memory-mapped: opening one reads its header, reading rows reads their pages.
Headers hold a CRC-32 of every response's rows, and of the head; it is compared when they are read.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sepo.errors import InputError
from sepo.system.checksums import check_about, crc32_of_json, crc32_of_tensor, damaged, parse_about

ROWS = "hidden"
HEAD_FILE = "reference_head.safetensors"
ROW_DTYPE = torch.bfloat16


class HiddenFile:
    """The rows of one part, (T_part, D_ref) bfloat16, opened when something first reads them."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: Any = None  # a slice of safetensors

    def __getitem__(self, where: slice) -> Tensor:
        if self._rows is None:
            self._rows = _open(self.path).get_slice(ROWS)
        return self._rows[where]

    # a mapping does not travel to another process, a path does
    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return HiddenFile, (self.path,)


@dataclass(frozen=True, slots=True, eq=False)
class HiddenRows:
    """Where the reference's rows of one response lie; holds none of them."""

    source: HiddenFile | Tensor  # (T_part, D_ref) bfloat16
    start: int
    count: int  # T
    check: int | None = None  # CRC-32 of a file's rows as they were written; None: nobody knows

    def __len__(self) -> int:
        return self.count

    def read(self, positions: np.ndarray) -> Tensor:  # (K,) int32 -> (K, D_ref) bfloat16
        """Raises InputError for rows that are not those that were written."""
        return self.whole()[torch.from_numpy(positions).long()]

    def whole(self) -> Tensor:  # (T, D_ref) bfloat16
        """All rows; raises as `read`."""
        rows = self.source[self.start : self.start + self.count]
        if not isinstance(self.source, HiddenFile) or self.check is None:
            return rows
        if crc32_of_tensor(rows) != self.check:
            raise damaged(self.source.path, f" (rows {self.start} to {self.start + self.count})")
        return rows


class StoredHead(NamedTuple):
    """logits = softcap * tanh((row @ weight.T * scale + bias) / softcap)"""

    weight: Tensor  # (V, D_ref), in the dtype it was scored with
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def write_rows(file: Path, responses: list[HiddenRows], about: dict) -> None:
    """Write a part's rows; `about` is what `open_rows` shall find."""
    rows = [response.whole() for response in responses]
    _save(file, {ROWS: torch.cat(rows)}, about | {"checks": [crc32_of_tensor(one) for one in rows]})


def open_rows(
    file: Path, about: dict, lengths: np.ndarray, width: int
) -> tuple[HiddenFile, list[int | None]]:
    """A part's rows, and the CRC-32 of each response's; None: an older version wrote none.

    `lengths` are those of the responses. Raises InputError for a file that is missing, torn, of
    another run, part or shape.
    """
    opened = _open(file)
    found = _about(file, opened)
    check_about(file, found, about)
    checks = found.get("checks", [None] * len(lengths))
    if not isinstance(checks, list) or len(checks) != len(lengths):
        raise damaged(file)
    shape = (int(lengths.sum()), width)
    if list(opened.keys()) != [ROWS]:
        raise InputError(f"{file}: expected one tensor, {ROWS}, found {list(opened.keys())}")
    found = opened.get_slice(ROWS)
    if (tuple(found.get_shape()), found.get_dtype()) != (shape, "BF16"):
        raise InputError(
            f"{file}: expected {ROWS} {shape} BF16, "
            f"found {tuple(found.get_shape())} {found.get_dtype()}"
        )
    return HiddenFile(file), checks


def write_head(file: Path, head: StoredHead, run: str) -> None:
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {"run": run, "scale": head.scale, "softcap": head.softcap}
    _save(file, tensors, about | {"check": _check_of_head(tensors, about)})


def read_head(file: Path, run: str, width: int, *, contents: bool = True) -> StoredHead:
    """The head, memory-mapped; its values are compared with their checksum if `contents`.

    Raises InputError as `open_rows` does.
    """
    opened = _open(file)
    about = _about(file, opened)
    check_about(file, about, {"run": run})
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    check = about.pop("check", None)
    if contents and check is not None and check != _check_of_head(tensors, about):
        raise damaged(file)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or weight.shape[1] != width:
        raise InputError(
            f"{file}: expected a weight of width {width}, "
            f"found {None if weight is None else tuple(weight.shape)}"
        )
    try:
        return StoredHead(weight, bias, float(about["scale"]), _number(about["softcap"]))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(file) from error


def check_room(path: Path, num_bytes: int) -> None:
    """Raise InputError where the disk under `path`, which need not exist yet, has less."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise InputError(
            f"{path}: the reference's rows take {size_name(num_bytes)}, "
            f"but the disk has {size_name(free)} left"
        )


def size_name(num_bytes: int) -> str:
    """1234567890 -> "1.23 GB"."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _check_of_head(tensors: dict[str, Tensor], about: dict) -> int:
    check = crc32_of_json(about)
    for name, tensor in sorted(tensors.items()):
        kind = [name, str(tensor.dtype), list(tensor.shape)]
        check = crc32_of_tensor(tensor, crc32_of_json(kind, check))
    return check


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _save(file: Path, tensors: dict[str, Tensor], about: dict) -> None:
    # one entry of metadata: safetensors writes several in a random order, and parts are compared
    try:
        save_file(tensors, file, metadata={"sepo": json.dumps(about, sort_keys=True)})
    except SafetensorError as error:  # says so of a full disk
        raise OSError(str(error)) from error


def _open(file: Path) -> Any:
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for, for ever
            raise OSError("it is no file")
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing; run the same `sepo score` command again") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); delete it and score again") from error


def _about(file: Path, opened: Any) -> dict:
    return parse_about(file, (opened.metadata() or {}).get("sepo", "{}"))
