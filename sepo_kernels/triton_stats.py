"""The Triton kernels of one head's rows with their statistics.

`stats_row` is `logprob_row` with more sums: of e^y y, e^2y and z, with y = z - reference, and a
count of the logits that come before the target in order of size. A row is done again once its sum
of e^y reaches 2^60, so that no e^2y overflows. For float32 inputs `entropy_row` reads the row again
from its largest logit, for the digits that cancel where that is not the target's. `entropy_dlogits`
makes the gradient of the logits once both incoming gradients are known.
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
def stats_row(
    logits_ptr,  # (rows, V) float32, before scale, bias and cap
    bias_ptr,  # (V,) float32; anything if not has_bias
    targets_ptr,  # (rows,)
    numbers_ptr,  # (9, rows) out, in the order of selected_stats/loops.py
    dlogits_ptr,  # (rows, V) out: dlogits / row_scale, apart from logits; anything if not written
    stride_logits,
    stride_dlogits,
    num_rows,
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
    others, weighted, squares, total, ahead = _sums(
        logits_ptr, bias_ptr, dlogits_ptr, reference, at_target, column, V, has_bias, scale,
        softcap, CAPPED, WRITE_DLOGITS, BLOCK_V,
    )  # fmt: skip
    own = 1.0
    log_sum = log1p(others)  # keeps the digits of a row that is sure of its target
    logp = -log_sum
    if (others < LARGEST_SUM) == 0:  # or NaN
        tl.debug_barrier()  # the second time an entry may be another thread's
        reference = largest_logit(
            logits_ptr, bias_ptr, V, has_bias, scale, softcap, CAPPED, BLOCK_V
        )
        others, weighted, squares, total, ahead = _sums(
            logits_ptr, bias_ptr, dlogits_ptr, reference, at_target, column, V, has_bias, scale,
            softcap, CAPPED, WRITE_DLOGITS, BLOCK_V,
        )  # fmt: skip
        own = tl.where(known, tl.exp(at_target - reference), 0.0)
        log_sum = tl.log(others + own)
        weighted += tl.where(own > 0, own * (at_target - reference), 0.0)
        logp = (at_target - reference) - log_sum
    whole = others + own
    entropy, log_squares = _entropy(others, own, weighted, squares, log_sum)
    numbers_ptr += row
    tl.store(numbers_ptr, logp)
    tl.store(numbers_ptr + num_rows, reference + tl.log(whole))
    tl.store(numbers_ptr + 2 * num_rows, 1.0 / whole)
    tl.store(numbers_ptr + 3 * num_rows, entropy)
    tl.store(numbers_ptr + 4 * num_rows, log_squares)
    tl.store(numbers_ptr + 5 * num_rows, total / V)
    tl.store(numbers_ptr + 6 * num_rows, tl.where(known & (ahead == 0), 1.0, 0.0))
    tl.store(numbers_ptr + 7 * num_rows, reference)
    tl.store(numbers_ptr + 8 * num_rows, log_sum)
    if WRITE_DLOGITS:
        tl.debug_barrier()  # after the zero that is there
        # p - 1 of the target, from the others' sum
        entry = (-others * derivative).to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + column, entry, mask=known)


@triton.jit(**UNSPECIALISED)
def entropy_row(
    logits_ptr,  # (rows, V) float32, before scale, bias and cap
    bias_ptr,  # (V,) float32; anything if not has_bias
    targets_ptr,  # (rows,)
    numbers_ptr,  # (9, rows), of which entropy and log_sum_sq are written
    stride_logits,
    num_rows,
    V,
    has_bias,
    scales_ptr,  # (rows,); anything if not has_scales
    has_scales,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write both again, from sums relative to the largest logit, where no terms cancel."""
    row = tl.program_id(0).to(tl.int64)
    scale = load_scale(scales_ptr, has_scales, scale, row)
    logits_ptr += row * stride_logits
    target = tl.load(targets_ptr + row)
    at_target, _ = load_target(logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED)
    known = (target >= 0) & (target < V)
    column = tl.where(known, target, -1).to(tl.int32)
    top = largest_logit(logits_ptr, bias_ptr, V, has_bias, scale, softcap, CAPPED, BLOCK_V)
    others, weighted, squares, _, _ = _sums(
        logits_ptr, bias_ptr, logits_ptr, top, at_target, column, V, has_bias, scale, softcap,
        CAPPED, False, BLOCK_V,
    )  # fmt: skip
    own = tl.where(known, tl.exp(at_target - top), 0.0)
    weighted += tl.where(own > 0, own * (at_target - top), 0.0)
    log_sum = tl.where(own == 1.0, log1p(others), tl.log(others + own))
    entropy, log_squares = _entropy(others, own, weighted, squares, log_sum)
    numbers_ptr += row
    tl.store(numbers_ptr + 3 * num_rows, entropy)
    tl.store(numbers_ptr + 4 * num_rows, log_squares)


@triton.jit(**UNSPECIALISED)
def entropy_dlogits(
    logits_ptr,  # (rows, columns) float32, before scale, bias and cap
    bias_ptr,  # (columns,) float32; anything if not has_bias
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    entropy_ptr,  # (rows,)
    reference_ptr,  # (rows,)
    row_scale_ptr,  # (rows,): p = e^(z - reference) * row_scale
    grad_logp_ptr,  # (rows,)
    grad_entropy_ptr,  # (rows,)
    out_ptr,  # (rows, columns) out; may be logits: each element is read before it is written
    stride_logits,
    stride_out,
    column,  # the first of these
    columns,
    has_bias,
    scales_ptr,  # (rows,); anything if not has_scales
    has_scales,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    scale = load_scale(scales_ptr, has_scales, scale, row)
    logits_ptr += row * stride_logits
    out_ptr += row * stride_out
    target = (tl.load(targets_ptr + row) - column).to(tl.int32)
    logp = tl.load(logp_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    reference = tl.load(reference_ptr + row)
    row_scale = tl.load(row_scale_ptr + row)
    grad_logp = tl.load(grad_logp_ptr + row)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    if start + BLOCK_V <= columns:
        _dlogits_tile(
            logits_ptr, bias_ptr, out_ptr, target, logp, entropy, reference, row_scale, grad_logp,
            grad_entropy, start, columns, has_bias, scale, softcap, CAPPED, True, BLOCK_V,
        )  # fmt: skip
    else:
        _dlogits_tile(
            logits_ptr, bias_ptr, out_ptr, target, logp, entropy, reference, row_scale, grad_logp,
            grad_entropy, start, columns, has_bias, scale, softcap, CAPPED, False, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _entropy(others, own, weighted, squares, log_sum):
    """Return entropy and log sum p^2; of the sums, others and squares are without the target's."""
    whole = others + own
    entropy = log_sum - weighted / whole
    # the digits of a confident row are in the others; elsewhere two logarithms would cancel
    share = (squares + own * own) / whole / whole
    confident = (others < 0.5) & (own == 1.0)
    log_squares = tl.where(confident, log1p(squares) - 2.0 * log_sum, tl.log(share))
    return tl.where(entropy < 0, 0.0, entropy), log_squares


@triton.jit
def _sums(
    logits_ptr, bias_ptr, dlogits_ptr, reference, at_target, target, V, has_bias, scale, softcap,
    CAPPED: tl.constexpr, WRITE_DLOGITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sum over a row: e^y, e^y y and e^2y but for its target, z, and the logits ahead of it."""
    others = tl.zeros((BLOCK_V,), tl.float32)  # a sum in each lane, added up once at the end
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    squares = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    ahead = tl.zeros((BLOCK_V,), tl.int32)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        e, w, z, a = _sums_tile(
            logits_ptr, bias_ptr, dlogits_ptr, reference, at_target, target, start, V, has_bias,
            scale, softcap, CAPPED, WRITE_DLOGITS, True, BLOCK_V,
        )  # fmt: skip
        others += e
        weighted += w
        squares += e * e
        total += z
        ahead += a
    if whole < V:
        e, w, z, a = _sums_tile(
            logits_ptr, bias_ptr, dlogits_ptr, reference, at_target, target, whole, V, has_bias,
            scale, softcap, CAPPED, WRITE_DLOGITS, False, BLOCK_V,
        )  # fmt: skip
        others += e
        weighted += w
        squares += e * e
        total += z
        ahead += a
    return (
        tl.sum(others, 0), tl.sum(weighted, 0), tl.sum(squares, 0), tl.sum(total, 0),
        tl.sum(ahead, 0),
    )  # fmt: skip


@triton.jit
def _sums_tile(
    logits_ptr, bias_ptr, dlogits_ptr, reference, at_target, target, start, V, has_bias, scale,
    softcap, CAPPED: tl.constexpr, WRITE_DLOGITS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    z, derivative = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, WHOLE)
    y = z - reference
    e = tl.where(v == target, 0.0, tl.exp(y))
    if WRITE_DLOGITS:
        store(dlogits_ptr, e * derivative, v, V, WHOLE)
    ahead = (z > at_target) | ((z == at_target) & (v < target))
    if not WHOLE:
        z = tl.where(v < V, z, 0.0)
    return e, tl.where(e > 0, e * y, 0.0), z, ahead.to(tl.int32)  # 0 log 0 = 0


@triton.jit
def _dlogits_tile(
    logits_ptr, bias_ptr, out_ptr, target, logp, entropy, reference, row_scale, grad_logp,
    grad_entropy, start, columns, has_bias, scale, softcap, CAPPED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    z, derivative = load_logits(
        logits_ptr, bias_ptr, v, columns, has_bias, scale, softcap, CAPPED, WHOLE
    )
    y = z - reference
    p = tl.exp(y) * row_scale
    log_p = y + tl.log(row_scale)
    of_entropy = tl.where(p > 0, p * (log_p + entropy), 0.0)  # 0 log 0 = 0
    own = tl.exp(logp)
    of_entropy = tl.where(v == target, tl.where(own > 0, own * (logp + entropy), 0.0), of_entropy)
    of_logp = logp_dlogits(p, derivative, v, target, logp)
    out = -(grad_logp * of_logp + grad_entropy * of_entropy * derivative)
    store(out_ptr, out, v, columns, WHOLE)
