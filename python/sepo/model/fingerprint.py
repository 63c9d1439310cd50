"""Name a model by its weights, so that scores can say what made them."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sepo.model.base import Base, base_of
from sepo.model.folder import Adapter, ModelFolder, find_folder, read_model, values_of

CHUNK = 1 << 24  # values cast and copied to the host at once: 64 MiB in float32
UNREAD = "not read"
OF_THE_MACHINE = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of a model's parameters and persistent buffers.

    Names, shapes and values count; dtype and device do not: floating-point values are read as
    float32. So a bfloat16 checkpoint has one hash whether it is loaded in bfloat16 or float32,
    and a float32 checkpoint rounded to bfloat16 has another. Tied weights count once. A model that
    `read_model` merged has the hash of its folder until something changes its weights: machines
    differ in how a merge rounds. Raises ValueError for a model without values (on the meta device).
    """
    stored = _stored(model)
    if (merged := _merged(model, stored)) is not None:
        return checkpoint_hash(merged.merged_from, dtype=merged.dtype)
    for name, tensor in sorted(stored.items()):
        if tensor.is_meta:
            raise ValueError(f"weights_hash: {name} is on the meta device, expected values")
    return _hash(stored.items())


def checkpoint_hash(
    path: str | ModelFolder,  # hub id or local directory
    *,
    dtype: torch.dtype = torch.float32,  # to which loading would round
    trust_remote_code: bool = False,
) -> str:
    """`weights_hash` of the model that `read_model` would load, read from its files.

    The files are memory-mapped: no model is built, and no more than CHUNK values are copied at
    once. A checkpoint that stores its tensors under other names or shapes than the model's (an
    older layout, merged experts) is loaded after all. An adapter is named by its base, its
    configuration and its tensors. Raises InputError for a path without a model in safetensors, or
    with a part of one.
    """
    if not isinstance(path, ModelFolder):
        path = find_folder(path, trust_remote_code=trust_remote_code)
    return _hash_of_folder(path, dtype)


def _hash_of_folder(folder: ModelFolder, dtype: torch.dtype) -> str:
    if folder.adapter is not None:
        return _adapter_hash(folder.adapter, folder.files, dtype)
    with torch.device("meta"):  # names and shapes, and which weights are tied
        code = dict(trust_remote_code=folder.trust_remote_code)
        model = AutoModelForCausalLM.from_config(folder.config, **code)
    expected, found = _stored(model), _on_disk(folder, model)
    fits = lambda name: name in found and found[name].shape == expected[name].shape
    if all(map(fits, expected)) and found.keys() <= model.state_dict().keys():
        return _hash(((name, found[name]) for name in expected), dtype)
    return weights_hash(read_model(folder, dtype=dtype))


def quick_hash(model: nn.Module, *, frozen: bool = False) -> str | None:
    """16 hex digits for the weights as they lie in memory, hashed by several threads.

    Unlike `weights_hash` it tells dtypes apart. With `frozen` only what is not trained counts,
    under the names of the model without adapters; None if all of it is trained. What `read_model`
    merged goes by its folder, as there. UNREAD where weights are not here to be read: in shards, or
    on the meta device.
    """
    named = _stored(model)
    if frozen and all(p.requires_grad for p in model.parameters()):
        return None
    if frozen:
        named = {_without_adapters(n): t for n, t in named.items() if not t.requires_grad}
    if any(t.is_meta or not t.numel() for t in named.values()):
        return UNREAD
    if (merged := _merged(model, named)) is not None:
        weights = checkpoint_hash(merged.merged_from, dtype=merged.dtype)
        about = [weights, str(merged.dtype), *sorted(named)]
        return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    tensors = sorted(named.items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing drops the GIL
        digests = threads.map(lambda item: _raw_hash(item[1]), tensors)
        lines = [
            f"{n} {t.dtype} {tuple(t.shape)} {d}"
            for (n, t), d in zip(tensors, digests, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@torch.no_grad()
def _merged(model: nn.Module, named: dict[str, Tensor]) -> Base | None:
    """The model with its `merged_from`, if that folder is all that these tensors are."""
    base = base_of(model)
    merged = getattr(base, "merged_values", {})
    if not named or not named.keys() <= merged.keys():
        return None
    now = values_of(named)
    return base if all(merged[name] == now[name] for name in now) else None


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


def _adapter_hash(adapter: Adapter, files: list[str], dtype: torch.dtype) -> str:
    about = {k: v for k, v in adapter.config.items() if k not in OF_THE_MACHINE}
    about = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in about.items()}
    head = [_hash_of_folder(adapter.base, dtype), json.dumps(about, sort_keys=True)]
    tensors = {name: t for file in files for name, t in _tensors(file).items()}
    return _hash(tensors.items(), header="\n".join(head))


def _hash(
    stored: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None, *, header: str = ""
) -> str:
    digest = hashlib.sha256(header.encode())
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


def _on_disk(folder: ModelFolder, model: PreTrainedModel) -> dict[str, Tensor]:
    """The checkpoint's tensors by the model's names, memory-mapped."""
    tensors = {name: t for file in folder.files for name, t in _tensors(file).items()}
    transforms = _transforms(model)
    return {_rename(name, transforms): tensor for name, tensor in tensors.items()}


def _transforms(model: PreTrainedModel) -> list:
    """Rename tensors as transformers does on loading (GPT-NeoX stores its head as embed_out)."""
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


def _tensors(file: str) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _chunks(tensor: Tensor, dtype: torch.dtype | None):
    for chunk in tensor.reshape(-1).split(CHUNK):
        if not tensor.is_floating_point():
            yield chunk.to(torch.int64)  # float32 would merge values above 2**24
        else:
            yield (chunk if dtype is None else chunk.to(dtype)).to(torch.float32)
