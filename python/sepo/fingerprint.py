"""Name a model by its weights, so that scores can say what made them."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from sepo.errors import InputError

CHUNK = 1 << 24  # values cast and copied to the host at once: 64 MiB in float32
WEIGHTS = "model.safetensors"  # looked for in this order, as transformers does
UNREAD = "not read"
INDEX = "model.safetensors.index.json"


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of a model's parameters and persistent buffers.

    Names, shapes and values count; dtype and device do not: floating-point values are read as
    float32. So a bfloat16 checkpoint has one hash whether it is loaded in bfloat16 or float32,
    and a float32 checkpoint rounded to bfloat16 has another. Tied weights count once. Raises
    ValueError for a model without values (on the meta device).
    """
    stored = _stored(model)
    for name, tensor in sorted(stored.items()):
        if tensor.is_meta:
            raise ValueError(f"weights_hash: {name} is on the meta device, expected values")
    return _hash(stored.items())


def checkpoint_hash(
    path: str,  # hub id or local directory
    *,
    dtype: torch.dtype = torch.float32,  # to which loading would round
    trust_remote_code: bool = False,
) -> str:
    """`weights_hash` of the model that transformers would load, read from its files.

    The files are memory-mapped: no model is built, and no more than CHUNK values are copied at
    once. A checkpoint that stores its tensors under other names or shapes than the model's (an
    adapter, an older layout, merged experts) is loaded after all. Raises InputError for a path
    without a model in safetensors.
    """
    code = dict(trust_remote_code=trust_remote_code)
    try:
        if _file(path, "adapter_config.json") is None:  # else it is two checkpoints
            config = AutoConfig.from_pretrained(path, **code)
            with torch.device("meta"):  # names and shapes, and which weights are tied
                model = AutoModelForCausalLM.from_config(config, **code)
            expected, found = _stored(model), _on_disk(path, model)
            fits = lambda name: name in found and found[name].shape == expected[name].shape
            if all(map(fits, expected)):
                return _hash(((name, found[name]) for name in expected), dtype)
        load = AutoModelForCausalLM.from_pretrained
        return weights_hash(load(path, dtype=dtype, use_safetensors=True, **code))
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"can't read a model from {path}: {reason}") from error


def quick_hash(model: nn.Module, *, frozen: bool = False) -> str | None:
    """16 hex digits for the weights as they lie in memory, hashed by several threads.

    Unlike `weights_hash` it tells dtypes apart. With `frozen` only what is not trained counts,
    under the names of the model without adapters; None if all of it is trained. UNREAD where
    weights are not here to be read: in shards, or on the meta device.
    """
    named = _stored(model)
    if frozen and all(p.requires_grad for p in model.parameters()):
        return None
    if frozen:
        named = {_without_adapters(n): t for n, t in named.items() if not t.requires_grad}
    if any(t.is_meta or not t.numel() for t in named.values()):
        return UNREAD
    tensors = sorted(named.items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing drops the GIL
        digests = threads.map(lambda item: _raw_hash(item[1]), tensors)
        lines = [
            f"{n} {t.dtype} {tuple(t.shape)} {d}"
            for (n, t), d in zip(tensors, digests, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@torch.no_grad()
def _raw_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for chunk in tensor.reshape(-1).split(CHUNK):
        digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_adapters(name: str) -> str:
    """A frozen weight's name before peft wrapped its module."""
    for part in ("base_layer.", "original_module."):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


def _hash(stored: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(stored, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for chunk in _chunks(tensor.detach(), dtype):
            digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


def _stored(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())  # a tied parameter under its first name only
    # Non-persistent buffers (rotary tables, masks) are computed, and on some models in the dtype
    # of the load: they would give one checkpoint two hashes.
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return parameters | buffers


def _on_disk(path: str, model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint's tensors by the model's names, memory-mapped."""
    if (whole := _file(path, WEIGHTS)) is not None:
        tensors = _tensors(whole)
    elif (index := _file(path, INDEX)) is not None:
        tensors = {}
        for shard in sorted(set(json.loads(Path(index).read_text())["weight_map"].values())):
            if (file := _file(path, shard)) is None:
                raise OSError(f"{shard} is missing")
            tensors |= _tensors(file)
    else:
        return {}
    transforms = _transforms(model)
    return {_rename(name, transforms): tensor for name, tensor in tensors.items()}


def _transforms(model: nn.Module) -> list:
    """What transformers does to a checkpoint's names (GPT-NeoX stores its head as embed_out)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # not a public name; without it such a checkpoint is loaded
        return []
    return get_model_conversion_mapping(model)


def _rename(name: str, transforms: list) -> str:
    for transform in transforms:
        name, changed = transform.rename_source_key(name)
        if changed is not None and getattr(transform, "operations", None):
            return f"{name}, to be computed"  # merged or split: nobody's name, so it is loaded
    return name


def _file(path: str, name: str) -> str | None:
    try:
        return cached_file(path, name)
    except OSError:  # not there, or out of reach; who needs it says so
        return None


def _tensors(file: str) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _chunks(tensor: Tensor, dtype: torch.dtype | None):
    for chunk in tensor.reshape(-1).split(CHUNK):
        if not tensor.is_floating_point():
            yield chunk.to(torch.int64)  # float32 would merge values above 2**24
        else:
            yield (chunk if dtype is None else chunk.to(dtype)).to(torch.float32)
