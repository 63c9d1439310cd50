"""Name a model by its weights, so that scores can say what made them."""

import hashlib

import torch
from torch import Tensor, nn

CHUNK = 1 << 24  # values cast and copied to the host at once: 64 MiB in float32


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of a model's parameters and persistent buffers.

    Names, shapes and values count; dtype and device do not: floating-point values are read as
    float32. So a bfloat16 checkpoint has one hash whether it is loaded in bfloat16 or float32,
    and a float32 checkpoint rounded to bfloat16 has another. Tied weights count once. Raises
    ValueError for a model without values (on the meta device).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_stored(model).items()):
        if tensor.is_meta:
            raise ValueError(f"weights_hash: {name} is on the meta device, expected values")
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for chunk in _chunks(tensor.detach()):
            digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


def _stored(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())  # a tied parameter under its first name only
    # Non-persistent buffers (rotary tables, masks) are computed, and on some models in the dtype
    # of the load: they would give one checkpoint two hashes.
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return parameters | buffers


def _chunks(tensor: Tensor):
    # Integers keep their own precision: float32 would merge values above 2**24.
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    for chunk in tensor.reshape(-1).split(CHUNK):
        yield chunk.to(dtype)
