"""Tensors of one micro-batch, moved to a device by one copy from one pinned buffer.

A copy from pageable memory waits for the device, or the device for it; every copy has a price of
its own, and a micro-batch has twenty small tensors.
"""

import sys
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from sepo.errors import one_line
from sepo.terminal import say

K = TypeVar("K")
ALIGN = 256  # bytes, at which a tensor begins in the buffer as an allocator's would


def moved(tensors: Mapping[K, Tensor], device: torch.device) -> dict[K, Tensor]:
    """Tensors of the CPU on `device`, in one copy that nothing waits for; on the CPU as they are."""
    if device.type == "cpu" or not tensors:
        return dict(tensors)
    buffer, views = laid_out(tensors, pinned=device.type == "cuda")
    return follow(views, buffer, device)


def laid_out(
    tensors: Mapping[K, Tensor], *, pinned: bool
) -> tuple[Tensor, dict[K, Tensor]]:  # (bytes,) uint8
    """One buffer on the CPU, and in it a copy of each tensor."""
    starts, size = [], 0
    for tensor in tensors.values():
        starts.append(size)
        size += -(-tensor.nbytes // ALIGN) * ALIGN
    buffer = _pinned(size) if pinned else torch.empty(size, dtype=torch.uint8)
    views = {}
    for (name, tensor), start in zip(tensors.items(), starts, strict=True):
        views[name] = _at(buffer, start, tensor.dtype, tensor.shape).copy_(tensor)
    return buffer, views


def follow(views: Mapping[K, Tensor], buffer: Tensor, device: torch.device) -> dict[K, Tensor]:
    """The buffer copied to `device`, and the same views of the copy.

    The buffer may be let go at once: torch's allocator of pinned memory gives a block to nobody
    else before the copies from it are done. What is made on the device belongs to the stream that
    is current here.
    """
    there = buffer.to(device, non_blocking=True)
    start = lambda view: view.storage_offset() * view.itemsize
    return {name: _at(there, start(v), v.dtype, v.shape) for name, v in views.items()}


def _at(buffer: Tensor, start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    # no view in autograd's eyes, whose base of another dtype a compiler would have to make again
    stride = [prod(shape[i + 1 :]) for i in range(len(shape))]
    tensor = torch.empty(0, dtype=dtype, device=buffer.device)
    return tensor.set_(buffer.untyped_storage(), start // dtype.itemsize, shape, stride)


def _pinned(size: int) -> Tensor:  # (size,) uint8
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _say_pageable(one_line(error))
        return torch.empty(size, dtype=torch.uint8)


@cache
def _say_pageable(reason: str) -> None:
    say(
        f"expected pinned memory for the copies to the GPU, got none ({reason}): copies will wait",
        out=sys.stderr,
    )
