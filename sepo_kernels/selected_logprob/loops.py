"""The loops over chunks of rows that every implementation of selected_logprob runs in.

With z the logits before the soft cap and p their softmax, both directions need only

    slope = -dlogp/dz = (p - onehot(target)) * cap'(z)                      (M, V)

because dX = -g * (slope @ W) and dW = -slope.T @ (g * X): the incoming gradient g multiplies rows
of width D, never rows of width V. So nothing kept is overwritten, and a second backward is right.
An implementation may write slope / unit with a unit for each row, which g absorbs: a kernel that
sees the logits once does not know their sum yet. A fused one leaves out the targets' entries,
expm1(logp) * cap'(z): each outweighs the rest of its row, and its part is added in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepo_kernels import devices
from sepo_kernels.devices import accumulator, row_stride
from sepo_kernels.gemm import add_product, add_rows, add_targets, product
from sepo_kernels.registry import Impl
from sepo_kernels.selected_logprob import schedule as plan


class RowKernels(NamedTuple):
    """One implementation: what is done to a chunk of rows.

    forward(x (chunk, D), weight (V, D), bias (V,) | None, targets (chunk,), scale, softcap,
            slope (chunk, V) | None, logits (chunk, V) | None) -> logp, lse, unit, each (chunk,)
        writes slope / unit if asked for; `logits` is scratch in the accumulator's dtype, and is
        slope itself where the dtypes agree
    again(x, weight, bias, targets, scale, softcap, slope, logits, logp, lse) -> unit (chunk,)
        writes slope / unit once more, from what forward found
    fused(dtype) -> bool: the logits never leave the cache: no scratch, slope is stored with the
        rows as its fast dimension, and is zero at the targets
    """

    forward: Callable
    again: Callable
    fused: Callable[[torch.dtype], bool]


def implementation(name: str, kernels: RowKernels, why_not: Callable) -> Impl:
    """`kernels` in the loops, with the signature of the operators."""
    return Impl(name, partial(fwd, kernels), partial(bwd, kernels), why_not, kernels.fused)


def layout(hidden: Tensor, weight: Tensor, softcap: float | None, fused: bool) -> plan.Layout:
    V, D = weight.shape
    gpu = devices.multiprocessors(hidden.device)
    return plan.Layout(V, hidden.dtype, softcap is not None, fused, gpu, D)


def new_slope(
    like: Tensor, rows: int, V: int, fused: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """An empty (rows, V), in the order in which the implementation writes it.

    On a GPU the first V columns of rows that begin at cache lines; otherwise contiguous.
    """
    dtype = dtype or like.dtype
    if fused:
        return like.new_empty((V, rows), dtype=dtype).T
    stride = row_stride(V, dtype, devices.multiprocessors(like.device) > 0)
    block = like.new_empty((rows, stride), dtype=dtype)
    return block if stride == V else block.narrow(1, 0, V)


def fwd(
    kernels: RowKernels,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    scale: float,
    softcap: float | None,
    schedule: str,
    budget: int,  # bytes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logp, lse, unit (M,), kept: see new_kept
    dtype, acc, fused = hidden.dtype, accumulator(hidden.dtype), kernels.fused(hidden.dtype)
    M = rows.shape[0]
    logp = hidden.new_empty((M,), dtype=acc)
    lse, unit = torch.empty_like(logp), torch.empty_like(logp)
    sizes = layout(hidden, weight, softcap, fused)
    saved = plan.saved_rows(M, sizes, budget, schedule)
    kept = new_kept(hidden, schedule, M, saved, sizes)
    step = plan.chunk_rows(M, sizes, budget, schedule, backward=False)
    # one buffer for all chunks: two would be alive while the name is bound again
    narrow, wide = _buffers(hidden, min(step, M), sizes, schedule)
    for part in (*plan.parts(0, saved, step), *plan.parts(saved, M, step)):
        slope = kept[part] if part.start < saved else _first(narrow, part)
        shared = slope is not None and dtype == acc and not fused
        logits = slope if shared else _first(wide, part)
        x = hidden.index_select(0, rows[part])
        logp[part], lse[part], unit[part] = kernels.forward(
            x, weight, bias, targets[part], scale, softcap, slope, logits
        )
        if schedule == plan.FROZEN_HEAD:
            product(slope, weight, out=kept[part])
    return logp, lse, unit, kept


def bwd(
    kernels: RowKernels,
    grad_logp: Tensor,  # (M,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    logp: Tensor,  # (M,)
    lse: Tensor,  # (M,)
    unit: Tensor,  # (M,)
    kept: Tensor,  # see new_kept
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
    dtype, acc, fused = hidden.dtype, accumulator(hidden.dtype), kernels.fused(hidden.dtype)
    M = rows.shape[0]
    negative = -grad_logp.to(acc)[:, None]  # (M, 1)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=acc)
    at_target = negative * _at_target(logp, lse, softcap)[:, None] if fused else None  # (M, 1)
    if schedule == plan.FROZEN_HEAD:
        values = kept * (negative * unit[:, None] * scale)
        if fused:
            values += weight.index_select(0, targets) * (at_target * scale)
        add_rows(grad_hidden, rows, values)
        return grad_hidden.to(dtype), weight.new_empty((0,)), weight.new_empty((0,))

    sizes = layout(hidden, weight, softcap, fused)
    saved = plan.saved_rows(M, sizes, budget, schedule)
    step = plan.chunk_rows(M, sizes, budget, schedule, backward=True)
    some = [*plan.parts(0, saved, max(1, saved)), *plan.parts(saved, M, step)]
    # one product is written once, in the weight's dtype; more are summed in float32
    grad_weight = weight.new_empty(
        weight.shape if need_weight else (0,), dtype=acc if some[1:] else dtype
    )
    grad_bias = weight.new_zeros(weight.shape[:1] if need_bias else (0,), dtype=acc)
    narrow, wide = _buffers(hidden, min(step, M - saved), sizes, schedule, backward=True)
    for part in some:
        x = hidden.index_select(0, rows[part])
        if part.start < saved:
            slope, units = kept, unit[part]
        else:
            slope = _first(narrow, part)
            logits = slope if wide is None and not fused else _first(wide, part)
            units = kernels.again(
                x, weight, bias, targets[part], scale, softcap, slope, logits, logp[part], lse[part]
            )
        factor = negative[part] * units[:, None]  # (chunk, 1)
        if need_hidden:
            values = product(slope, weight) * (factor * scale)
            if fused:
                values += weight.index_select(0, targets[part]) * (at_target[part] * scale)
            add_rows(grad_hidden, rows[part], values)
        if need_weight:
            scaled = (x * (factor * scale)).to(dtype)  # (chunk, D)
            if part.start == 0:
                product(slope.T, scaled, out=grad_weight)
            else:
                add_product(grad_weight, slope.T, scaled)
        if need_bias:
            grad_bias += product(slope.T, factor.to(dtype))[:, 0]
    if not some:
        grad_weight.zero_()
    if fused and need_weight:
        add_targets(grad_weight, targets, hidden.index_select(0, rows) * (at_target * scale))
    if fused and need_bias:
        grad_bias.index_add_(0, targets, at_target[:, 0])
    return grad_hidden.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)


def _at_target(logp: Tensor, lse: Tensor, softcap: float | None) -> Tensor:
    """The slope (M,) at each row's own target, in the accumulator's dtype."""
    slope = logp.expm1()
    return slope if softcap is None else slope * (1 - ((logp + lse) / softcap) ** 2)


def new_kept(hidden: Tensor, schedule: str, M: int, saved: int, sizes: plan.Layout) -> Tensor:
    """What the forward keeps for the backward, empty: slope, its product with the weight, or (0,)."""
    if schedule in (plan.SAVE, plan.PARTIAL):
        return new_slope(hidden, saved, sizes.V, sizes.fused)
    return hidden.new_empty((M, sizes.D) if schedule == plan.FROZEN_HEAD else (0,))


def _buffers(hidden, rows, sizes, schedule, backward=False) -> tuple[Tensor | None, ...]:
    """(rows, V) in the input's dtype for the slope and in the accumulator's for the logits.

    None where `kept` has the slope, where the logits may be written into it, or are never written.
    """
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    saved = schedule == plan.SAVE
    made = schedule == plan.FROZEN_HEAD or (backward and not saved)  # slopes that are not kept
    narrow = new_slope(hidden, rows, sizes.V, sizes.fused) if made else None
    wide = None
    if not sizes.fused and not (backward and saved) and (dtype != acc or not (made or saved)):
        wide = new_slope(hidden, rows, sizes.V, False, acc)
    return narrow, wide


def _first(buffer: Tensor | None, part: slice) -> Tensor | None:
    return None if buffer is None else buffer[: part.stop - part.start]
