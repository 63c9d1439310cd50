"""selected_logprob in chunks of rows: library matrix products, and passes over one buffer.

With z the logits before the soft cap and p their softmax, both directions need only

    slope = -dlogp/dz = (p - onehot(target)) * cap'(z)                      (M, V)

because dX = -g * (slope @ W) and dW = -slope.T @ (g * X): the incoming gradient g multiplies rows
of width D, never rows of width V. So nothing kept is overwritten, and a second backward is right.
The target's entry is expm1(logp), not p - 1: a confident row keeps its relative precision when
slope is rounded to bfloat16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sepo_kernels.platform import accumulator
from sepo_kernels.selected_logprob import schedule as plan

WEIGHT_TILE_BYTES = 32 << 20  # of weight cast to float32 at once, where the GEMM cannot widen


def fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    scale: float,
    softcap: float | None,
    schedule: str,
    budget: int,  # bytes
) -> tuple[Tensor, Tensor, Tensor]:  # logp (M,), lse (M,), kept: see schedule.kept_shape
    acc = accumulator(hidden.dtype)
    (M,), (V, D) = rows.shape, weight.shape
    logp = hidden.new_empty((M,), dtype=acc)
    lse = torch.empty_like(logp)
    kept = hidden.new_empty(plan.kept_shape(schedule, M, V, D))
    in_place = schedule == plan.SAVE and hidden.dtype == acc
    slope = schedule in (plan.SAVE, plan.FROZEN_HEAD)
    step = plan.chunk_rows(M, V, hidden.dtype, softcap is not None, budget, schedule, False)
    # one buffer for all chunks: two would be alive while the name is bound again
    buffer = kept if in_place else hidden.new_empty((min(step, M), V), dtype=acc)
    for start in range(0, M, step):
        part = slice(start, min(start + step, M))
        z = buffer[part] if in_place else buffer[: part.stop - start]  # (chunk, V)
        _logits(z, hidden.index_select(0, rows[part]), weight, bias, scale)
        logp[part], lse[part] = _normalise(z, targets[part], softcap, slope)
        if schedule == plan.SAVE and not in_place:
            kept[part] = z
        elif schedule == plan.FROZEN_HEAD:
            torch.mm(z.to(hidden.dtype), weight, out=kept[part])
    return logp, lse, kept


def bwd(
    grad_logp: Tensor,  # (M,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    logp: Tensor,  # (M,)
    lse: Tensor,  # (M,)
    kept: Tensor,  # see schedule.kept_shape
    scale: float,
    softcap: float | None,
    schedule: str,
    budget: int,  # bytes
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # (N, D), (V, D), (V,), in their input's dtype; (0,) if unneeded
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    (M,), V = rows.shape, weight.shape[0]
    negative = -grad_logp.to(acc)[:, None]  # (M, 1)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=acc)
    if schedule == plan.FROZEN_HEAD:
        _add_rows(grad_hidden, rows, kept * (negative * scale))
        return grad_hidden.to(dtype), weight.new_empty((0,)), weight.new_empty((0,))

    step = plan.chunk_rows(M, V, dtype, softcap is not None, budget, schedule, True)
    # one chunk: the product is written once, in the weight's dtype; else summed in float32
    wide = dtype if step >= M else acc
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=wide)
    grad_bias = weight.new_zeros((V,) if need_bias else (0,), dtype=acc)
    if schedule == plan.SAVE:
        slopes = iter([(slice(0, M), kept)])
    else:
        slopes = _recompute(hidden, weight, bias, rows, targets, logp, lse, scale, softcap, step)
    for part, slope in slopes:  # slope (chunk, V), the input's dtype
        factor = negative[part] * scale
        if need_hidden:
            _add_rows(grad_hidden, rows[part], (slope @ weight) * factor)
        if need_weight:
            scaled = (hidden.index_select(0, rows[part]) * factor).to(dtype)  # (chunk, D)
            if wide == dtype:
                grad_weight.addmm_(slope.T, scaled)
            else:
                grad_weight += slope.T @ scaled
        if need_bias:
            grad_bias += (slope.T @ negative[part].to(dtype))[:, 0]
    return grad_hidden.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)


def _logits(
    out: Tensor,  # (chunk, V) accumulator dtype, written
    gathered: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    scale: float,
) -> None:
    """Logits before the soft cap. Never rounded to the input's dtype: bfloat16 costs 1e-2 nats."""
    V, D = weight.shape
    if gathered.dtype == out.dtype:
        torch.mm(gathered, weight.T, out=out)
    elif out.is_cuda:
        torch.mm(gathered, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = gathered.to(out.dtype)
        tile = max(1, WEIGHT_TILE_BYTES // (out.itemsize * D))
        for v in range(0, V, tile):
            torch.mm(wide, weight[v : v + tile].to(out.dtype).T, out=out[:, v : v + tile])
    if scale != 1.0:
        out *= scale
    if bias is not None:
        out += bias


def _normalise(
    z: Tensor,  # (chunk, V) logits before the cap; on return the slope if asked for, else scratch
    targets: Tensor,  # (chunk,)
    softcap: float | None,
    slope: bool,
) -> tuple[Tensor, Tensor]:  # logp (chunk,), lse (chunk,)
    derivative = _cap(z, softcap, slope)
    at = targets[:, None]
    top = z.amax(-1, keepdim=True)
    target = z.gather(-1, at) - top
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    log_total = total.log()
    logp = target - log_total
    if slope:
        _slope(z.div_(total), at, logp, derivative)
    return logp[:, 0], (top + log_total)[:, 0]


def _recompute(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,)
    targets: Tensor,  # (M,)
    logp: Tensor,  # (M,)
    lse: Tensor,  # (M,)
    scale: float,
    softcap: float | None,
    step: int,
) -> Iterator[tuple[slice, Tensor]]:  # part of M, slope (chunk, V) in the input's dtype
    (M,), V = rows.shape, weight.shape[0]
    buffer = hidden.new_empty((min(step, M), V), dtype=lse.dtype)
    narrow = buffer if hidden.dtype == lse.dtype else hidden.new_empty(buffer.shape)
    for start in range(0, M, step):
        part = slice(start, min(start + step, M))
        z = buffer[: part.stop - start]
        _logits(z, hidden.index_select(0, rows[part]), weight, bias, scale)
        derivative = _cap(z, softcap, True)
        z.sub_(lse[part, None]).exp_()
        _slope(z, targets[part, None], logp[part, None], derivative)
        if narrow is not buffer:
            narrow[: len(z)] = z
        yield part, narrow[: len(z)]


def _cap(z: Tensor, softcap: float | None, slope: bool) -> Tensor | None:
    """Cap `z` (chunk, V) in place; return the cap's derivative there where `slope` needs it."""
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    derivative = (z * z).neg_().add_(1) if slope else None
    z.mul_(softcap)
    return derivative


def _slope(
    p: Tensor,  # (chunk, V) probabilities; becomes -dlogp/dz
    targets: Tensor,  # (chunk, 1)
    logp: Tensor,  # (chunk, 1)
    derivative: Tensor | None,  # (chunk, V)
) -> None:
    p.scatter_(-1, targets, logp.expm1())
    if derivative is not None:
        p.mul_(derivative)


def _add_rows(
    total: Tensor,  # (N, D), added to
    rows: Tensor,  # (M,) may repeat: their terms are added, in a fixed order
    values: Tensor,  # (M, D)
) -> None:
    if total.is_cuda:
        # sorts the indices; index_add_ would use float atomics, in another order every time
        total.index_put_((rows.long(),), values, accumulate=True)
    else:
        total.index_add_(0, rows, values)
