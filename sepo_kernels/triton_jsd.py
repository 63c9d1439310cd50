"""The Triton kernels of the Jensen-Shannon divergence of two heads' rows.

With m = (1 - beta) p + beta q the mixture, it is beta KL(q || m) + (1 - beta) KL(p || m). No word's
part can be computed before both log-sum-exps are known. So `kl_row` sums first, and for bfloat16
writes its blocks; `jsd_row` then reads both rows once more. The gradient's own constant of a row,
KL(p || m), comes last in the row's state.

With s the smaller of p and q over the larger, and c its weight in m, m / larger is 1 - c + c s, and
a word adds larger (c phi(s) - phi(1 - c + c s)), phi(x) = x log x: positive, flat at s = 1, and
finite for any gap.
"""

import triton
import triton.language as tl

from sepo_kernels.triton_kl import LARGEST_HALF, NUM_STATE, load_ratios, store_gradient
from sepo_kernels.triton_rows import (
    UNSPECIALISED,
    expm1,
    load_logits,
    load_scale,
    log1p,
    logp_dlogits,
    store,
)

MEAN = tl.constexpr(5)  # where a row's state has KL(p || m)
SMALLEST = tl.constexpr(1.2e-38)  # normal: a weight may have been rounded to 0


@triton.jit(**UNSPECIALISED)
def jsd_row(
    logits_ptr,  # (rows, V) float32
    ref_logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32; anything if not has_bias
    ref_bias_ptr,  # (V,) float32; anything if not has_ref_bias
    kl_ptr,  # (rows,) out: the divergence
    state_ptr,  # (rows, NUM_STATE): as kl_row has left it; out: its last
    stride_logits,
    stride_ref_logits,
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
    beta,  # the reference's weight
    rest,  # 1 - beta, rounded once
    CAPPED: tl.constexpr,  # both heads
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64 before the multiply: rows * V passes 2**31
    scale = load_scale(scales_ptr, has_scales, scale, row)
    ref_scale = load_scale(ref_scales_ptr, has_ref_scales, ref_scale, row)
    logits_ptr += row * stride_logits
    ref_logits_ptr += row * stride_ref_logits
    state_ptr += row * NUM_STATE
    jsd = tl.zeros((BLOCK_V,), tl.float32)  # a sum in each lane, added up once at the end
    mean = tl.zeros((BLOCK_V,), tl.float32)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        own, log_ratio = _sums_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, start, V, has_bias,
            has_ref_bias, scale, softcap, ref_scale, ref_softcap, beta, rest, CAPPED, True, BLOCK_V,
        )  # fmt: skip
        jsd += own
        mean += log_ratio
    if whole < V:
        own, log_ratio = _sums_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, whole, V, has_bias,
            has_ref_bias, scale, softcap, ref_scale, ref_softcap, beta, rest, CAPPED, False, BLOCK_V,
        )  # fmt: skip
        jsd += own
        mean += log_ratio
    total = tl.sum(jsd, 0)
    tl.store(kl_ptr + row, tl.where(total < 0, 0.0, total))  # not maximum, which would hide NaN
    tl.store(state_ptr + MEAN, tl.sum(mean, 0))


@triton.jit(**UNSPECIALISED)
def jsd_dlogits(
    logits_ptr,  # (rows, V) float32
    ref_logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    ref_bias_ptr,  # (V,) float32
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    state_ptr,  # (rows, NUM_STATE)
    first_ptr,  # (rows, V) out: -dlogp/dz; may be logits
    second_ptr,  # (rows, V) out: dJSD/dz; may be ref_logits
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
    beta,
    rest,
    CAPPED: tl.constexpr,  # both heads
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
    state_ptr += row * NUM_STATE
    if start + BLOCK_V <= V:
        _dlogits_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, state_ptr,
            target, logp, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap,
            beta, rest, CAPPED, True, BLOCK_V,
        )  # fmt: skip
    else:
        _dlogits_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, state_ptr,
            target, logp, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap,
            beta, rest, CAPPED, False, BLOCK_V,
        )  # fmt: skip


@triton.jit(**UNSPECIALISED)
def jsd_combine_ratios(
    first_ptr,  # (rows, columns), as kl_row writes it
    second_ptr,  # (rows, columns)
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    state_ptr,  # (rows, NUM_STATE)
    grad_logp_ptr,  # (rows,)
    grad_kl_ptr,  # (rows,)
    out_ptr,  # (rows, columns) out
    stride_first,
    stride_second,
    stride_out,
    column,  # the first of these
    columns,
    beta,
    rest,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    first_ptr += row * stride_first
    second_ptr += row * stride_second
    out_ptr += row * stride_out
    target = (tl.load(targets_ptr + row) - column).to(tl.int32)
    logp = tl.load(logp_ptr + row)
    grad_logp = tl.load(grad_logp_ptr + row)
    grad_kl = tl.load(grad_kl_ptr + row)
    state_ptr += row * NUM_STATE
    if start + BLOCK_V <= columns:
        _combine_ratios_tile(
            first_ptr, second_ptr, out_ptr, state_ptr, target, logp, grad_logp, grad_kl, start,
            columns, beta, rest, True, BLOCK_V,
        )  # fmt: skip
    else:
        _combine_ratios_tile(
            first_ptr, second_ptr, out_ptr, state_ptr, target, logp, grad_logp, grad_kl, start,
            columns, beta, rest, False, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _sums_tile(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, start, V, has_bias, has_ref_bias,
    scale, softcap, ref_scale, ref_softcap, beta, rest, CAPPED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return what words add to the divergence and to KL(p || m)."""
    v = start + tl.arange(0, BLOCK_V)
    p, q, ratio, _ = _load_pair(
        logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, v, V, has_bias, has_ref_bias,
        scale, softcap, ref_scale, ref_softcap, CAPPED, WHOLE,
    )  # fmt: skip
    smaller, m, log_m = _mixture(ratio, beta, rest)
    own = -tl.maximum(p, q) * (m * log_m + smaller * tl.abs(ratio))
    return own, p * _log_ratio(log_m, ratio)


@triton.jit
def _dlogits_tile(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, state_ptr, target,
    logp, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap, beta, rest,
    CAPPED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    p, _, ratio, derivative = _load_pair(
        logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, v, V, has_bias, has_ref_bias,
        scale, softcap, ref_scale, ref_softcap, CAPPED, WHOLE,
    )  # fmt: skip
    second = _djsd(p, ratio, state_ptr, beta, rest)
    store(first_ptr, logp_dlogits(p, derivative, v, target, logp), v, V, WHOLE)
    store(second_ptr, second * derivative, v, V, WHOLE)


@triton.jit
def _combine_ratios_tile(
    first_ptr, second_ptr, out_ptr, state_ptr, target, logp, grad_logp, grad_kl, start, columns,
    beta, rest, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    larger, d, _, p, ratio = load_ratios(first_ptr, second_ptr, state_ptr, v, columns, WHOLE)
    dkl = _djsd(p, ratio, state_ptr, beta, rest)
    store_gradient(
        out_ptr, dkl, p, larger, d, state_ptr, v, target, logp, grad_logp, grad_kl, columns, WHOLE
    )


@triton.jit
def _load_pair(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, v, V, has_bias, has_ref_bias,
    scale, softcap, ref_scale, ref_softcap, CAPPED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return p, q, log q - log p, and the derivative of the policy's cap."""
    a, derivative = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    b, _ = load_logits(
        ref_logits_ptr, ref_bias_ptr, v, V, has_ref_bias, ref_scale, ref_softcap, CAPPED, WHOLE
    )
    reference = tl.load(state_ptr)
    ref_reference = tl.load(state_ptr + 1)
    row_scale = tl.load(state_ptr + 2)
    shift = tl.load(state_ptr + 3)
    p = tl.exp(a - reference) * row_scale
    q = tl.exp(b - ref_reference) * (row_scale * tl.exp(-shift))
    ratio = ((b - a) - (ref_reference - reference)) - shift
    # NaN where both heads rule a word out: without weight it may be 0
    ratio = tl.where(
        tl.maximum(p, q) > 0, tl.minimum(tl.maximum(ratio, -LARGEST_HALF), LARGEST_HALF), 0.0
    )
    return p, q, ratio, derivative


@triton.jit
def _mixture(ratio, beta, rest):
    """Return the smaller of p and q times its weight, m, and log m, all over the larger of both."""
    x = -tl.abs(ratio)
    c = tl.where(ratio > 0, rest, beta)
    smaller = c * tl.exp(x)
    m = tl.maximum(tl.where(ratio > 0, beta, rest) + smaller, SMALLEST)
    # log m = -log1p((1 - m) / m), which has the digits of both ends: m near 1, and m near 0
    return smaller, m, -log1p(-c * expm1(x) / m)


@triton.jit
def _log_ratio(log_m, ratio):
    """Return log(p / m)."""
    return -(log_m + tl.maximum(ratio, 0.0))


@triton.jit
def _djsd(p, ratio, state_ptr, beta, rest):
    """Return dJSD/da, with a the policy's logits after their cap."""
    _, _, log_m = _mixture(ratio, beta, rest)
    return rest * p * (_log_ratio(log_m, ratio) - tl.load(state_ptr + MEAN))
