"""The Triton kernels of one head's rows.

`logprob_row` reads the target's logit first and then the row once, summing e^(z - z_target). The
dlogits that it writes are final up to one factor a row, 1 / sum, which the loops multiply onto rows
of width D. In bfloat16 that is all. float16 has too small a range, and float32 dlogits overwrite
the logits, so that a row could not be redone: there `logprob_row` only sums, and `logprob_dlogits`
reads the row again. The second launch costs nothing: the rows under way at once are larger than
any L2 cache.
"""

import triton
import triton.language as tl

from sepo_kernels.triton_rows import (
    LARGEST_SUM,
    UNSPECIALISED,
    largest_logit,
    load_logits,
    load_scale,
    load_target,
    log1p,
    logp_dlogits,
    store,
)


@triton.jit(**UNSPECIALISED)
def logprob_row(
    logits_ptr,  # (rows, V) float32, before scale, bias and cap
    bias_ptr,  # (V,) float32; anything if not has_bias
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,) out
    lse_ptr,  # (rows,) out
    reference_ptr,  # (rows,) out: the target's logit, or the largest where that is hopeless
    row_scale_ptr,  # (rows,) out: 1 / sum of e^(z - reference)
    dlogits_ptr,  # (rows, V) out: dlogits / row_scale, apart from logits; anything if not written
    stride_logits,
    stride_dlogits,
    V,
    has_bias,
    scales_ptr,  # (rows,); anything if not has_scales
    has_scales,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    WRITE_DLOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64 before the multiply: rows * V passes 2**31
    scale = load_scale(scales_ptr, has_scales, scale, row)
    logits_ptr += row * stride_logits
    dlogits_ptr += row * stride_dlogits
    target = tl.load(targets_ptr + row)
    at_target, derivative = load_target(
        logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED
    )
    known = (target >= 0) & (target < V)
    column = tl.where(known, target, -1).to(tl.int32)
    reference = at_target
    others = _exponentials(
        logits_ptr, bias_ptr, dlogits_ptr, reference, column, V, has_bias, scale, softcap,
        CAPPED, WRITE_DLOGITS, BLOCK_V,
    )  # fmt: skip
    own = 1.0
    logp = -log1p(others)  # keeps the digits of a row that is sure of its target
    if (others < LARGEST_SUM) == 0:  # or NaN
        tl.debug_barrier()  # the second time an entry may be another thread's
        reference = largest_logit(
            logits_ptr, bias_ptr, V, has_bias, scale, softcap, CAPPED, BLOCK_V
        )
        others = _exponentials(
            logits_ptr, bias_ptr, dlogits_ptr, reference, column, V, has_bias, scale, softcap,
            CAPPED, WRITE_DLOGITS, BLOCK_V,
        )  # fmt: skip
        own = tl.where(known, tl.exp(at_target - reference), 0.0)
        logp = (at_target - reference) - tl.log(others + own)
    total = others + own
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, reference + tl.log(total))
    tl.store(reference_ptr + row, reference)
    tl.store(row_scale_ptr + row, 1.0 / total)
    if WRITE_DLOGITS:
        tl.debug_barrier()  # after the zero that is there
        # p - 1 of the target, from the others' sum
        entry = (-others * derivative).to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + column, entry, mask=known)


@triton.jit(**UNSPECIALISED)
def logprob_dlogits(
    logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    reference_ptr,  # (rows,)
    row_scale_ptr,  # (rows,): p = e^(z - reference) * row_scale
    dlogits_ptr,  # (rows, V) out; may be logits: each element is read before it is written
    stride_logits,
    stride_dlogits,
    V,
    has_bias,
    scales_ptr,  # (rows,); anything if not has_scales
    has_scales,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = load_scale(scales_ptr, has_scales, scale, row)
    start = tl.program_id(1) * BLOCK_V
    logits_ptr += row * stride_logits
    dlogits_ptr += row * stride_dlogits
    target = tl.load(targets_ptr + row)
    logp = tl.load(logp_ptr + row)
    reference = tl.load(reference_ptr + row)
    row_scale = tl.load(row_scale_ptr + row)
    if start + BLOCK_V <= V:
        _dlogits_tile(
            logits_ptr, bias_ptr, dlogits_ptr, target, logp, reference, row_scale, start, V,
            has_bias, scale, softcap, CAPPED, True, BLOCK_V,
        )  # fmt: skip
    else:
        _dlogits_tile(
            logits_ptr, bias_ptr, dlogits_ptr, target, logp, reference, row_scale, start, V,
            has_bias, scale, softcap, CAPPED, False, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _exponentials(
    logits_ptr, bias_ptr, dlogits_ptr, reference, target, V, has_bias, scale, softcap,
    CAPPED: tl.constexpr, WRITE_DLOGITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sum e^(z - reference) over a row but for its target, where dlogits gets zero."""
    total = tl.zeros((BLOCK_V,), tl.float32)  # a sum in each lane, added up once at the end
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        total += _exponentials_tile(
            logits_ptr, bias_ptr, dlogits_ptr, reference, target, start, V, has_bias, scale,
            softcap, CAPPED, WRITE_DLOGITS, True, BLOCK_V,
        )  # fmt: skip
    if whole < V:
        total += _exponentials_tile(
            logits_ptr, bias_ptr, dlogits_ptr, reference, target, whole, V, has_bias, scale,
            softcap, CAPPED, WRITE_DLOGITS, False, BLOCK_V,
        )  # fmt: skip
    return tl.sum(total, 0)


@triton.jit
def _exponentials_tile(
    logits_ptr, bias_ptr, dlogits_ptr, reference, target, start, V, has_bias, scale, softcap,
    CAPPED: tl.constexpr, WRITE_DLOGITS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    z, derivative = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    e = tl.where(v == target, 0.0, tl.exp(z - reference))
    if WRITE_DLOGITS:
        store(dlogits_ptr, e * derivative, v, V, WHOLE)
    return e


@triton.jit
def _dlogits_tile(
    logits_ptr, bias_ptr, dlogits_ptr, target, logp, reference, row_scale, start, V, has_bias,
    scale, softcap, CAPPED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    z, derivative = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    p = tl.exp(z - reference) * row_scale
    store(dlogits_ptr, logp_dlogits(p, derivative, v, target, logp), v, V, WHOLE)
