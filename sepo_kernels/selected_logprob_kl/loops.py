"""The loops over chunks that every implementation of selected_logprob_kl runs in.

With a, b the logits of policy and reference before the soft cap, p, q their softmax after it,
and l = log q - log p, the gradient of the policy's logits is

    dZ = -g_logp * (p - onehot(target)) * cap'(a) + g_kl * dKL/da * cap'(a)              (M, V)
    dKL(ref||policy)/da = p - q,    dKL(policy||ref)/da = -p * (l + KL),
    dJSD/da = (1 - beta) * p * (log(p / m) - KL(p||m)),    p / m = 1 / ((1 - beta) + beta e^l)

Two terms with two incoming gradients for each row: forward saves two (M, V) blocks from which
`combine` computes any columns of dZ. Backward goes over columns, so that dZ is a narrow buffer,
each part of dW is written once, and nothing saved is overwritten: a second backward is right.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepo_kernels import devices, schedules
from sepo_kernels.devices import accumulator
from sepo_kernels.gemm import add_gemm, add_rows
from sepo_kernels.gradients import HeadGradients
from sepo_kernels.registry import Impl
from sepo_kernels.scales import Scale, of_part
from sepo_kernels.schedules import parts
from sepo_kernels.selected_logprob.loops import new_block
from sepo_kernels.selected_logprob_kl.layout import (
    REF_POLICY,
    TwoHeadLayout,
    chunk_gradient,
    saved_gradient,
)

Pair = tuple[Tensor, Tensor]  # of the policy and of the reference, or the first and second block


class LogitKernels(NamedTuple):
    """One implementation: how it computes a chunk of rows.

    forward(x (chunk, D), weight (V, D), bias (V,) | None,
            ref_x (chunk, D_ref), ref_weight (V, D_ref), ref_bias (V,) | None,
            targets (chunk,), scale, softcap, ref_scale, ref_softcap, beta, blocks, logits)
            -> logp, ref_logp, kl, each (chunk,), state (chunk, num_state), accumulator's dtype
        blocks: None, or (first, second), two (chunk, V) to be written: whatever combine needs
        logits: None if fused, else (z, ref_z), two (chunk, V) scratch in the accumulator's dtype;
        z is first, and ref_z second, where both are wanted and the dtypes agree
    recompute(... as forward ..., blocks, logits, logp, ref_logp, kl, state) -> None
        writes blocks a second time, given what forward returned
    combine(first, second, targets, start, logp, kl, state, grad_logp, grad_kl, beta, out)
        -> None
        out (chunk, columns), input's dtype: written with dZ in columns [start, start + columns),
        given these columns of first and second, (chunk, columns) each; grad_* (chunk,) in the
        accumulator's dtype. out is a view of a buffer; first and second stay as they are
    num_state: how many numbers a row `combine` reads beside logp and kl
    fused(dtype, beta) -> bool: no logits are written, and the blocks are stored with the rows as
        their fast dimension, out too: each is the transpose of a contiguous (V, chunk) or its
        columns. combine writes zero at the targets: each outweighs the rest of its row, and its
        part is added in float32. state[:, 0] is the target's logit
    second_dtype(dtype, beta) -> torch.dtype of the second block; the first has the input's
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    recompute: Callable[..., None]
    combine: Callable[..., None]
    num_state: int
    fused: Callable[[torch.dtype, float], bool]
    second_dtype: Callable[[torch.dtype, float], torch.dtype]

    def layout(
        self, V: int, dtype: torch.dtype, beta: float, multiprocessors: int = 0, D: int = 1
    ) -> TwoHeadLayout:
        second, fused = self.second_dtype(dtype, beta), self.fused(dtype, beta)
        return TwoHeadLayout(V, dtype, second, fused, multiprocessors, D)

    def layout_of(self, hidden: Tensor, weight: Tensor, beta: float) -> TwoHeadLayout:
        (V, D), gpu = weight.shape, devices.multiprocessors(hidden.device)
        return self.layout(V, hidden.dtype, beta, gpu, D)


@dataclass(frozen=True, kw_only=True)
class TwoHeads(Impl):
    kernels: LogitKernels


def implementation(
    name: str, kernels: LogitKernels, why_not: Callable[..., str | None]
) -> TwoHeads:
    """Put `kernels` into the loops, with the signature of the operators."""
    fused = lambda dtype: kernels.fused(dtype, REF_POLICY)
    return TwoHeads(
        name, partial(fwd, kernels), partial(bwd, kernels), why_not, fused, kernels=kernels
    )


def fwd(
    kernels: LogitKernels,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (N, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale | None,  # None: the policy's
    ref_softcap: float | None,
    beta: float,
    schedule: str,
    budget: int,  # bytes
    *,
    scales: Tensor | None = None,  # (M,) in the place of scale
    ref_scales: Tensor | None = None,  # (M,) in the place of ref_scale
) -> tuple[Tensor, ...]:  # logp, ref_logp, kl, state, first, second: see outputs
    M = rows.shape[0]
    scale = scale if scales is None else scales
    ref_scale = _of_reference(scale, ref_scale, ref_scales)
    layout = kernels.layout_of(hidden, weight, beta)
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    results = outputs(kernels, hidden, weight, rows, beta, schedule, num_saved)
    *statistics, first, second = results
    logp, ref_logp, kl, state = statistics
    step = schedules.chunk_rows(M, layout, budget, schedule, backward=False)
    frozen = schedule == schedules.FROZEN_HEAD
    buffers = _Buffers(
        hidden, min(step, M), layout, blocks=frozen, saved=schedule == schedules.SAVE
    )
    if frozen:
        width = chunk_gradient(M, layout, budget, schedule).columns
        buffer = new_block(hidden, min(step, M), width, layout.fused)
    for part in (*parts(0, num_saved, step), *parts(num_saved, M, step)):
        saved = (first[part], second[part]) if part.start < num_saved else None
        blocks, logits = buffers.of(part, saved)
        x, ref_x = hidden.index_select(0, rows[part]), ref_hidden.index_select(0, rows[part])
        values = kernels.forward(
            x, weight, bias, ref_x, ref_weight, ref_bias, targets[part], of_part(scale, part),
            softcap, of_part(ref_scale, part), ref_softcap, beta, blocks, logits,
        )  # fmt: skip
        for whole, chunk in zip(statistics, values, strict=True):
            whole[part] = chunk
        if frozen and blocks is not None:
            ones, zeros = torch.ones_like(logp[part]), torch.zeros_like(logp[part])
            # the directions of dX, with the gradients of logp and kl that give them
            directions = ((first[part], ones, zeros), (second[part], zeros, ones))
            for total, of_logp, of_kl in directions:
                of_rows = logp[part], kl[part], state[part], of_logp, of_kl
                columns = _columns(kernels, blocks, targets[part], *of_rows, beta, buffer[: len(x)])
                for c, dz in columns:
                    add_gemm(total, dz, weight[c])
                if layout.fused:
                    entry = _dz_at_target(ref_logp[part], *of_rows, beta, softcap)
                    total += weight.index_select(0, targets[part]) * entry
    return results


def bwd(
    kernels: LogitKernels,
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
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale | None,  # None: the policy's
    ref_softcap: float | None,
    beta: float,
    schedule: str,
    budget: int,  # bytes
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    scales: Tensor | None = None,  # (M,) in the place of scale
    ref_scales: Tensor | None = None,  # (M,) in the place of ref_scale
) -> tuple[
    Tensor, Tensor, Tensor
]:  # (N, D), (V, D), (V,), in their input's dtype; (0,) if unneeded
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    M = rows.shape[0]
    scale = scale if scales is None else scales
    ref_scale = _of_reference(scale, ref_scale, ref_scales)
    # dZ / scale would round X once more in dW; so dZ has the scale, and db is freed of it
    grad_logp, grad_kl = grad_logp.to(acc) * scale, grad_kl.to(acc) * scale
    if schedule == schedules.FROZEN_HEAD:
        grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=acc)
        add_rows(grad_hidden, rows, first * grad_logp[:, None] + second * grad_kl[:, None])
        return grad_hidden.to(dtype), weight.new_empty((0,)), weight.new_empty((0,))

    layout = kernels.layout_of(hidden, weight, beta)
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    step = schedules.chunk_rows(M, layout, budget, schedule, backward=True)
    chunks = [*parts(0, num_saved, max(1, num_saved)), *parts(num_saved, M, step)]
    total = HeadGradients(hidden, weight, scale, (need_hidden, need_weight, need_bias), len(chunks))
    buffers: _Buffers | None = None
    buffer: Tensor | None = None
    for part in chunks:
        x = hidden.index_select(0, rows[part])
        if part.start < num_saved:
            blocks: Pair | None = (first, second)
            gradient = saved_gradient(M, layout, budget, schedule)
            buffer = new_block(hidden, *gradient, layout.fused)
        else:
            if buffers is None:
                buffer = None  # free the saved rows' before these are allocated
                gradient = chunk_gradient(M, layout, budget, schedule)
                buffer = new_block(hidden, *gradient, layout.fused)
                buffers = _Buffers(hidden, gradient.rows, layout, blocks=True, saved=False)
            blocks, logits = buffers.of(part, None)
            assert ref_hidden is not None
            kernels.recompute(
                x, weight, bias, ref_hidden.index_select(0, rows[part]), ref_weight, ref_bias,
                targets[part], of_part(scale, part), softcap, of_part(ref_scale, part), ref_softcap,
                beta, blocks, logits,
                logp[part], ref_logp[part], kl[part], state[part],
            )  # fmt: skip
        assert buffer is not None and blocks is not None
        of_rows = logp[part], kl[part], state[part], grad_logp[part], grad_kl[part]
        columns = _columns(kernels, blocks, targets[part], *of_rows, beta, buffer[: len(x)])
        entry = None
        if layout.fused:
            entry = _dz_at_target(ref_logp[part], *of_rows, beta, softcap)
        total.add(part, rows[part], x, columns, targets[part], entry)
    return total.results()


def outputs(
    kernels: LogitKernels,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,)
    beta: float,
    schedule: str,
    num_saved: int,
) -> tuple[Tensor, ...]:
    """Return what fwd fills: logp, ref_logp, kl (M,), state (M, num_state), first, second.

    first and second are (num_saved, V) blocks, or the two directions of dX, zeros (M, D), or (0,).
    """
    (M,), (V, D) = rows.shape, weight.shape
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    numbers = [hidden.new_empty((M,), dtype=acc) for _ in range(3)]
    state = hidden.new_empty((M, kernels.num_state), dtype=acc)
    if schedule in (schedules.SAVE, schedules.PARTIAL):
        fused, second = kernels.fused(dtype, beta), kernels.second_dtype(dtype, beta)
        new = partial(new_block, hidden, num_saved, V, fused)
        saved = new(), new(second)
    elif schedule == schedules.FROZEN_HEAD:
        saved = hidden.new_zeros((M, D), dtype=acc), hidden.new_zeros((M, D), dtype=acc)
    else:
        saved = hidden.new_empty((0,)), hidden.new_empty((0,))
    return *numbers, state, *saved


class _Buffers:
    """Blocks of one chunk, used for every chunk in turn: two sets would be alive at a change."""

    def __init__(
        self, hidden: Tensor, rows: int, layout: TwoHeadLayout, *, blocks: bool, saved: bool
    ) -> None:
        acc, dtypes = accumulator(layout.dtype), (layout.dtype, layout.second)
        new = partial(new_block, hidden, rows, layout.V, layout.fused)
        self.blocks = (new(layout.dtype), new(layout.second)) if blocks else None
        # None: fused, or the logits are written into the block
        unwanted = [layout.fused or ((blocks or saved) and dtype == acc) for dtype in dtypes]
        self.logits = [None if none else new(acc) for none in unwanted]
        self.acc, self.fused = acc, layout.fused

    def of(self, part: slice, saved: Pair | None) -> tuple[Pair | None, Pair | None]:
        """Return blocks and logits as `forward` takes them, the blocks in `saved` if given."""
        rows = part.stop - part.start
        blocks = saved
        if blocks is None and self.blocks is not None:
            blocks = self.blocks[0][:rows], self.blocks[1][:rows]
        if self.fused:
            return blocks, None
        first, second = blocks or (None, None)
        z, ref_z = self.logits
        return blocks, (self._logits(first, z, rows), self._logits(second, ref_z, rows))

    def _logits(self, block: Tensor | None, buffer: Tensor | None, rows: int) -> Tensor:
        if block is not None and block.dtype == self.acc:
            return block
        assert buffer is not None
        return buffer[:rows]


def _of_reference(scale: Scale, ref_scale: Scale | None, ref_scales: Tensor | None) -> Scale:
    """Return the reference's scale: its own, or else the policy's."""
    if ref_scales is not None:
        return ref_scales
    return scale if ref_scale is None else ref_scale


def _dz_at_target(
    ref_logp: Tensor,  # (chunk,)
    logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, num_state), of which the first is the target's logit
    grad_logp: Tensor,  # (chunk,)
    grad_kl: Tensor,  # (chunk,)
    beta: float,
    softcap: float | None,
) -> Tensor:  # (chunk, 1)
    """Return dZ at each row's own target."""
    ratio = ref_logp - logp
    if beta == REF_POLICY:  # p - q, from the larger of both
        larger = torch.maximum(logp, ref_logp).exp()
        dkl = torch.copysign(larger, ratio) * ratio.abs().neg().expm1()
    else:
        dkl = -logp.exp() * (ratio + kl)
    entry = grad_kl * dkl - grad_logp * logp.expm1()
    if softcap is not None:
        entry = entry * (1 - (state[:, 0] / softcap) ** 2)
    return entry[:, None]


def _columns(
    kernels: LogitKernels,
    blocks: Pair,  # (chunk, V) each
    targets: Tensor,  # (chunk,)
    logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, num_state)
    grad_logp: Tensor,  # (chunk,)
    grad_kl: Tensor,  # (chunk,)
    beta: float,
    buffer: Tensor,  # (chunk, columns at a time)
) -> Iterator[tuple[slice, Tensor]]:
    """Yield all columns, some at a time, and dZ there, in the buffer."""
    first, second = blocks
    for c in parts(0, first.shape[1], buffer.shape[1]):
        dz = buffer[:, : c.stop - c.start]
        kernels.combine(
            first[:, c], second[:, c], targets, c.start, logp, kl, state, grad_logp, grad_kl, beta,
            dz,
        )  # fmt: skip
        yield c, dz
