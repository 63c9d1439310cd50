"""A learned mask on disk, beside the model that was trained with it."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sepo.errors import InputError
from sepo.masks.learned import SparseMask

MASK_FILE = "sparse_mask.safetensors"


def save_mask(
    mask: SparseMask,
    folder: str | Path,
    settings: dict | None = None,  # kept with it for a reader, as JSON; nothing is made of them
    *,
    tensors: dict[str, Tensor] | None = None,  # a state dict gathered from shards; None: its own
) -> None:
    """Write `sparse_mask.safetensors` into an existing folder; what it is of stands in the file."""
    tensors = mask.state_dict() if tensors is None else tensors
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"mask": mask.settings, "settings": settings or {}}
    # one entry of metadata: safetensors writes several in a random order, and files are compared
    save_file(
        tensors, Path(folder) / MASK_FILE, metadata={"sepo": json.dumps(about, sort_keys=True)}
    )


def load_mask(folder: str | Path) -> SparseMask:
    """The mask saved in a folder. Raises InputError for a file that is missing, torn or no mask."""
    file = Path(folder) / MASK_FILE
    settings, tensors = _read(file)
    try:
        mask = SparseMask(**settings)
    except TypeError as error:
        raise InputError(f"{file}: expected a learned mask, got one of {settings}") from error
    _fill(mask, tensors, file)
    return mask


def load_into(mask: SparseMask, folder: str | Path) -> None:
    """Give a mask the numbers of one that was saved. Raises InputError, too, for another kind."""
    file = Path(folder) / MASK_FILE
    settings, tensors = _read(file)
    if settings != mask.settings:
        other = [k for k in mask.settings | settings if settings.get(k) != mask.settings.get(k)]
        words = lambda of: ", ".join(f"{key} {of.get(key)}" for key in other)
        raise InputError(
            f"{file}: expected a mask of {words(mask.settings)}, got {words(settings)}"
        )
    _fill(mask, tensors, file)


def _read(file: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get("sepo", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except FileNotFoundError as error:
        raise InputError(f"{file}: expected a learned mask, found no such file") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{file}: expected a learned mask, cannot be read ({error})") from error
    if not isinstance(about, dict) or not isinstance(about.get("mask"), dict):
        raise InputError(
            f"{file}: expected a learned mask, found {', '.join(tensors) or 'nothing'}"
        )
    return about["mask"], tensors


def _fill(mask: SparseMask, tensors: dict[str, Tensor], file: Path) -> None:
    shapes = lambda of: {name: tuple(tensor.shape) for name, tensor in of.items()}
    expected, got = shapes(mask.state_dict()), shapes(tensors)
    if expected != got:
        raise InputError(f"{file}: expected {expected}, got {got}")
    mask.load_state_dict(tensors)
