"""The Triton row kernels of both heads, from float32 logits, computing in float32.

A statistics kernel walks a row with one program, with an online log-sum-exp, and a slope kernel
gives every tile of every row a program. They are two launches, not two passes of one program: the
rows under way at once are larger than any L2 cache, so a second pass would read memory again just
the same. No atomics: each output element has one writer, each sum one order.

Imported at the first launch, because the operations work without triton too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sepo_kernels.configs import CONFIGS

# compiled once for all values of what only chooses, and for any alignment of one number a row
UNSPECIALISED = {
    "do_not_specialize": ["has_bias", "has_ref_bias"],
    "do_not_specialize_on_alignment": [
        "targets_ptr", "logp_ptr", "ref_logp_ptr", "top_ptr", "log_total_ptr", "kl_ptr",
        "state_ptr", "grad_logp_ptr", "grad_kl_ptr",
    ],
}  # fmt: skip
# finite: where all of a tile is -inf (a padded vocabulary's bias), e^(-inf - top) = 0 needs a top
LOWEST = tl.constexpr(-3.4028234663852886e38)


def launch(
    kernel,  # one of this module, in the table
    rows: int,
    columns: int | None,  # None: the kernel walks its row itself
    *args,
    **flags: bool,
) -> None:
    config = CONFIGS[kernel.fn.__name__]
    assert set(flags) == set(config.flags), f"{kernel.fn.__name__}: {flags}"
    grid = (rows,) if columns is None else (rows, triton.cdiv(columns, config.BLOCK_V))
    if 0 in grid:
        return
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **flags, BLOCK_V=config.BLOCK_V, num_warps=config.num_warps)


def bias_argument(
    bias: Tensor | None,  # (V,)
    logits: Tensor,  # (rows, V) float32
) -> Tensor:  # (V,) float32, or without a bias a tensor that no kernel reads
    return logits.new_empty((1,)) if bias is None else bias.float().contiguous()


@triton.jit(**UNSPECIALISED)
def logprob_statistics(
    logits_ptr,  # (rows, V) float32, before scale, bias and cap
    bias_ptr,  # (V,) float32; anything if not has_bias
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,) out
    top_ptr,  # (rows,) out: the largest logit
    log_total_ptr,  # (rows,) out: lse - top
    stride_logits,
    V,
    has_bias,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64 before the multiply: rows * V passes 2**31
    logits_ptr += row * stride_logits
    top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)  # a sum in each lane, added up once at the end
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = _load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED)
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.exp(z - new_top)
        top = new_top
    log_total = tl.log(tl.sum(total, 0))

    target = tl.load(targets_ptr + row)
    z = _load_target(logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED)
    tl.store(logp_ptr + row, (z - top) - log_total)
    tl.store(top_ptr + row, top)
    tl.store(log_total_ptr + row, log_total)


@triton.jit(**UNSPECIALISED)
def logprob_slope(
    logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    top_ptr,  # (rows,)
    log_total_ptr,  # (rows,): top + log_total is the log-sum-exp
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
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z, derivative = _load_logits(
        logits_ptr + row * stride_logits, bias_ptr, v, V, has_bias, scale, softcap, CAPPED
    )
    # their sum, rounded, would be off by the same factor all along the row
    p = tl.exp((z - tl.load(top_ptr + row)) - tl.load(log_total_ptr + row))
    slope = _first_slope(p, derivative, v, tl.load(targets_ptr + row), tl.load(logp_ptr + row))
    tl.store(slope_ptr + row * stride_slope + v, slope.to(slope_ptr.dtype.element_ty), mask=v < V)


@triton.jit(**UNSPECIALISED)
def kl_statistics(
    logits_ptr,  # (rows, V) float32, the policy's
    ref_logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    ref_bias_ptr,  # (V,) float32
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,) out
    ref_logp_ptr,  # (rows,) out
    kl_ptr,  # (rows,) out
    state_ptr,  # (rows, 4) out: top and log_total of each head
    stride_logits,
    stride_ref_logits,
    V,
    has_bias,
    has_ref_bias,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    POLICY_FIRST: tl.constexpr,  # KL(policy || ref), else KL(ref || policy)
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    ref_logits_ptr += row * stride_ref_logits
    top = tl.full((), LOWEST, tl.float32)
    ref_top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    ref_total = tl.zeros((BLOCK_V,), tl.float32)
    gap = tl.zeros((BLOCK_V,), tl.float32)  # sum of e^(first - its top) * (first - second)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        a, _ = _load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED)
        b, _ = _load_logits(
            ref_logits_ptr, ref_bias_ptr, v, V, has_ref_bias, scale, softcap, CAPPED
        )
        new_top = tl.maximum(top, tl.max(a, 0))
        new_ref_top = tl.maximum(ref_top, tl.max(b, 0))
        shrink = tl.exp(top - new_top)
        ref_shrink = tl.exp(ref_top - new_ref_top)
        e = tl.exp(a - new_top)
        ref_e = tl.exp(b - new_ref_top)
        # 0 log 0 = 0, where both logits are -inf too
        if POLICY_FIRST:
            gap = gap * shrink + tl.where(e > 0, e * (a - b), 0.0)
        else:
            gap = gap * ref_shrink + tl.where(ref_e > 0, ref_e * (b - a), 0.0)
        total = total * shrink + e
        ref_total = ref_total * ref_shrink + ref_e
        top = new_top
        ref_top = new_ref_top
    sum_total = tl.sum(total, 0)
    sum_ref_total = tl.sum(ref_total, 0)
    log_total = tl.log(sum_total)
    log_ref_total = tl.log(sum_ref_total)
    # not the difference of two rounded log-sum-exps: equal heads have a KL of exactly 0
    difference = (ref_top - top) + (log_ref_total - log_total)
    if POLICY_FIRST:
        kl = tl.sum(gap, 0) / sum_total + difference
    else:
        kl = tl.sum(gap, 0) / sum_ref_total - difference

    target = tl.load(targets_ptr + row)
    a = _load_target(logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED)
    b = _load_target(ref_logits_ptr, ref_bias_ptr, target, V, has_ref_bias, scale, softcap, CAPPED)
    tl.store(logp_ptr + row, (a - top) - log_total)
    tl.store(ref_logp_ptr + row, (b - ref_top) - log_ref_total)
    tl.store(kl_ptr + row, tl.where(kl < 0, 0.0, kl))  # not maximum, which would hide NaN
    state_ptr += row * 4
    tl.store(state_ptr, top)
    tl.store(state_ptr + 1, log_total)
    tl.store(state_ptr + 2, ref_top)
    tl.store(state_ptr + 3, log_ref_total)


@triton.jit(**UNSPECIALISED)
def kl_slopes(
    logits_ptr,  # (rows, V) float32
    ref_logits_ptr,  # (rows, V) float32
    bias_ptr,  # (V,) float32
    ref_bias_ptr,  # (V,) float32
    targets_ptr,  # (rows,)
    logp_ptr,  # (rows,)
    kl_ptr,  # (rows,)
    state_ptr,  # (rows, 4)
    first_ptr,  # (rows, V) out: -dlogp/dz; may be logits
    second_ptr,  # (rows, V) out: dKL/dz; may be ref_logits
    stride_logits,
    stride_ref_logits,
    stride_first,
    stride_second,
    V,
    has_bias,
    has_ref_bias,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    POLICY_FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    a, derivative = _load_logits(
        logits_ptr + row * stride_logits, bias_ptr, v, V, has_bias, scale, softcap, CAPPED
    )
    b, _ = _load_logits(
        ref_logits_ptr + row * stride_ref_logits, ref_bias_ptr, v, V, has_ref_bias, scale, softcap,
        CAPPED,
    )  # fmt: skip
    state_ptr += row * 4
    top = tl.load(state_ptr)
    log_total = tl.load(state_ptr + 1)
    ref_top = tl.load(state_ptr + 2)
    log_ref_total = tl.load(state_ptr + 3)
    # tops and logarithms apart: their sums, rounded, would be off all along the row
    p = tl.exp((a - top) - log_total)
    ratio = ((b - a) - (ref_top - top)) - (log_ref_total - log_total)  # log q - log p
    if POLICY_FIRST:
        second = tl.where(p > 0, -p * (ratio + tl.load(kl_ptr + row)), 0.0)
    else:
        # p - q, whose digits cancel where the policy is still near the reference
        q = tl.exp((b - ref_top) - log_ref_total)
        second = tl.where(tl.abs(ratio) < 0.5, -p * _expm1(tl.minimum(ratio, 0.5)), p - q)
    first = _first_slope(p, derivative, v, tl.load(targets_ptr + row), tl.load(logp_ptr + row))
    first_ptr += row * stride_first
    second_ptr += row * stride_second
    tl.store(first_ptr + v, first.to(first_ptr.dtype.element_ty), mask=v < V)
    tl.store(second_ptr + v, (second * derivative).to(second_ptr.dtype.element_ty), mask=v < V)


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
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    ok = v < columns
    first = tl.load(first_ptr + row * stride_first + v, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + row * stride_second + v, mask=ok, other=0.0).to(tl.float32)
    out = tl.load(grad_kl_ptr + row) * second - tl.load(grad_logp_ptr + row) * first
    tl.store(out_ptr + row * stride_out + v, out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED: tl.constexpr):
    """One row's logits at columns v, e^z = 0 beyond V, and the derivative of their cap."""
    z = tl.load(logits_ptr + v, mask=v < V, other=0.0) * scale
    z += tl.load(bias_ptr + v, mask=(v < V) & (has_bias != 0), other=0.0)
    derivative = 1.0
    if CAPPED:
        z, derivative = _cap(z, softcap)
    return tl.where(v < V, z, LOWEST), derivative


@triton.jit
def _load_target(logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED: tl.constexpr):
    ok = (target >= 0) & (target < V)
    # a target that is none is NaN, not the logit of another row
    z = tl.load(logits_ptr + target, mask=ok, other=float("nan")) * scale
    z += tl.load(bias_ptr + target, mask=ok & (has_bias != 0), other=0.0)
    if CAPPED:
        z, _ = _cap(z, softcap)
    return z


@triton.jit
def _first_slope(p, derivative, v, target, logp):
    """-dlogp/dz; the target's entry is expm1(logp): p - 1 has the error of an exponential near 1."""
    return tl.where(v == target, _expm1(logp), p) * derivative


@triton.jit
def _cap(z, softcap):
    """softcap * tanh(z / softcap) and its derivative, from e^(-2|y|): Triton has no tanh."""
    u = -2.0 * tl.abs(z / softcap)
    e = tl.exp(u)
    capped = softcap * (-_expm1(u) / (1.0 + e))
    return tl.where(z < 0, -capped, capped), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _expm1(x):
    """e^x - 1: within a half by its series, whose first term left out is 1e-8 of the sum."""
    series = 1.0
    for n in tl.static_range(8, 1, -1):
        series = 1.0 + x * series * (1.0 / n)
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)
