"""The Triton kernels that write -dlogp/dz and dKL/dz of two heads' rows, and combine them.

For float16 and float32 inputs, after `kl_row` has summed: see configs.one_pass.
"""

import triton
import triton.language as tl

from sepo_kernels.triton_kl import NUM_STATE
from sepo_kernels.triton_rows import (
    UNSPECIALISED,
    expm1,
    load,
    load_logits,
    load_scale,
    logp_dlogits,
    store,
)


@triton.jit(**UNSPECIALISED)
def kl_dlogits(
    logits_ptr,  # (rows, V) float32
    ref_logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    ref_bias_ptr,  # (V,) float32
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    kl_ptr,  # (rows,)
    state_ptr,  # (rows, 6)
    first_ptr,  # (rows, V) out: -dlogp/dz; may be logits
    second_ptr,  # (rows, V) out: dKL/dz; may be ref_logits
    stride_logits,
    stride_ref_logits,
    stride_first,
    stride_second,
    V,
    has_bias,
    has_ref_bias,
    scales_ptr,  # (rows,); anything if not has_scales
    has_scales,
    scale,
    softcap,
    ref_scales_ptr,  # (rows,); anything if not has_ref_scales
    has_ref_scales,
    ref_scale,
    ref_softcap,
    CAPPED: tl.constexpr,  # both heads
    POLICY_FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = load_scale(scales_ptr, has_scales, scale, row)
    ref_scale = load_scale(ref_scales_ptr, has_ref_scales, ref_scale, row)
    start = tl.program_id(1) * BLOCK_V
    logits_ptr += row * stride_logits
    ref_logits_ptr += row * stride_ref_logits
    first_ptr += row * stride_first
    second_ptr += row * stride_second
    target = tl.load(targets_ptr + row).to(tl.int32)
    logp = tl.load(logp_ptr + row)
    kl = tl.load(kl_ptr + row)
    state_ptr += row * NUM_STATE
    if start + BLOCK_V <= V:
        _dlogits_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, state_ptr,
            target, logp, kl, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale,
            ref_softcap, CAPPED, POLICY_FIRST, True, BLOCK_V,
        )  # fmt: skip
    else:
        _dlogits_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, state_ptr,
            target, logp, kl, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale,
            ref_softcap, CAPPED, POLICY_FIRST, False, BLOCK_V,
        )  # fmt: skip


@triton.jit(**UNSPECIALISED)
def kl_combine(
    first_ptr,  # (rows, columns)
    second_ptr,  # (rows, columns)
    grad_logp_ptr,  # (rows,)
    grad_kl_ptr,  # (rows,)
    out_ptr,  # (rows, columns) out
    stride_first,
    stride_second,
    stride_out,
    columns,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    first_ptr += row * stride_first
    second_ptr += row * stride_second
    out_ptr += row * stride_out
    grad_logp = tl.load(grad_logp_ptr + row)
    grad_kl = tl.load(grad_kl_ptr + row)
    if start + BLOCK_V <= columns:
        _combine_tile(
            first_ptr, second_ptr, out_ptr, grad_logp, grad_kl, start, columns, True, BLOCK_V
        )
    else:
        _combine_tile(
            first_ptr, second_ptr, out_ptr, grad_logp, grad_kl, start, columns, False, BLOCK_V
        )


@triton.jit
def _dlogits_tile(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, state_ptr, target,
    logp, kl, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap,
    CAPPED: tl.constexpr, POLICY_FIRST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    a, derivative = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    b, _ = load_logits(
        ref_logits_ptr, ref_bias_ptr, v, V, has_ref_bias, ref_scale, ref_softcap, CAPPED, WHOLE
    )
    reference = tl.load(state_ptr)
    ref_reference = tl.load(state_ptr + 1)
    row_scale = tl.load(state_ptr + 2)
    shift = tl.load(state_ptr + 3)
    p = tl.exp(a - reference) * row_scale
    ratio = ((b - a) - (ref_reference - reference)) - shift  # log q - log p
    if POLICY_FIRST:
        second = tl.where(p > 0, -p * (ratio + kl), 0.0)
    else:
        # p - q, whose digits cancel where the policy is still near the reference
        q = tl.exp(b - ref_reference) * (row_scale * tl.exp(-shift))
        second = tl.where(tl.abs(ratio) < 0.5, -p * expm1(tl.minimum(ratio, 0.5)), p - q)
    store(first_ptr, logp_dlogits(p, derivative, v, target, logp), v, V, WHOLE)
    store(second_ptr, second * derivative, v, V, WHOLE)


@triton.jit
def _combine_tile(
    first_ptr, second_ptr, out_ptr, grad_logp, grad_kl, start, columns, WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    out = grad_kl * load(second_ptr, v, columns, WHOLE)
    out -= grad_logp * load(first_ptr, v, columns, WHOLE)
    store(out_ptr, out, v, columns, WHOLE)
