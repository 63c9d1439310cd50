"""selected_stats by the native CPU kernels of csrc/cpu.

bfloat16: GEMM and sums in one pass, the float32 logits leave the cache only to be kept. The other
dtypes, and bfloat16 without the instructions: a library GEMM, then a row kernel.
"""

import torch
from torch import Tensor

from sepo_kernels import extension, gemm
from sepo_kernels.scales import Scale, scale_arguments
from sepo_kernels.selected_stats.loops import Rows, StatisticsKernels

# evaluated once, at import: Dynamo traces why_not
_MISSING = extension.why_not("native_stats_rows", torch.device("cpu"))


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor | None,  # (chunk, V), written
    logits: Tensor | None,  # (chunk, V) accumulator dtype: scratch, may be dlogits; kept if fused
    keep: bool = False,
) -> tuple[Tensor, ...]:  # as StatisticsKernels has it, (chunk,) each
    ops, (one, each) = torch.ops.sepo, scale_arguments(scale)
    if fused(x.dtype):
        found = ops.native_stats_fused(
            x, weight, bias, targets, one, softcap, dlogits, logits if keep else None, each
        )
    else:
        assert logits is not None
        gemm.logits(logits, x, weight)
        found = ops.native_stats_rows(logits, bias, targets, one, softcap, dlogits, each)
    return found.unbind()


def gradient(
    logits: Tensor,  # (chunk, columns), finished
    start: int,
    bias: Tensor | None,
    scale: Scale,
    softcap: float | None,
    rows: Rows,
    out: Tensor,  # (chunk, columns), written
) -> None:
    ops, numbers = torch.ops.sepo, torch.stack(rows[1:])
    if fused(out.dtype):
        ops.native_stats_gradient(logits, start, softcap, rows.targets, numbers, out)
    else:
        ops.native_stats_gradient_rows(
            logits, start, None, 1.0, softcap, True, rows.targets, numbers, out
        )


def recompute(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
    rows: Rows,
    logits: Tensor | None,  # (chunk, V) accumulator dtype, scratch; may be out; None if fused
    out: Tensor,  # (chunk, V), written
) -> None:
    ops, numbers, (one, each) = torch.ops.sepo, torch.stack(rows[1:]), scale_arguments(scale)
    if logits is None:
        ops.native_stats_recompute(x, weight, bias, one, softcap, rows.targets, numbers, out, each)
        return
    gemm.logits(logits, x, weight)
    ops.native_stats_gradient_rows(
        logits, 0, bias, one, softcap, False, rows.targets, numbers, out, each
    )


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"expected tensors on a CPU, got {hidden.device}"
    return _MISSING


def fused(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and extension.BFLOAT16_TILES


KERNELS = StatisticsKernels(forward, gradient, recompute, fused)
