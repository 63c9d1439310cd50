"""segment_topk by selection in C++ and CUDA: no sort, one thread or block a segment."""

import torch
from torch import Tensor

from sepo_kernels import extension
from sepo_kernels.segment_topk.counts import selected_offsets

SIDES = {"highest": 0, "lowest": 1, "alternate": 2}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# evaluated once: Dynamo traces why_not, and cannot trace the look-up
_MISSING = {
    device: extension.why_not("native_segment_topk", torch.device(device))
    for device in ("cpu", "cuda")
}


def why_not(score: Tensor, cu_tokens: Tensor) -> str | None:
    if score.dtype not in DTYPES:
        return f"it has no kernel for {score.dtype}"
    return _MISSING.get(score.device.type, f"it has no kernel for {score.device.type}")


def fwd(
    score: Tensor,  # (T_all,)
    cu_tokens: Tensor,  # (S + 1,) int32 or int64, on the CPU or with score
    fraction: float,
    side: str,  # "highest" | "lowest" | "alternate"
    min_tokens: int,
) -> tuple[Tensor, Tensor]:  # index (M,) int32, cu_rows (S + 1,) int32
    cu_tokens, cu_rows, M = selected_offsets(cu_tokens, fraction, min_tokens, score.device)
    index = torch.ops.sepo.native_segment_topk(
        score.contiguous(), cu_tokens, cu_rows, SIDES[side], M
    )
    return index, cu_rows
