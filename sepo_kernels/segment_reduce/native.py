"""segment_sum in C++ and CUDA: a segment is summed in one place, in a fixed order."""

import torch
from torch import Tensor

from sepo_kernels import extension

# evaluated once: Dynamo traces why_not, and cannot trace the look-up
_MISSING = {
    device: extension.why_not("native_segment_sum", torch.device(device))
    for device in ("cpu", "cuda")
}


def why_not(values: Tensor, cu_rows: Tensor) -> str | None:
    return _MISSING.get(values.device.type, f"it has no kernel for {values.device.type}")


def fwd(
    values: Tensor,  # (M,) float32 or float64
    cu_rows: Tensor,  # (S + 1,) int32 or int64
) -> Tensor:  # (S,)
    return torch.ops.sepo.native_segment_sum(values.contiguous(), cu_rows.int().contiguous())


def bwd(
    grad_sum: Tensor,  # (S,)
    cu_rows: Tensor,  # (S + 1,) int32 or int64
    M: int,
) -> Tensor:  # (M,)
    cu_rows = cu_rows.int().contiguous()
    return torch.ops.sepo.native_segment_sum_bwd(grad_sum.contiguous(), cu_rows, M)
