"""selected_logprob_kl on a GPU: library GEMMs, and Triton kernels over each pair of rows."""

from typing import Any

import torch
from torch import Tensor

from sepo_kernels import devices, gemm
from sepo_kernels.configs import one_pass
from sepo_kernels.scales import Scale
from sepo_kernels.selected_logprob_kl.layout import POLICY_REF, is_jsd
from sepo_kernels.selected_logprob_kl.loops import LogitKernels

NUM_STATE = 6  # as triton_kl.NUM_STATE, which needs triton
# of a head without a soft cap beside one that has it: c tanh(z / c) is z there, up to its rounding
NO_CAP = 1e10


def why_not(hidden: Tensor, *_: Any) -> str | None:
    return devices.why_not_triton(hidden)


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (chunk, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale,
    ref_softcap: float | None,
    beta: float,
    blocks: tuple[Tensor, Tensor] | None,  # two (chunk, V), written
    logits: tuple[Tensor, Tensor],  # two (chunk, V) float32, scratch; may be the blocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logp, ref_logp, kl (chunk,), state (chunk, 6)
    from sepo_kernels import triton_jsd, triton_kl, triton_rows

    z, ref_z = logits
    gemm.logits(z, x, weight)
    gemm.logits(ref_z, ref_x, ref_weight)
    (rows, V), targets = z.shape, targets.contiguous()
    logp, ref_logp, kl = z.new_empty((3, rows))
    state = z.new_empty((rows, NUM_STATE))
    at_once = blocks is not None and one_pass(blocks[0].dtype)
    # any tensors do where the kernel does not write
    first, second = blocks if blocks is not None and at_once else (logp, logp)
    strides = (first.stride(0), second.stride(0)) if at_once else (0, 0)
    assert z.stride(1) == ref_z.stride(1) == first.stride(-1) == second.stride(-1) == 1
    biases = triton_rows.bias_argument(bias, z), triton_rows.bias_argument(ref_bias, ref_z)
    has_biases = int(bias is not None), int(ref_bias is not None)
    settings = *_settings(scale, softcap, z), *_settings(ref_scale, ref_softcap, z)
    capped = _capped(softcap, ref_softcap)
    triton_rows.launch(
        triton_kl.kl_row, rows, None,
        z, ref_z, *biases, targets, logp, ref_logp, kl, state, first, second,
        z.stride(0), ref_z.stride(0), *strides, V, *has_biases, *settings, CAPPED=capped,
        POLICY_FIRST=beta == POLICY_REF, WRITE_BLOCKS=at_once,
    )  # fmt: skip
    if is_jsd(beta):
        triton_rows.launch(
            triton_jsd.jsd_row, rows, None,
            z, ref_z, *biases, kl, state, z.stride(0), ref_z.stride(0), V, *has_biases, *settings,
            beta, 1 - beta, CAPPED=capped,
        )  # fmt: skip
    if blocks is not None and not at_once:
        _write_dlogits(
            blocks, logits, bias, ref_bias, targets, scale, softcap, ref_scale, ref_softcap, beta,
            logp, kl, state,
        )  # fmt: skip
    return logp, ref_logp, kl, state


def recompute(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (chunk, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale,
    ref_softcap: float | None,
    beta: float,
    blocks: tuple[Tensor, Tensor],  # two (chunk, V), written
    logits: tuple[Tensor, Tensor],  # two (chunk, V) float32, scratch; may be the blocks
    logp: Tensor,  # (chunk,)
    ref_logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, 6)
) -> None:
    gemm.logits(logits[0], x, weight)
    gemm.logits(logits[1], ref_x, ref_weight)
    if one_pass(blocks[0].dtype):
        _write_ratios(blocks, logits, bias, ref_bias, scale, softcap, ref_scale, ref_softcap, state)
    else:
        _write_dlogits(
            blocks, logits, bias, ref_bias, targets.contiguous(), scale, softcap, ref_scale,
            ref_softcap, beta, logp, kl, state,
        )  # fmt: skip


def combine(
    first: Tensor,  # (M, columns), as triton_kl.py has it
    second: Tensor,  # (M, columns)
    targets: Tensor,  # (M,)
    start: int,  # the first of these columns
    logp: Tensor,  # (M,)
    kl: Tensor,  # (M,)
    state: Tensor,  # (M, 6)
    grad_logp: Tensor,  # (M,) float32
    grad_kl: Tensor,  # (M,) float32
    beta: float,
    out: Tensor,  # (M, columns), written: dZ
) -> None:
    from sepo_kernels import triton_jsd, triton_kl, triton_kl_dlogits, triton_rows

    assert first.stride(1) == second.stride(1) == out.stride(1) == 1
    rows, columns = out.shape
    grads = grad_logp.contiguous(), grad_kl.contiguous()
    strides = first.stride(0), second.stride(0), out.stride(0)
    if one_pass(out.dtype) and is_jsd(beta):
        assert state.is_contiguous()
        triton_rows.launch(
            triton_jsd.jsd_combine_ratios, rows, columns,
            first, second, targets.contiguous(), logp.contiguous(), state, *grads, out, *strides,
            start, columns, beta, 1 - beta,
        )  # fmt: skip
    elif one_pass(out.dtype):
        assert state.is_contiguous()
        triton_rows.launch(
            triton_kl.kl_combine_ratios, rows, columns,
            first, second, targets.contiguous(), logp.contiguous(), kl.contiguous(), state,
            *grads, out, *strides, start, columns, POLICY_FIRST=beta == POLICY_REF,
        )  # fmt: skip
    else:
        triton_rows.launch(
            triton_kl_dlogits.kl_combine, rows, columns,
            first, second, *grads, out, *strides, columns,
        )  # fmt: skip


def _write_ratios(
    blocks: tuple[Tensor, Tensor],  # two (chunk, V), written
    logits: tuple[Tensor, Tensor],  # two (chunk, V) float32
    bias: Tensor | None,  # (V,)
    ref_bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale,
    ref_softcap: float | None,
    state: Tensor,  # (chunk, 6)
) -> None:
    from sepo_kernels import triton_kl, triton_rows

    (first, second), (z, ref_z) = blocks, logits
    assert first.stride(1) == second.stride(1) == z.stride(1) == ref_z.stride(1) == 1
    assert state.is_contiguous()
    rows, V = z.shape
    triton_rows.launch(
        triton_kl.kl_ratios, rows, V,
        z, ref_z, triton_rows.bias_argument(bias, z), triton_rows.bias_argument(ref_bias, ref_z),
        state, first, second,
        z.stride(0), ref_z.stride(0), first.stride(0), second.stride(0), V,
        int(bias is not None), int(ref_bias is not None), *_settings(scale, softcap, z),
        *_settings(ref_scale, ref_softcap, z), CAPPED=_capped(softcap, ref_softcap),
    )  # fmt: skip


def _write_dlogits(
    blocks: tuple[Tensor, Tensor],  # two (chunk, V), written; may be logits
    logits: tuple[Tensor, Tensor],  # two (chunk, V) float32
    bias: Tensor | None,  # (V,)
    ref_bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,) contiguous
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale,
    ref_softcap: float | None,
    beta: float,
    logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, 6)
) -> None:
    from sepo_kernels import triton_jsd, triton_kl_dlogits, triton_rows

    (first, second), (z, ref_z) = blocks, logits
    assert first.stride(1) == second.stride(1) == z.stride(1) == ref_z.stride(1) == 1
    assert state.is_contiguous()
    rows, V = z.shape
    biases = triton_rows.bias_argument(bias, z), triton_rows.bias_argument(ref_bias, ref_z)
    settings = (
        z.stride(0), ref_z.stride(0), first.stride(0), second.stride(0), V,
        int(bias is not None), int(ref_bias is not None), *_settings(scale, softcap, z),
        *_settings(ref_scale, ref_softcap, z),
    )  # fmt: skip
    capped = _capped(softcap, ref_softcap)
    if is_jsd(beta):
        triton_rows.launch(
            triton_jsd.jsd_dlogits, rows, V,
            z, ref_z, *biases, targets, logp, state, first, second, *settings, beta, 1 - beta,
            CAPPED=capped,
        )  # fmt: skip
    else:
        triton_rows.launch(
            triton_kl_dlogits.kl_dlogits, rows, V,
            z, ref_z, *biases, targets, logp, kl, state, first, second, *settings, CAPPED=capped,
            POLICY_FIRST=beta == POLICY_REF,
        )  # fmt: skip


def _settings(
    scale: Scale, softcap: float | None, logits: Tensor
) -> tuple[Tensor, int, float, float]:  # (chunk,), has_scales, scale, softcap
    """Return a head's scale and soft cap as the kernels take them, which cap both heads or none."""
    from sepo_kernels import triton_rows

    return *triton_rows.scale_arguments(scale, logits), NO_CAP if softcap is None else softcap


def _capped(*softcaps: float | None) -> bool:
    return any(softcap is not None for softcap in softcaps)


def _second_dtype(dtype: torch.dtype, beta: float) -> torch.dtype:
    # float16: a difference of logits, of which the digits count and not the range
    return torch.float16 if one_pass(dtype) else dtype


KERNELS = LogitKernels(
    forward, recompute, combine, NUM_STATE,
    fused=lambda dtype, beta: False, second_dtype=_second_dtype,
)  # fmt: skip
