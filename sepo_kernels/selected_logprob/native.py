"""selected_logprob by the native CPU kernels of csrc/cpu.

bfloat16: product, log-sum-exp and slope in one pass, the float32 logits never leave the cache.
The other dtypes, and bfloat16 without the instructions: a library product, then a row kernel.
"""

import torch
from torch import Tensor

from sepo_kernels import extension, gemm
from sepo_kernels.selected_logprob.loops import RowKernels

# asked once, at import: Dynamo traces why_not
_MISSING = extension.why_not("native_logprob_rows", torch.device("cpu"))


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: float,
    softcap: float | None,
    slope: Tensor | None,  # (chunk, V), written
    logits: Tensor | None,  # (chunk, V) accumulator dtype, scratch; may be slope; None if fused
) -> tuple[Tensor, Tensor, Tensor]:  # logp, lse, unit, each (chunk,)
    ops = torch.ops.sepo
    if logits is None:
        return ops.native_logprob_fused(x, weight, bias, targets, scale, softcap, slope)
    gemm.logits(logits, x, weight)
    return ops.native_logprob_rows(logits, bias, targets, scale, softcap, slope)


def again(x, weight, bias, targets, scale, softcap, slope, logits, logp, lse) -> Tensor:
    """The unit (chunk,) of a slope written once more; arguments as in loops.RowKernels."""
    return forward(x, weight, bias, targets, scale, softcap, slope, logits)[2]


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"expected tensors on a CPU, got {hidden.device}"
    return _MISSING


def fused(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and extension.BFLOAT16_TILES


KERNELS = RowKernels(forward, again, fused)
