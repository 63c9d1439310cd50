"""selected_logprob on a GPU: library matrix products, and two Triton kernels over each row."""

import torch
from torch import Tensor

from sepo_kernels import platform, products
from sepo_kernels.selected_logprob.loops import RowKernels


def why_not(hidden: Tensor, *_) -> str | None:
    return platform.why_not_triton(hidden)


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
    from sepo_kernels import triton_rows

    products.logits(logits, x, weight)
    assert logits.stride(1) == 1
    (rows, V), targets = logits.shape, targets.contiguous()
    logp = logits.new_empty((rows,))
    top, log_total = logits.new_empty((rows,)), logits.new_empty((rows,))
    triton_rows.launch(
        triton_rows.logprob_statistics, rows, None,
        logits, triton_rows.bias_argument(bias, logits), targets, logp, top, log_total,
        logits.stride(0), V, int(bias is not None), scale, softcap or 0.0,
        CAPPED=softcap is not None,
    )  # fmt: skip
    if slope is not None:
        _write_slope(slope, logits, bias, targets, scale, softcap, logp, top, log_total)
    return logp, top + log_total, logits.new_ones((rows,))


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
    products.logits(logits, x, weight)
    zero = torch.zeros_like(lse)
    _write_slope(slope, logits, bias, targets.contiguous(), scale, softcap, logp, lse, zero)
    return logits.new_ones(logp.shape)


def _write_slope(slope, logits, bias, targets, scale, softcap, logp, top, log_total) -> None:
    from sepo_kernels import triton_rows

    rows, V = logits.shape
    assert slope.stride(1) == 1 and logits.stride(1) == 1
    triton_rows.launch(
        triton_rows.logprob_slope, rows, V,
        logits, triton_rows.bias_argument(bias, logits), targets, logp, top, log_total,
        slope, logits.stride(0), slope.stride(0), V, int(bias is not None), scale, softcap or 0.0,
        CAPPED=softcap is not None,
    )  # fmt: skip


KERNELS = RowKernels(forward, again, fused=lambda dtype: False)
