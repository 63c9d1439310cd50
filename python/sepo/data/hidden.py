"""The reference's hidden states on disk: one bfloat16 row a response token, read when asked for.

    part-00000-of-00042.safetensors   `hidden` (T_part, D_ref): the part's responses end to end,
                                      chosen before rejected; row t is the state that predicts token t
    reference_head.safetensors        what turns a row into logits

With them a run that needs the reference's whole distribution loads neither its trunk nor its
checkpoint. Files are memory-mapped: opening one reads its header, reading rows reads their pages.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sepo.errors import InputError

ROWS = "hidden"
HEAD_FILE = "reference_head.safetensors"
ROW_DTYPE = torch.bfloat16


class HiddenFile:
    """The rows of one part, (T_part, D_ref) bfloat16, opened when something first reads them."""

    def __init__(self, path: Path):
        self.path, self._rows = path, None

    def __getitem__(self, where: slice) -> Tensor:
        if self._rows is None:
            self._rows = _open(self.path).get_slice(ROWS)
        return self._rows[where]

    def __reduce__(self):  # a mapping does not travel to another process, a path does
        return HiddenFile, (self.path,)


@dataclass(frozen=True, slots=True, eq=False)
class HiddenRows:
    """Where the reference's rows of one response lie; holds none of them."""

    source: HiddenFile | Tensor  # (T_part, D_ref) bfloat16
    start: int
    count: int  # T

    def __len__(self) -> int:
        return self.count

    def read(self, positions: np.ndarray) -> Tensor:  # (K,) int32 -> (K, D_ref) bfloat16
        rows = self.source[self.start : self.start + self.count]
        return rows[torch.from_numpy(positions).long()]


class StoredHead(NamedTuple):
    """logits = softcap * tanh((row @ weight.T * scale + bias) / softcap)"""

    weight: Tensor  # (V, D_ref), in the dtype it was scored with
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def write_rows(file: Path, parts: list[HiddenRows], run: str) -> None:
    rows = torch.cat([p.source[p.start : p.start + p.count] for p in parts])
    _save(file, {ROWS: rows}, {"run": run})


def check_rows(file: Path, run: str, shape: tuple[int, int]) -> None:
    """Raise InputError for a file that is missing, torn, of another run or of another shape."""
    opened = _open(file)
    if _about(opened).get("run") != run:
        raise InputError(f"{file}: written by another run than the manifest beside it describes")
    if list(opened.keys()) != [ROWS]:
        raise InputError(f"{file}: expected one tensor, {ROWS}, found {list(opened.keys())}")
    found = opened.get_slice(ROWS)
    if (tuple(found.get_shape()), found.get_dtype()) != (shape, "BF16"):
        raise InputError(
            f"{file}: expected {ROWS} {shape} BF16, "
            f"found {tuple(found.get_shape())} {found.get_dtype()}"
        )


def write_head(file: Path, head: StoredHead, run: str) -> None:
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _save(file, tensors, {"run": run, "scale": head.scale, "softcap": head.softcap})


def read_head(file: Path, run: str, width: int) -> StoredHead:
    """The head, memory-mapped. Raises InputError as `check_rows` does."""
    opened = _open(file)
    about = _about(opened)
    if about.get("run") != run:
        raise InputError(f"{file}: written by another run than the manifest beside it describes")
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or weight.shape[1] != width:
        raise InputError(
            f"{file}: expected a weight of width {width}, "
            f"found {None if weight is None else tuple(weight.shape)}"
        )
    return StoredHead(weight, bias, about["scale"], about["softcap"])


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


def _save(file: Path, tensors: dict[str, Tensor], about: dict) -> None:
    # one entry of metadata: safetensors writes several in a random order, and parts are compared
    save_file(tensors, file, metadata={"sepo": json.dumps(about, sort_keys=True)})


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing; run the same `sepo score` command again") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); delete it and score again") from error


def _about(opened) -> dict:
    return json.loads((opened.metadata() or {}).get("sepo", "{}"))
