"""In which dtype a device multiplies: a CPU without units for bfloat16 does so slowly, by emulation."""

import torch
from torch import Tensor

from sepo_kernels import platform


def fast(device: torch.device | str) -> torch.dtype:
    """What the device multiplies fastest, of bfloat16 and float32."""
    found = getattr(platform, "fast_dtype", None)  # --base may ask of a commit that has none
    return found(device) if found else torch.bfloat16


def quick(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """`dtype`, but float32 in bfloat16's place where the device multiplies that faster."""
    return fast(device) if dtype == torch.bfloat16 else dtype


def product(a: Tensor, b: Tensor) -> Tensor:  # in the dtype of a
    """a @ b, in minutes less where bfloat16 is slow: there of widened operands, rounded once.

    That is how bfloat16's own product rounds, so an error measured of it is that of bfloat16.
    """
    dtype = quick(a.dtype, a.device)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
