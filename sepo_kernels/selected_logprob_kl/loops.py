"""The loops over chunks that every implementation of selected_logprob_kl runs in.

With a, b the logits of policy and reference before the soft cap, p, q their softmax after it,
and l = log q - log p, the gradient of the policy's logits is

    dZ = -g_logp * (p - onehot(target)) * cap'(a) + g_kl * dKL/da * cap'(a)              (M, V)
    dKL(ref||policy)/da = p - q,    dKL(policy||ref)/da = -p * (l + KL)

Two terms with two incoming gradients for each row: forward keeps two (M, V) blocks from which
`combine` makes any columns of dZ, and backward goes over columns, so that dZ is a narrow buffer,
each part of dW is written once, and nothing kept is overwritten: a second backward is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepo_kernels import devices
from sepo_kernels.devices import accumulator
from sepo_kernels.gemm import add_product, add_rows, add_targets, product
from sepo_kernels.registry import Impl
from sepo_kernels.selected_logprob.loops import new_slope
from sepo_kernels.selected_logprob.schedule import parts
from sepo_kernels.selected_logprob_kl import schedule as plan


class RowKernels(NamedTuple):
    """One implementation: what is done to a chunk of rows.

    forward(x (chunk, D), weight (V, D), bias (V,) | None,
            ref_x (chunk, D_ref), ref_weight (V, D_ref), ref_bias (V,) | None,
            targets (chunk,), scale, softcap, direction, kept, logits)
            -> logp, ref_logp, kl, each (chunk,), state (chunk, num_state), accumulator's dtype
        kept: None, or (first, second), two (chunk, V) to be written: whatever combine needs
        logits: None if fused, else (z, ref_z), two (chunk, V) scratch in the accumulator's dtype;
        z is first, and ref_z second, where both are wanted and the dtypes agree
    again(... as forward ..., kept, logits, logp, ref_logp, kl, state) -> None
        writes kept once more, from what forward found
    combine(first, second, targets, start, logp, kl, state, grad_logp, grad_kl, direction, out)
        -> None
        out (chunk, columns), input's dtype: written with dZ in columns [start, start + columns),
        given these columns of first and second, (chunk, columns) each; grad_* (chunk,) in the
        accumulator's dtype. out is a view of a buffer; first and second stay as they are
    num_state: what combine wants to know of each row beside logp and kl
    fused(dtype) -> bool: no logits are written, and the blocks are stored with the rows as their
        fast dimension, out too: each is the transpose of a contiguous (V, chunk) or its columns.
        combine writes zero at the targets: each outweighs the rest of its row, and its part is
        added in float32. state[:, 0] is the target's logit
    second_dtype(dtype) -> torch.dtype of the second block; the first has the input's
    """

    forward: Callable
    again: Callable
    combine: Callable
    num_state: int
    fused: Callable[[torch.dtype], bool]
    second_dtype: Callable[[torch.dtype], torch.dtype]

    def layout(
        self, V: int, dtype: torch.dtype, multiprocessors: int = 0, D: int = 1
    ) -> plan.Layout:
        return plan.Layout(
            V, dtype, self.second_dtype(dtype), self.fused(dtype), multiprocessors, D
        )

    def layout_of(self, hidden: Tensor, weight: Tensor) -> plan.Layout:
        (V, D), gpu = weight.shape, devices.multiprocessors(hidden.device)
        return self.layout(V, hidden.dtype, gpu, D)


@dataclass(frozen=True)
class TwoHeads(Impl):
    kernels: RowKernels | None = None


def implementation(name: str, kernels: RowKernels, why_not: Callable) -> TwoHeads:
    """`kernels` in the loops, with the signature of the operators."""
    return TwoHeads(
        name, partial(fwd, kernels), partial(bwd, kernels), why_not, kernels.fused, kernels
    )


def fwd(
    kernels: RowKernels,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (N, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    scale: float,
    softcap: float | None,
    direction: str,
    schedule: str,
    budget: int,  # bytes
) -> tuple[Tensor, ...]:  # logp, ref_logp, kl, state, first, second: see outputs
    M, V = rows.shape[0], weight.shape[0]
    layout = kernels.layout_of(hidden, weight)
    saved = plan.saved_rows(M, layout, budget, schedule)
    found = outputs(kernels, hidden, weight, rows, schedule, saved)
    *statistics, first, second = found
    logp, _, kl, state = statistics
    step = plan.chunk_rows(M, layout, budget, schedule, backward=False)
    frozen = schedule == plan.FROZEN_HEAD
    buffers = _Buffers(hidden, min(step, M), layout, kept=frozen, saved=schedule == plan.SAVE)
    if frozen:
        columns = plan.made_gradient(M, layout, budget, schedule).columns
        buffer = new_slope(hidden, min(step, M), columns, layout.fused)
    for part in (*parts(0, saved, step), *parts(saved, M, step)):
        blocks = (first[part], second[part]) if part.start < saved else None
        kept, logits = buffers.of(part, blocks)
        x, ref_x = hidden.index_select(0, rows[part]), ref_hidden.index_select(0, rows[part])
        made = kernels.forward(
            x, weight, bias, ref_x, ref_weight, ref_bias, targets[part], scale, softcap, direction,
            kept, logits,
        )  # fmt: skip
        for whole, chunk in zip(statistics, made, strict=True):
            whole[part] = chunk
        if frozen:
            one, zero = torch.ones_like(logp[part]), torch.zeros_like(logp[part])
            row = targets[part], logp[part], kl[part], state[part]
            for c in parts(0, V, columns):
                dz = buffer[: part.stop - part.start, : c.stop - c.start]
                for total, *grads in ((first[part], one, zero), (second[part], zero, one)):
                    _combine(kernels, kept, row, c, *grads, direction, dz)
                    add_product(total, dz, weight[c])
            if layout.fused:
                of_row = [x[part] for x in statistics]
                for total, *grads in ((first[part], one, zero), (second[part], zero, one)):
                    entry = _at_target(*of_row, *grads, direction, softcap)
                    total += weight.index_select(0, targets[part]) * entry
    return found


def bwd(
    kernels: RowKernels,
    grad_logp: Tensor,  # (M,)
    grad_kl: Tensor,  # (M,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor | None,  # (N, D_ref), None unless recomputed
    ref_weight: Tensor | None,  # (V, D_ref), None unless recomputed
    ref_bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    logp: Tensor,  # (M,)
    ref_logp: Tensor,  # (M,)
    kl: Tensor,  # (M,)
    state: Tensor,  # (M, num_state)
    first: Tensor,  # see outputs
    second: Tensor,  # see outputs
    scale: float,
    softcap: float | None,
    direction: str,
    schedule: str,
    budget: int,  # bytes
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # (N, D), (V, D), (V,), in their input's dtype; (0,) if unneeded
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    M, V = rows.shape[0], weight.shape[0]
    # dZ / scale would round X once more in dW; so dZ has the scale, and db is freed of it
    grad_logp, grad_kl = grad_logp.to(acc) * scale, grad_kl.to(acc) * scale
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=acc)
    if schedule == plan.FROZEN_HEAD:
        add_rows(grad_hidden, rows, first * grad_logp[:, None] + second * grad_kl[:, None])
        return grad_hidden.to(dtype), weight.new_empty((0,)), weight.new_empty((0,))

    layout = kernels.layout_of(hidden, weight)
    saved = plan.saved_rows(M, layout, budget, schedule)
    step = plan.chunk_rows(M, layout, budget, schedule, backward=True)
    some = [*parts(0, saved, max(1, saved)), *parts(saved, M, step)]
    # one part of rows writes dW once, in the weight's dtype; more are summed in float32
    grad_weight = weight.new_empty(
        weight.shape if need_weight else (0,), dtype=acc if some[1:] else dtype
    )
    grad_bias = weight.new_zeros((V,) if need_bias else (0,), dtype=acc)
    buffers = buffer = None
    for part in some:
        x = hidden.index_select(0, rows[part])
        if part.start < saved:
            kept = first, second
            gradient = plan.saved_gradient(M, layout, budget, schedule)
            buffer = new_slope(hidden, *gradient, layout.fused)
        else:
            if buffers is None:
                buffer = dz = None  # the saved rows', which is not to be alive beside these
                gradient = plan.made_gradient(M, layout, budget, schedule)
                buffer = new_slope(hidden, *gradient, layout.fused)
                buffers = _Buffers(hidden, gradient.rows, layout, kept=True, saved=False)
            kept, logits = buffers.of(part, None)
            kernels.again(
                x, weight, bias, ref_hidden.index_select(0, rows[part]), ref_weight, ref_bias,
                targets[part], scale, softcap, direction, kept, logits,
                logp[part], ref_logp[part], kl[part], state[part],
            )  # fmt: skip
        row = targets[part], logp[part], kl[part], state[part]
        dx = x.new_zeros(x.shape if need_hidden else (0,), dtype=acc)
        ones = x.new_ones((x.shape[0], 1))
        for c in parts(0, V, gradient.columns):
            dz = buffer[: part.stop - part.start, : c.stop - c.start]
            _combine(kernels, kept, row, c, grad_logp[part], grad_kl[part], direction, dz)
            if need_hidden:
                add_product(dx, dz, weight[c])
            if need_weight and part.start == 0:
                product(dz.T, x, out=grad_weight[c])
            elif need_weight:
                add_product(grad_weight[c], dz.T, x)
            if need_bias:
                grad_bias[c] += product(dz.T, ones)[:, 0]
        if layout.fused:
            of_row = [x[part] for x in (logp, ref_logp, kl, state, grad_logp, grad_kl)]
            entry = _at_target(*of_row, direction, softcap)
            if need_hidden:
                dx += weight.index_select(0, targets[part]) * entry
            if need_weight:
                add_targets(grad_weight, targets[part], x * entry)
            if need_bias:
                grad_bias.index_add_(0, targets[part], entry[:, 0])
        if need_hidden:
            add_rows(grad_hidden, rows[part], dx)
    if not some:
        grad_weight.zero_()
    return grad_hidden.to(dtype), grad_weight.to(dtype), (grad_bias / scale).to(dtype)


def outputs(
    kernels: RowKernels,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,)
    schedule: str,
    saved: int,
) -> tuple[Tensor, ...]:
    """What fwd returns, empty: logp, ref_logp, kl (M,), state (M, num_state), first, second.

    first and second are (saved, V) blocks, or the two directions of dX, zeros (M, D), or (0,).
    """
    (M,), (V, D) = rows.shape, weight.shape
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    numbers = [hidden.new_empty((M,), dtype=acc) for _ in range(3)]
    state = hidden.new_empty((M, kernels.num_state), dtype=acc)
    if schedule in (plan.SAVE, plan.PARTIAL):
        fused, second = kernels.fused(dtype), kernels.second_dtype(dtype)
        blocks = new_slope(hidden, saved, V, fused), new_slope(hidden, saved, V, fused, second)
    elif schedule == plan.FROZEN_HEAD:
        blocks = hidden.new_zeros((M, D), dtype=acc), hidden.new_zeros((M, D), dtype=acc)
    else:
        blocks = hidden.new_empty((0,)), hidden.new_empty((0,))
    return *numbers, state, *blocks


class _Buffers:
    """Blocks of one chunk, used for every chunk in turn: two sets would be alive at a change."""

    def __init__(self, hidden, rows: int, layout: plan.Layout, kept: bool, saved: bool):
        acc, dtypes = accumulator(layout.dtype), (layout.dtype, layout.second)
        new = partial(new_slope, hidden, rows, layout.V, layout.fused)
        self.kept = [new(dtype) if kept else None for dtype in dtypes]
        shared = [(kept or saved) and dtype == acc for dtype in dtypes]
        self.logits = None if layout.fused else [None if s else new(acc) for s in shared]
        self.acc = acc

    def of(self, part: slice, saved) -> tuple:  # kept, logits, as forward takes them
        rows = part.stop - part.start
        kept = saved or [x if x is None else x[:rows] for x in self.kept]
        logits = self.logits
        if logits is not None:
            logits = tuple(
                k if k is not None and k.dtype == self.acc else z[:rows]
                for k, z in zip(kept, logits, strict=True)
            )
        return (None if kept[0] is None else tuple(kept)), logits


def _at_target(
    logp: Tensor,  # (chunk,)
    ref_logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, num_state), of which the first is the target's logit
    grad_logp: Tensor,  # (chunk,)
    grad_kl: Tensor,  # (chunk,)
    direction: str,
    softcap: float | None,
) -> Tensor:  # (chunk, 1)
    """dZ at each row's own target."""
    ratio = ref_logp - logp
    if direction == plan.REF_POLICY:  # p - q, from the larger of both
        larger = torch.maximum(logp, ref_logp).exp()
        of_kl = torch.copysign(larger, ratio) * ratio.abs().neg().expm1()
    else:
        of_kl = -logp.exp() * (ratio + kl)
    entry = grad_kl * of_kl - grad_logp * logp.expm1()
    if softcap is not None:
        entry = entry * (1 - (state[:, 0] / softcap) ** 2)
    return entry[:, None]


def _combine(kernels, kept, row, c: slice, grad_logp, grad_kl, direction, dz) -> None:
    first, second = kept
    targets, logp, kl, state = row
    kernels.combine(
        first[:, c], second[:, c], targets, c.start, logp, kl, state, grad_logp, grad_kl, direction,
        dz,
    )  # fmt: skip
