"""The Triton kernels of one head's rows.

`logprob_row` reads the target's logit first and the row once, summing e^(z - z_target): what it
writes of the slope is final up to a factor of the row, 1 / sum, which the loops multiply onto rows
of width D. With the range of bfloat16 that is all. float16 has not that range, and a float32 slope
takes the logits' place, so that a row could not be done again: there `logprob_row` sums alone, and
`logprob_slope` reads the row a second time. That they are two launches costs nothing: the rows
under way at once are larger than any L2 cache.
"""

import triton
import triton.language as tl

from sepo_kernels.triton_rows import (
    LARGEST_SUM,
    LOWEST,
    UNSPECIALISED,
    first_slope,
    load_logits,
    load_target,
    log1p,
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
    unit_ptr,  # (rows,) out: 1 / sum of e^(z - reference)
    slope_ptr,  # (rows, V) out: slope / unit, not in the logits' place; anything if not SLOPE
    stride_logits,
    stride_slope,
    V,
    has_bias,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64 before the multiply: rows * V passes 2**31
    logits_ptr += row * stride_logits
    slope_ptr += row * stride_slope
    target = tl.load(targets_ptr + row)
    at_target, derivative = load_target(
        logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED
    )
    known = (target >= 0) & (target < V)
    column = tl.where(known, target, -1).to(tl.int32)
    reference = at_target
    others = _exponentials(
        logits_ptr, bias_ptr, slope_ptr, reference, column, V, has_bias, scale, softcap, CAPPED,
        SLOPE, BLOCK_V,
    )  # fmt: skip
    own = 1.0
    logp = -log1p(others)  # keeps the digits of a row that is sure of its target
    if (others < LARGEST_SUM) == 0:  # or NaN
        tl.debug_barrier()  # the second time an entry may be another thread's
        reference = _largest(logits_ptr, bias_ptr, V, has_bias, scale, softcap, CAPPED, BLOCK_V)
        others = _exponentials(
            logits_ptr, bias_ptr, slope_ptr, reference, column, V, has_bias, scale, softcap, CAPPED,
            SLOPE, BLOCK_V,
        )  # fmt: skip
        own = tl.where(known, tl.exp(at_target - reference), 0.0)
        logp = (at_target - reference) - tl.log(others + own)
    total = others + own
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, reference + tl.log(total))
    tl.store(reference_ptr + row, reference)
    tl.store(unit_ptr + row, 1.0 / total)
    if SLOPE:
        tl.debug_barrier()  # after the zero that is there
        # p - 1 of the target, from what the others have
        entry = (-others * derivative).to(slope_ptr.dtype.element_ty)
        tl.store(slope_ptr + column, entry, mask=known)


@triton.jit(**UNSPECIALISED)
def logprob_slope(
    logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    reference_ptr,  # (rows,)
    unit_ptr,  # (rows,): p = e^(z - reference) * unit
    slope_ptr,  # (rows, V) out; may be logits: each element is read before it is written
    stride_logits,
    stride_slope,
    V,
    has_bias,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    logits_ptr += row * stride_logits
    slope_ptr += row * stride_slope
    target = tl.load(targets_ptr + row)
    logp = tl.load(logp_ptr + row)
    reference = tl.load(reference_ptr + row)
    unit = tl.load(unit_ptr + row)
    if start + BLOCK_V <= V:
        _slope_tile(
            logits_ptr, bias_ptr, slope_ptr, target, logp, reference, unit, start, V, has_bias,
            scale, softcap, CAPPED, True, BLOCK_V,
        )  # fmt: skip
    else:
        _slope_tile(
            logits_ptr, bias_ptr, slope_ptr, target, logp, reference, unit, start, V, has_bias,
            scale, softcap, CAPPED, False, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _exponentials(
    logits_ptr, bias_ptr, slope_ptr, reference, target, V, has_bias, scale, softcap,
    CAPPED: tl.constexpr, SLOPE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The sum of e^(z - reference) over a row but for its target, where the slope gets zero."""
    total = tl.zeros((BLOCK_V,), tl.float32)  # a sum in each lane, added up once at the end
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        total += _exponentials_tile(
            logits_ptr, bias_ptr, slope_ptr, reference, target, start, V, has_bias, scale, softcap,
            CAPPED, SLOPE, True, BLOCK_V,
        )  # fmt: skip
    if whole < V:
        total += _exponentials_tile(
            logits_ptr, bias_ptr, slope_ptr, reference, target, whole, V, has_bias, scale, softcap,
            CAPPED, SLOPE, False, BLOCK_V,
        )  # fmt: skip
    return tl.sum(total, 0)


@triton.jit
def _exponentials_tile(
    logits_ptr, bias_ptr, slope_ptr, reference, target, start, V, has_bias, scale, softcap,
    CAPPED: tl.constexpr, SLOPE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    z, derivative = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    e = tl.where(v == target, 0.0, tl.exp(z - reference))
    if SLOPE:
        store(slope_ptr, e * derivative, v, V, WHOLE)
    return e


@triton.jit
def _largest(
    logits_ptr, bias_ptr, V, has_bias, scale, softcap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr
):
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, False)
        top = tl.maximum(top, z)
    return tl.max(top, 0)


@triton.jit
def _slope_tile(
    logits_ptr, bias_ptr, slope_ptr, target, logp, reference, unit, start, V, has_bias, scale,
    softcap, CAPPED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    z, derivative = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    p = tl.exp(z - reference) * unit
    store(slope_ptr, first_slope(p, derivative, v, target, logp), v, V, WHOLE)
