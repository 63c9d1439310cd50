"""selected_logprob by the native CPU kernels of csrc/cpu.

bfloat16: GEMM, log-sum-exp and dlogits in one pass, the float32 logits never leave the cache.
The other dtypes, and bfloat16 without the instructions: a library GEMM, then a row kernel.
"""

import torch
from torch import Tensor

from sepo_kernels import extension, gemm
from sepo_kernels.scales import Scale, scale_arguments
from sepo_kernels.selected_logprob.loops import LogitKernels

# evaluated once, at import: Dynamo traces why_not
_MISSING = extension.why_not("native_logprob_rows", torch.device("cpu"))


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor | None,  # (chunk, V), written
    logits: Tensor | None,  # (chunk, V) accumulator dtype, scratch; may be dlogits; None if fused
) -> tuple[Tensor, Tensor, Tensor]:  # logp, lse, row_scale, each (chunk,)
    ops, (one, each) = torch.ops.sepo, scale_arguments(scale)
    if logits is None:
        return ops.native_logprob_fused(x, weight, bias, targets, one, softcap, dlogits, each)
    gemm.logits(logits, x, weight)
    return ops.native_logprob_rows(logits, bias, targets, one, softcap, dlogits, each)


def recompute(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor,  # (chunk, V), written
    logits: Tensor | None,  # (chunk, V) accumulator dtype, scratch; may be dlogits; None if fused
    logp: Tensor,  # (chunk,), unread
    lse: Tensor,  # (chunk,), unread
) -> Tensor:  # row_scale (chunk,)
    return forward(x, weight, bias, targets, scale, softcap, dlogits, logits)[2]


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"expected tensors on a CPU, got {hidden.device}"
    return _MISSING


def fused(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and extension.BFLOAT16_TILES


KERNELS = LogitKernels(forward, recompute, fused)
