"""The Triton kernels of two heads' rows.

With a, b the logits of policy and reference, each less a reference of the row (its logit of the
target, or its largest where the target is hopeless), A, B the sums of e^a and e^b, and d = b - a:

    log p = a - log A      log q = b - log B      log q - log p = d - (log B - log A)

`kl_row` reads both rows once. For bfloat16 inputs it writes max(e^a, e^b) and, in float16, d,
because A and B are known only at the end. Of p and q the larger is exact to its rounding and the
other is it times e^-|d|; near the reference p - q comes from d, not from two rounded numbers.
`kl_combine_ratios` computes the gradient from both. For float16 and float32 inputs see
triton_kl_dlogits.py.
"""

import triton
import triton.language as tl

from sepo_kernels.triton_rows import (
    LARGEST_SUM,
    LOWEST,
    UNSPECIALISED,
    expm1,
    load,
    load_logits,
    load_scale,
    load_target,
    log1p,
    logp_dlogits,
    store,
)

LARGEST_HALF = tl.constexpr(60000.0)  # |d| beyond is e^-60000 all the same
NUM_STATE = tl.constexpr(6)  # numbers of a row that later kernels read


@triton.jit(**UNSPECIALISED)
def kl_row(
    logits_ptr,  # (rows, V) float32, the policy's, before scale, bias and cap
    ref_logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32; anything if not has_bias
    ref_bias_ptr,  # (V,) float32; anything if not has_ref_bias
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,) out
    ref_logp_ptr,  # (rows,) out
    kl_ptr,  # (rows,) out
    state_ptr,  # (rows, 6) out: both references, 1 / A, log(B / A), 1 / softcap or 0; jsd_row's
    first_ptr,  # (rows, V) out: max(e^a, e^b); anything if not WRITE_BLOCKS
    second_ptr,  # (rows, V) out: d; anything if not WRITE_BLOCKS
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
    POLICY_FIRST: tl.constexpr,  # KL(policy || ref), else KL(ref || policy)
    WRITE_BLOCKS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64 before the multiply: rows * V passes 2**31
    scale = load_scale(scales_ptr, has_scales, scale, row)
    ref_scale = load_scale(ref_scales_ptr, has_ref_scales, ref_scale, row)
    logits_ptr += row * stride_logits
    ref_logits_ptr += row * stride_ref_logits
    first_ptr += row * stride_first
    second_ptr += row * stride_second
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    column = tl.where(known, target, -1).to(tl.int32)
    at_a, _ = load_target(logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED)
    at_b, _ = load_target(
        ref_logits_ptr, ref_bias_ptr, target, V, has_ref_bias, ref_scale, ref_softcap, CAPPED
    )
    reference = at_a
    ref_reference = at_b
    # without the target's terms, which keeps the digits of a row that is sure of it
    others, ref_others, weighted = _sums(
        logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, reference,
        ref_reference, column, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap,
        CAPPED, POLICY_FIRST, WRITE_BLOCKS, BLOCK_V,
    )  # fmt: skip
    own = 1.0
    ref_own = 1.0
    log_total = log1p(others)
    log_ref_total = log1p(ref_others)
    if ((others < LARGEST_SUM) & (ref_others < LARGEST_SUM)) == 0:  # or NaN
        tl.debug_barrier()  # the second time an entry may be another thread's
        reference, ref_reference = _largest(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, V, has_bias, has_ref_bias, scale,
            softcap, ref_scale, ref_softcap, CAPPED, BLOCK_V,
        )  # fmt: skip
        others, ref_others, weighted = _sums(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, reference,
            ref_reference, column, V, has_bias, has_ref_bias, scale, softcap, ref_scale,
            ref_softcap, CAPPED, POLICY_FIRST, WRITE_BLOCKS, BLOCK_V,
        )  # fmt: skip
        own = tl.where(known, tl.exp(at_a - reference), 0.0)
        ref_own = tl.where(known, tl.exp(at_b - ref_reference), 0.0)
        log_total = tl.log(others + own)
        log_ref_total = tl.log(ref_others + ref_own)
        d = (at_b - at_a) - (ref_reference - reference)
        share = own if POLICY_FIRST else ref_own
        weighted += tl.where(share > 0, share * d, 0.0)
    total = others + own
    ref_total = ref_others + ref_own
    # log B - log A from their difference, not from two rounded logarithms: equal heads have a KL of
    # exactly 0, and near the reference it keeps its digits
    change = tl.div_rn((ref_others - others) + (ref_own - own), total)
    shift = tl.where(tl.abs(change) < 0.5, log1p(change), tl.log(ref_total / total))
    if POLICY_FIRST:
        kl = shift - weighted / total
    else:
        kl = weighted / ref_total - shift
    tl.store(logp_ptr + row, (at_a - reference) - log_total)
    tl.store(ref_logp_ptr + row, (at_b - ref_reference) - log_ref_total)
    tl.store(kl_ptr + row, tl.where(kl < 0, 0.0, kl))  # not maximum, which would hide NaN
    state_ptr += row * NUM_STATE
    tl.store(state_ptr, reference)
    tl.store(state_ptr + 1, ref_reference)
    tl.store(state_ptr + 2, 1.0 / total)
    tl.store(state_ptr + 3, shift)
    tl.store(state_ptr + 4, 1.0 / softcap if CAPPED else 0.0)


@triton.jit(**UNSPECIALISED)
def kl_ratios(
    logits_ptr,  # (rows, V) float32
    ref_logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    ref_bias_ptr,  # (V,) float32
    state_ptr,  # (rows, 6): its references are used, because its sums are relative to them
    first_ptr,  # (rows, V) out
    second_ptr,  # (rows, V) out
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
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the blocks of `kl_row` a second time."""
    row = tl.program_id(0).to(tl.int64)
    scale = load_scale(scales_ptr, has_scales, scale, row)
    ref_scale = load_scale(ref_scales_ptr, has_ref_scales, ref_scale, row)
    start = tl.program_id(1) * BLOCK_V
    logits_ptr += row * stride_logits
    ref_logits_ptr += row * stride_ref_logits
    first_ptr += row * stride_first
    second_ptr += row * stride_second
    state_ptr += row * NUM_STATE
    if start + BLOCK_V <= V:
        _ratios_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, first_ptr, second_ptr,
            start, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap, CAPPED, True,
            BLOCK_V,
        )  # fmt: skip
    else:
        _ratios_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, first_ptr, second_ptr,
            start, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap, CAPPED, False,
            BLOCK_V,
        )  # fmt: skip


@triton.jit(**UNSPECIALISED)
def kl_combine_ratios(
    first_ptr,  # (rows, columns)
    second_ptr,  # (rows, columns)
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    kl_ptr,  # (rows,)
    state_ptr,  # (rows, 6)
    grad_logp_ptr,  # (rows,)
    grad_kl_ptr,  # (rows,)
    out_ptr,  # (rows, columns) out
    stride_first,
    stride_second,
    stride_out,
    column,  # the first of these
    columns,
    POLICY_FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    first_ptr += row * stride_first
    second_ptr += row * stride_second
    out_ptr += row * stride_out
    target = (tl.load(targets_ptr + row) - column).to(tl.int32)
    logp = tl.load(logp_ptr + row)
    kl = tl.load(kl_ptr + row)
    grad_logp = tl.load(grad_logp_ptr + row)
    grad_kl = tl.load(grad_kl_ptr + row)
    state_ptr += row * NUM_STATE
    if start + BLOCK_V <= columns:
        _combine_ratios_tile(
            first_ptr, second_ptr, out_ptr, state_ptr, target, logp, kl, grad_logp, grad_kl, start,
            columns, POLICY_FIRST, True, BLOCK_V,
        )  # fmt: skip
    else:
        _combine_ratios_tile(
            first_ptr, second_ptr, out_ptr, state_ptr, target, logp, kl, grad_logp, grad_kl, start,
            columns, POLICY_FIRST, False, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _sums(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, reference,
    ref_reference, target, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap,
    CAPPED: tl.constexpr, POLICY_FIRST: tl.constexpr, WRITE_BLOCKS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sum e^a, e^b and d weighted by the KL's first, over a row but for its target."""
    total = tl.zeros((BLOCK_V,), tl.float32)  # a sum in each lane, added up once at the end
    ref_total = tl.zeros((BLOCK_V,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        e, ref_e, w = _sums_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, reference,
            ref_reference, target, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale,
            ref_softcap, CAPPED, POLICY_FIRST, WRITE_BLOCKS, True, BLOCK_V,
        )  # fmt: skip
        total += e
        ref_total += ref_e
        weighted += w
    if whole < V:
        e, ref_e, w = _sums_tile(
            logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, reference,
            ref_reference, target, whole, V, has_bias, has_ref_bias, scale, softcap, ref_scale,
            ref_softcap, CAPPED, POLICY_FIRST, WRITE_BLOCKS, False, BLOCK_V,
        )  # fmt: skip
        total += e
        ref_total += ref_e
        weighted += w
    return tl.sum(total, 0), tl.sum(ref_total, 0), tl.sum(weighted, 0)


@triton.jit
def _sums_tile(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, first_ptr, second_ptr, reference,
    ref_reference, target, start, V, has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap,
    CAPPED: tl.constexpr, POLICY_FIRST: tl.constexpr, WRITE_BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    a, _ = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    b, _ = load_logits(
        ref_logits_ptr, ref_bias_ptr, v, V, has_ref_bias, ref_scale, ref_softcap, CAPPED, WHOLE
    )
    e = tl.exp(a - reference)
    ref_e = tl.exp(b - ref_reference)
    # b - a first: near the reference it is exact
    d = (b - a) - (ref_reference - reference)
    if WRITE_BLOCKS:
        _write_blocks(first_ptr, second_ptr, tl.maximum(e, ref_e), d, v, V, WHOLE)
    e = tl.where(v == target, 0.0, e)
    ref_e = tl.where(v == target, 0.0, ref_e)
    share = e if POLICY_FIRST else ref_e
    return e, ref_e, tl.where(share > 0, share * d, 0.0)  # 0 log 0 = 0


@triton.jit
def _ratios_tile(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, state_ptr, first_ptr, second_ptr, start, V,
    has_bias, has_ref_bias, scale, softcap, ref_scale, ref_softcap, CAPPED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    a, _ = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    b, _ = load_logits(
        ref_logits_ptr, ref_bias_ptr, v, V, has_ref_bias, ref_scale, ref_softcap, CAPPED, WHOLE
    )
    reference = tl.load(state_ptr)
    ref_reference = tl.load(state_ptr + 1)
    larger = tl.maximum(tl.exp(a - reference), tl.exp(b - ref_reference))
    _write_blocks(first_ptr, second_ptr, larger, (b - a) - (ref_reference - reference), v, V, WHOLE)


@triton.jit
def _write_blocks(first_ptr, second_ptr, larger, d, v, V, WHOLE: tl.constexpr):
    # d is NaN where both heads rule a word out: without weight it may be 0
    d = tl.where(larger > 0, tl.minimum(tl.maximum(d, -LARGEST_HALF), LARGEST_HALF), 0.0)
    store(first_ptr, larger, v, V, WHOLE)
    store(second_ptr, d, v, V, WHOLE)


@triton.jit
def _largest(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, V, has_bias, has_ref_bias, scale, softcap,
    ref_scale, ref_softcap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    ref_top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        a, _ = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, False)
        b, _ = load_logits(
            ref_logits_ptr, ref_bias_ptr, v, V, has_ref_bias, ref_scale, ref_softcap, CAPPED, False
        )
        top = tl.maximum(top, a)
        ref_top = tl.maximum(ref_top, b)
    return tl.max(top, 0), tl.max(ref_top, 0)


@triton.jit
def _combine_ratios_tile(
    first_ptr, second_ptr, out_ptr, state_ptr, target, logp, kl, grad_logp, grad_kl, start, columns,
    POLICY_FIRST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    larger, d, q, p, ratio = load_ratios(first_ptr, second_ptr, state_ptr, v, columns, WHOLE)
    if POLICY_FIRST:
        dkl = tl.where(p > 0, -p * (ratio + kl), 0.0)
    else:  # p - q, from the larger of both
        loss = expm1(-tl.abs(ratio))
        dkl = tl.where(ratio > 0, q, -p) * loss
    store_gradient(
        out_ptr, dkl, p, larger, d, state_ptr, v, target, logp, grad_logp, grad_kl, columns, WHOLE
    )


@triton.jit
def load_ratios(first_ptr, second_ptr, state_ptr, v, columns, WHOLE: tl.constexpr):
    """Return what `kl_row` kept of columns v: max(e^a, e^b), d; and q, p, log q - log p of it."""
    larger = load(first_ptr, v, columns, WHOLE)
    d = load(second_ptr, v, columns, WHOLE)
    row_scale = tl.load(state_ptr + 2)
    shift = tl.load(state_ptr + 3)
    smaller = larger * tl.exp(-tl.abs(d))
    p = tl.where(d > 0, smaller, larger) * row_scale
    q = tl.where(d > 0, larger, smaller) * (row_scale * tl.exp(-shift))
    return larger, d, q, p, d - shift


@triton.jit
def store_gradient(
    out_ptr, dkl, p, larger, d, state_ptr, v, target, logp, grad_logp, grad_kl, columns,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Write dZ, from the divergence's derivative by the policy's logits after their cap."""
    out = grad_kl * dkl - grad_logp * logp_dlogits(p, 1.0, v, target, logp)
    inverse_cap = tl.load(state_ptr + 4)
    if inverse_cap > 0:
        # a / softcap, from the saved blocks, whose rounding may take it beyond 1
        a = tl.log(tl.maximum(larger, 1e-37)) - tl.maximum(d, 0.0)
        relative = (a + tl.load(state_ptr)) * inverse_cap
        relative = tl.minimum(tl.maximum(relative, -1.0), 1.0)
        out *= 1.0 - relative * relative
    store(out_ptr, out, v, columns, WHOLE)
