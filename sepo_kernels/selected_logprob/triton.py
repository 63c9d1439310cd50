"""selected_logprob on a GPU: library matrix products, and a Triton kernel over each row, or two."""

import torch
from torch import Tensor

from sepo_kernels import devices, gemm
from sepo_kernels.configs import one_pass
from sepo_kernels.selected_logprob.loops import RowKernels


def why_not(hidden: Tensor, *_) -> str | None:
    return devices.why_not_triton(hidden)


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: float,
    softcap: float | None,
    slope: Tensor | None,  # (chunk, V), written
    logits: Tensor,  # (chunk, V) float32, scratch; may be slope
) -> tuple[Tensor, Tensor, Tensor]:  # logp, lse, unit, each (chunk,)
    from sepo_kernels import triton_logprob, triton_rows

    gemm.logits(logits, x, weight)
    assert logits.stride(1) == 1
    (rows, V), targets = logits.shape, targets.contiguous()
    logp, lse, reference, unit = logits.new_empty((4, rows))
    at_once = slope is not None and one_pass(slope.dtype)
    to, stride = (slope, slope.stride(0)) if at_once else (logp, 0)  # or any, which is not read
    assert not at_once or slope.stride(1) == 1
    triton_rows.launch(
        triton_logprob.logprob_row, rows, None,
        logits, triton_rows.bias_argument(bias, logits), targets, logp, lse, reference, unit, to,
        logits.stride(0), stride, V, int(bias is not None), scale, softcap or 0.0,
        CAPPED=softcap is not None, SLOPE=at_once,
    )  # fmt: skip
    if at_once:
        return logp, lse, unit
    if slope is not None:
        _write_slope(slope, logits, bias, targets, scale, softcap, logp, reference, unit)
    return logp, lse, torch.ones_like(logp)


def again(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: float,
    softcap: float | None,
    slope: Tensor,  # (chunk, V), written
    logits: Tensor,  # (chunk, V) float32, scratch; may be slope
    logp: Tensor,  # (chunk,)
    lse: Tensor,  # (chunk,)
) -> Tensor:  # unit (chunk,)
    gemm.logits(logits, x, weight)
    one = torch.ones_like(lse)
    _write_slope(slope, logits, bias, targets.contiguous(), scale, softcap, logp, lse, one)
    return one


def _write_slope(slope, logits, bias, targets, scale, softcap, logp, reference, unit) -> None:
    from sepo_kernels import triton_logprob, triton_rows

    rows, V = logits.shape
    assert slope.stride(1) == 1 and logits.stride(1) == 1
    triton_rows.launch(
        triton_logprob.logprob_slope, rows, V,
        logits, triton_rows.bias_argument(bias, logits), targets, logp, reference, unit,
        slope, logits.stride(0), slope.stride(0), V, int(bias is not None), scale, softcap or 0.0,
        CAPPED=softcap is not None,
    )  # fmt: skip


KERNELS = RowKernels(forward, again, fused=lambda dtype: False)
