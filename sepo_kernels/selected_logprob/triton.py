"""selected_logprob on a GPU: library GEMMs, and a Triton kernel over each row, or two."""

import torch
from torch import Tensor

from sepo_kernels import devices, gemm
from sepo_kernels.configs import one_pass
from sepo_kernels.scales import Scale
from sepo_kernels.selected_logprob.loops import LogitKernels


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
    logits: Tensor,  # (chunk, V) float32, scratch; may be dlogits
) -> tuple[Tensor, Tensor, Tensor]:  # logp, lse, row_scale, each (chunk,)
    from sepo_kernels import triton_logprob, triton_rows

    gemm.logits(logits, x, weight)
    assert logits.stride(1) == 1
    (rows, V), targets = logits.shape, targets.contiguous()
    logp, lse, reference, row_scale = logits.new_empty((4, rows))
    at_once = dlogits is not None and one_pass(dlogits.dtype)
    # any tensor does where the kernel does not write
    out, stride = (dlogits, dlogits.stride(0)) if dlogits is not None and at_once else (logp, 0)
    assert out.stride(-1) == 1
    triton_rows.launch(
        triton_logprob.logprob_row, rows, None,
        logits, triton_rows.bias_argument(bias, logits), targets, logp, lse, reference, row_scale,
        out, logits.stride(0), stride, V, int(bias is not None),
        *triton_rows.scale_arguments(scale, logits), softcap or 0.0,
        CAPPED=softcap is not None, WRITE_DLOGITS=at_once,
    )  # fmt: skip
    if at_once:
        return logp, lse, row_scale
    if dlogits is not None:
        write_dlogits(dlogits, logits, bias, targets, scale, softcap, logp, reference, row_scale)
    return logp, lse, torch.ones_like(logp)


def recompute(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor,  # (chunk, V), written
    logits: Tensor,  # (chunk, V) float32, scratch; may be dlogits
    logp: Tensor,  # (chunk,)
    lse: Tensor,  # (chunk,)
) -> Tensor:  # row_scale (chunk,)
    gemm.logits(logits, x, weight)
    ones = torch.ones_like(lse)
    write_dlogits(dlogits, logits, bias, targets.contiguous(), scale, softcap, logp, lse, ones)
    return ones


def write_dlogits(
    dlogits: Tensor,  # (chunk, V), written; may be logits
    logits: Tensor,  # (chunk, V) float32
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,) contiguous, as are those below
    scale: Scale,
    softcap: float | None,
    logp: Tensor,  # (chunk,)
    reference: Tensor,  # (chunk,)
    row_scale: Tensor,  # (chunk,)
) -> None:
    from sepo_kernels import triton_logprob, triton_rows

    rows, V = logits.shape
    assert dlogits.stride(1) == 1 and logits.stride(1) == 1
    triton_rows.launch(
        triton_logprob.logprob_dlogits, rows, V,
        logits, triton_rows.bias_argument(bias, logits), targets, logp, reference, row_scale,
        dlogits, logits.stride(0), dlogits.stride(0), V, int(bias is not None),
        *triton_rows.scale_arguments(scale, logits), softcap or 0.0, CAPPED=softcap is not None,
    )  # fmt: skip


KERNELS = LogitKernels(forward, recompute, fused=lambda dtype: False)
