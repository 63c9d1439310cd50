"""The loops over chunks of rows that every implementation of selected_logprob runs in.

With z the logits before the soft cap and p their softmax, both directions need only

    dlogits = -dlogp/dz = (p - onehot(target)) * cap'(z)                      (M, V)

because dX = -g * (dlogits @ W) and dW = -dlogits.T @ (g * X): the incoming gradient g multiplies
rows of width D, never rows of width V. So nothing saved is overwritten, and a second backward is
right. An implementation may write dlogits / row_scale, with one number a row, which g absorbs: a
kernel that sees the logits once does not know their sum yet. A fused one leaves out the targets'
entries, expm1(logp) * cap'(z): each outweighs the rest of its row, and its part is added in
float32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sepo_kernels import devices, schedules
from sepo_kernels.devices import accumulator, row_stride
from sepo_kernels.gemm import add_gemm, add_rows, add_targets, gemm
from sepo_kernels.registry import Impl
from sepo_kernels.scales import Scale, as_column, of_part
from sepo_kernels.selected_logprob.layout import HeadLayout


class LogitKernels(NamedTuple):
    """One implementation: how it computes a chunk of rows.

    forward(x (chunk, D), weight (V, D), bias (V,) | None, targets (chunk,), scale, softcap,
            dlogits (chunk, V) | None, logits (chunk, V) | None)
            -> logp, lse, row_scale, each (chunk,)
        writes dlogits / row_scale if asked for; `logits` is scratch in the accumulator's dtype, and
        is dlogits itself where the dtypes agree
        scale: a number, or (chunk,), one a row
    recompute(x, weight, bias, targets, scale, softcap, dlogits, logits, logp, lse)
            -> row_scale (chunk,)
        writes dlogits / row_scale a second time, given what forward returned
    fused(dtype) -> bool: the logits never leave the cache: no scratch, dlogits is stored with the
        rows as its fast dimension, and is zero at the targets
    numbers: how many `forward` returns of each row
    fused_sums: how many a fused one keeps of each row and group of columns
    """

    forward: Callable[..., tuple[Tensor, ...]]
    recompute: Callable[..., Tensor]
    fused: Callable[[torch.dtype], bool]
    numbers: int = 3
    fused_sums: int = 1


class Forward(Protocol):
    """What `fwd` asks of an implementation: of LogitKernels, or of another with more numbers a row.

    Beside logp, lse and row_scale, which come first.
    """

    @property
    def forward(self) -> Callable[..., tuple[Tensor, ...]]: ...
    @property
    def fused(self) -> Callable[[torch.dtype], bool]: ...
    @property
    def numbers(self) -> int: ...
    @property
    def fused_sums(self) -> int: ...


def implementation(name: str, kernels: LogitKernels, why_not: Callable[..., str | None]) -> Impl:
    """Put `kernels` into the loops, with the signature of the operators."""
    return Impl(name, partial(fwd, kernels), partial(bwd, kernels), why_not, kernels.fused)


def layout_of(
    hidden: Tensor, weight: Tensor, softcap: float | None, fused: bool, fused_sums: int = 1
) -> HeadLayout:
    V, D = weight.shape
    gpu = devices.multiprocessors(hidden.device)
    return HeadLayout(V, hidden.dtype, softcap is not None, fused, gpu, D, fused_sums)


def new_block(
    like: Tensor, rows: int, V: int, fused: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Return an empty (rows, V), in the order in which the implementation writes it.

    On a GPU it is the first V columns of rows that begin at cache lines; otherwise contiguous.
    """
    dtype = dtype or like.dtype
    if fused:
        return like.new_empty((V, rows), dtype=dtype).T
    stride = row_stride(V, dtype, devices.multiprocessors(like.device) > 0)
    block = like.new_empty((rows, stride), dtype=dtype)
    return block if stride == V else block.narrow(1, 0, V)


def fwd(
    kernels: Forward,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    scale: Scale,
    softcap: float | None,
    schedule: str,
    budget: int,  # bytes
    *,
    scales: Tensor | None = None,  # (M,) in the place of scale
) -> tuple[Tensor, ...]:  # logp, lse, row_scale (M,), ..., saved: see new_saved
    dtype, acc, fused = hidden.dtype, accumulator(hidden.dtype), kernels.fused(hidden.dtype)
    M = rows.shape[0]
    scale = scale if scales is None else scales
    results = [hidden.new_empty((M,), dtype=acc) for _ in range(kernels.numbers)]
    layout = layout_of(hidden, weight, softcap, fused, kernels.fused_sums)
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    saved = new_saved(hidden, schedule, M, num_saved, layout)
    step = schedules.chunk_rows(M, layout, budget, schedule, backward=False)
    # one buffer for all chunks: with a new one for each, two would be alive at a change
    narrow, wide = _buffers(hidden, min(step, M), layout, schedule)
    for part in (*schedules.parts(0, num_saved, step), *schedules.parts(num_saved, M, step)):
        dlogits = saved[part] if part.start < num_saved else _first(narrow, part)
        shared = dlogits is not None and dtype == acc and not fused
        logits = dlogits if shared else _first(wide, part)
        x = hidden.index_select(0, rows[part])
        values = kernels.forward(
            x, weight, bias, targets[part], of_part(scale, part), softcap, dlogits, logits
        )
        for whole, chunk in zip(results, values, strict=True):
            whole[part] = chunk
        if schedule == schedules.FROZEN_HEAD and dlogits is not None:
            gemm(dlogits, weight, out=saved[part])
    return *results, saved


def bwd(
    kernels: LogitKernels,
    grad_logp: Tensor,  # (M,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    logp: Tensor,  # (M,)
    lse: Tensor,  # (M,)
    row_scale: Tensor,  # (M,)
    saved: Tensor,  # see new_saved
    scale: Scale,
    softcap: float | None,
    schedule: str,
    budget: int,  # bytes
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    scales: Tensor | None = None,  # (M,) in the place of scale
) -> tuple[
    Tensor, Tensor, Tensor
]:  # (N, D), (V, D), (V,), in their input's dtype; (0,) if unneeded
    dtype, acc, fused = hidden.dtype, accumulator(hidden.dtype), kernels.fused(hidden.dtype)
    M = rows.shape[0]
    scale = scale if scales is None else scales
    negative = -grad_logp.to(acc)[:, None]  # (M, 1)
    factors = as_column(scale)  # a number, or (M, 1)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=acc)
    at_target = negative * _dlogits_at_target(logp, lse, softcap)[:, None] if fused else None
    scaled_at_target = None if at_target is None else at_target * factors
    if schedule == schedules.FROZEN_HEAD:
        values = saved * (negative * row_scale[:, None] * factors)
        if scaled_at_target is not None:
            values += weight.index_select(0, targets) * scaled_at_target
        add_rows(grad_hidden, rows, values)
        return grad_hidden.to(dtype), weight.new_empty((0,)), weight.new_empty((0,))

    layout = layout_of(hidden, weight, softcap, fused)
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    step = schedules.chunk_rows(M, layout, budget, schedule, backward=True)
    chunks = [
        *schedules.parts(0, num_saved, max(1, num_saved)),
        *schedules.parts(num_saved, M, step),
    ]
    # one GEMM is written once, in the weight's dtype; more are summed in float32
    grad_weight = weight.new_empty(
        weight.shape if need_weight else (0,), dtype=acc if chunks[1:] else dtype
    )
    grad_bias = weight.new_zeros(weight.shape[:1] if need_bias else (0,), dtype=acc)
    narrow, wide = _buffers(hidden, min(step, M - num_saved), layout, schedule, backward=True)
    for part in chunks:
        x = hidden.index_select(0, rows[part])
        if part.start < num_saved:
            dlogits, factor = saved, row_scale[part]
        else:
            assert narrow is not None
            dlogits = narrow[: part.stop - part.start]
            logits = dlogits if wide is None and not fused else _first(wide, part)
            factor = kernels.recompute(
                x, weight, bias, targets[part], of_part(scale, part), softcap, dlogits,
                logits, logp[part], lse[part],
            )  # fmt: skip
        factor = negative[part] * factor[:, None]  # (chunk, 1)
        scaled_factor = factor * of_part(factors, part)
        if need_hidden:
            values = gemm(dlogits, weight) * scaled_factor
            if scaled_at_target is not None:
                values += weight.index_select(0, targets[part]) * scaled_at_target[part]
            add_rows(grad_hidden, rows[part], values)
        if need_weight:
            scaled = (x * scaled_factor).to(dtype)  # (chunk, D)
            if part.start == 0:
                gemm(dlogits.T, scaled, out=grad_weight)
            else:
                add_gemm(grad_weight, dlogits.T, scaled)
        if need_bias:
            grad_bias += gemm(dlogits.T, factor.to(dtype))[:, 0]
    if not chunks:
        grad_weight.zero_()
    if scaled_at_target is not None and need_weight:
        add_targets(grad_weight, targets, hidden.index_select(0, rows) * scaled_at_target)
    if at_target is not None and need_bias:
        grad_bias.index_add_(0, targets, at_target[:, 0])
    return grad_hidden.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)


def _dlogits_at_target(
    logp: Tensor,  # (M,)
    lse: Tensor,  # (M,)
    softcap: float | None,
) -> Tensor:  # (M,) accumulator dtype
    """Return dlogits at each row's own target."""
    entry = logp.expm1()
    return entry if softcap is None else entry * (1 - ((logp + lse) / softcap) ** 2)


def new_saved(hidden: Tensor, schedule: str, M: int, num_saved: int, layout: HeadLayout) -> Tensor:
    """Return what the forward saves for the backward, empty.

    It is dlogits (num_saved, V), or dlogits @ weight (M, D) of a frozen head, or (0,).
    """
    if schedule in (schedules.SAVE, schedules.PARTIAL):
        return new_block(hidden, num_saved, layout.V, layout.fused)
    return hidden.new_empty((M, layout.D) if schedule == schedules.FROZEN_HEAD else (0,))


def _buffers(
    hidden: Tensor, rows: int, layout: HeadLayout, schedule: str, backward: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return (rows, V) in the input's dtype for dlogits, in the accumulator's for the logits.

    None where dlogits is what is saved; where the logits may be written into it, or never are.
    """
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    saves = schedule == schedules.SAVE
    scratch = schedule == schedules.FROZEN_HEAD or (backward and not saves)  # dlogits are not saved
    narrow = new_block(hidden, rows, layout.V, layout.fused) if scratch else None
    wide = None
    if not layout.fused and not (backward and saves) and (dtype != acc or not (scratch or saves)):
        wide = new_block(hidden, rows, layout.V, False, acc)
    return narrow, wide


def _first(buffer: Tensor | None, part: slice) -> Tensor | None:
    return None if buffer is None else buffer[: part.stop - part.start]
