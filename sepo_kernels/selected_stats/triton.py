"""selected_stats on a GPU: library GEMMs, and Triton kernels over each row."""

import torch
from torch import Tensor

from sepo_kernels import devices, gemm
from sepo_kernels.configs import one_pass
from sepo_kernels.scales import Scale
from sepo_kernels.selected_logprob.triton import write_dlogits
from sepo_kernels.selected_stats.loops import Rows, StatisticsKernels


def why_not(hidden: Tensor, *_: Tensor) -> str | None:
    return devices.why_not_triton(hidden)


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor | None,  # (chunk, V), written
    logits: Tensor,  # (chunk, V) float32, left as the GEMM makes them; may be dlogits
    keep: bool = False,  # unread: logits are kept unless they are dlogits
) -> tuple[Tensor, ...]:  # as StatisticsKernels has it, (chunk,) each
    from sepo_kernels import triton_rows, triton_stats

    gemm.logits(logits, x, weight)
    (rows, V), targets = logits.shape, targets.contiguous()
    numbers = logits.new_empty((KERNELS.numbers, rows))
    at_once = dlogits is not None and one_pass(dlogits.dtype)
    # any tensor does where the kernel does not write
    out, stride = (dlogits, dlogits.stride(0)) if dlogits is not None and at_once else (numbers, 0)
    assert logits.stride(1) == 1 and out.stride(-1) == 1
    triton_rows.launch(
        triton_stats.stats_row, rows, None,
        logits, triton_rows.bias_argument(bias, logits), targets, numbers, out, logits.stride(0),
        stride, rows, V, int(bias is not None), *triton_rows.scale_arguments(scale, logits),
        softcap or 0.0, CAPPED=softcap is not None, WRITE_DLOGITS=at_once,
    )  # fmt: skip
    if x.dtype == logits.dtype:  # from 16 bits the logits' own errors exceed what cancels
        triton_rows.launch(
            triton_stats.entropy_row, rows, None,
            logits, triton_rows.bias_argument(bias, logits), targets, numbers, logits.stride(0),
            rows, V, int(bias is not None), *triton_rows.scale_arguments(scale, logits),
            softcap or 0.0, CAPPED=softcap is not None,
        )  # fmt: skip
    logp, lse, row_scale, *others = numbers.unbind()
    reference = others[-2]
    if dlogits is not None and not at_once:
        write_dlogits(dlogits, logits, bias, targets, scale, softcap, logp, reference, row_scale)
        row_scale = torch.ones_like(logp)
    return logp, lse, row_scale, *others


def gradient(
    logits: Tensor,  # (chunk, columns) float32, as the GEMM made them
    start: int,
    bias: Tensor | None,  # (columns,)
    scale: Scale,
    softcap: float | None,
    rows: Rows,
    out: Tensor,  # (chunk, columns), written; may be logits
) -> None:
    from sepo_kernels import triton_rows, triton_stats

    num_rows, columns = out.shape
    assert logits.stride(1) == out.stride(1) == 1
    triton_rows.launch(
        triton_stats.entropy_dlogits, num_rows, columns,
        logits, triton_rows.bias_argument(bias, logits), *(x.contiguous() for x in rows), out,
        logits.stride(0), out.stride(0), start, columns, int(bias is not None),
        *triton_rows.scale_arguments(scale, logits), softcap or 0.0, CAPPED=softcap is not None,
    )  # fmt: skip


def recompute(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
    rows: Rows,
    logits: Tensor,  # (chunk, V) float32, scratch; may be out
    out: Tensor,  # (chunk, V), written
) -> None:
    gemm.logits(logits, x, weight)
    gradient(logits, 0, bias, scale, softcap, rows, out)


KERNELS = StatisticsKernels(forward, gradient, recompute, fused=lambda dtype: False)
