"""The loops over chunks that every implementation of selected_stats runs in.

Without a gradient of the entropy they are selected_logprob's, and so is the backward. With it, and
z the logits, p their softmax, l = log p and H = -sum p l, g and h the incoming gradients,

    dZ = g * (onehot(target) - p) * cap'  -  h * p * (l + H) * cap'                    (M, V)

of which neither part is the other times one number a row. The forward saves the logits; backward
makes dZ from them over columns, so that it is a narrow buffer, and nothing saved is overwritten: a
second backward is right. A row that is not saved is computed once more, and dZ in one piece.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepo_kernels import devices, schedules
from sepo_kernels.devices import accumulator
from sepo_kernels.gradients import HeadGradients
from sepo_kernels.registry import Impl
from sepo_kernels.scales import Scale, of_part
from sepo_kernels.schedules import parts
from sepo_kernels.selected_logprob import loops as logprob
from sepo_kernels.selected_logprob.layout import HeadLayout
from sepo_kernels.selected_logprob.loops import new_block
from sepo_kernels.selected_logprob_kl.layout import saved_gradient
from sepo_kernels.selected_stats.layout import FUSED_SUMS, EntropyLayout


class Rows(NamedTuple):
    """What the gradient reads of each row, (chunk,) each: p = e^(z - reference) * row_scale."""

    targets: Tensor
    logp: Tensor
    entropy: Tensor
    reference: Tensor
    row_scale: Tensor
    grad_logp: Tensor  # times the row's scale, as are those of the entropy
    grad_entropy: Tensor

    def of_part(self, part: slice) -> "Rows":
        return Rows(*(x[part] for x in self))


class StatisticsKernels(NamedTuple):
    """One implementation: how it computes a chunk of rows.

    forward(x (chunk, D), weight (V, D), bias (V,) | None, targets (chunk,), scale, softcap,
            dlogits (chunk, V) | None, logits (chunk, V) | None, keep=False)
            -> logp, lse, row_scale, entropy, log_sum_sq, mean_logit, top1, reference, log_sum,
            (chunk,) each
        logp, lse, dlogits and, if they are asked for, row_scale are selected_logprob's, bit for
        bit; else row_scale is 1 / sum of e^(z - reference). top1 is 1 or 0; log_sum is the sum's
        logarithm: lse keeps few digits where the target is far below
        keep: without dlogits; `logits` is left as `gradient` reads it, of a fused one too
    gradient(logits (chunk, columns), start, bias, scale, softcap, rows: Rows, out (chunk, columns))
        writes dZ in columns [start, start + columns), times the scale, from what forward has kept;
        bias is that of these columns
    recompute(x, weight, bias, scale, softcap, rows: Rows, logits (chunk, V) | None, out (chunk, V))
        writes dZ of all columns from the logits made once more; logits is scratch, may be out
    fused(dtype) -> bool: logits that are not kept never leave the cache; logits and out are stored
        with the rows as their fast dimension, and out is zero at the targets: each outweighs the
        rest of its row, and its part is added in float32
    """

    forward: Callable[..., tuple[Tensor, ...]]
    gradient: Callable[..., None]
    recompute: Callable[..., None]
    fused: Callable[[torch.dtype], bool]
    numbers: int = 9
    fused_sums: int = FUSED_SUMS


def implementation(
    name: str, kernels: StatisticsKernels, why_not: Callable[..., str | None]
) -> Impl:
    """Put `kernels` into the loops, with the signature of the operators."""
    return Impl(name, partial(fwd, kernels), partial(bwd, kernels), why_not, kernels.fused)


Layout = HeadLayout | EntropyLayout


def layout_of(
    hidden: Tensor, weight: Tensor, softcap: float | None, entropy_grad: bool, fused: bool
) -> Layout:
    if entropy_grad:
        return entropy_layout(hidden, weight, fused)
    return logprob.layout_of(hidden, weight, softcap, fused, FUSED_SUMS)


def entropy_layout(hidden: Tensor, weight: Tensor, fused: bool) -> EntropyLayout:
    (V, D), gpu = weight.shape, devices.multiprocessors(hidden.device)
    return EntropyLayout(V, hidden.dtype, fused, gpu, D)


def new_saved(hidden: Tensor, schedule: str, M: int, num_saved: int, layout: Layout) -> Tensor:
    """Return what the forward saves for the backward, empty: logits (num_saved, V), or (0,).

    Without a gradient of the entropy it is what selected_logprob saves.
    """
    if isinstance(layout, HeadLayout):
        return logprob.new_saved(hidden, schedule, M, num_saved, layout)
    acc = accumulator(hidden.dtype)
    if num_saved or schedule == schedules.SAVE:
        return new_block(hidden, num_saved, layout.V, layout.fused, acc)
    return hidden.new_empty((0,), dtype=acc)


def fwd(
    kernels: StatisticsKernels,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    scale: Scale,
    softcap: float | None,
    entropy_grad: bool,
    schedule: str,
    budget: int,  # bytes
    *,
    scales: Tensor | None = None,  # (M,) in the place of scale
) -> tuple[Tensor, ...]:  # the numbers of kernels.forward, (M,) each, and saved: see new_saved
    head, settings = (hidden, weight, bias, rows, targets, scale, softcap), (schedule, budget)
    layout = layout_of(hidden, weight, softcap, entropy_grad, kernels.fused(hidden.dtype))
    if isinstance(layout, HeadLayout):
        return logprob.fwd(kernels, *head, *settings, scales=scales)
    acc, M = accumulator(hidden.dtype), rows.shape[0]
    scale = scale if scales is None else scales
    results = [hidden.new_empty((M,), dtype=acc) for _ in range(kernels.numbers)]
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    saved = new_saved(hidden, schedule, M, num_saved, layout)
    step = schedules.chunk_rows(M, layout, budget, schedule, backward=False)
    scratch = None
    if num_saved < M and not layout.fused:
        scratch = new_block(hidden, min(step, M - num_saved), layout.V, False, acc)
    for part in (*parts(0, num_saved, step), *parts(num_saved, M, step)):
        keep = part.start < num_saved
        logits = saved[part] if keep else _first(scratch, part)
        x = hidden.index_select(0, rows[part])
        values = kernels.forward(
            x, weight, bias, targets[part], of_part(scale, part), softcap, None, logits, keep
        )
        for whole, chunk in zip(results, values, strict=True):
            whole[part] = chunk
    return *results, saved


def bwd(
    kernels: StatisticsKernels,
    grad_logp: Tensor,  # (M,)
    grad_entropy: Tensor,  # (M,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    logp: Tensor,  # (M,)
    lse: Tensor,  # (M,)
    entropy: Tensor,  # (M,)
    reference: Tensor,  # (M,)
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
) -> tuple[Tensor, ...]:  # (N, D), (V, D), (V,), in their input's dtype; (0,) if unneeded
    dtype, acc, M = hidden.dtype, accumulator(hidden.dtype), rows.shape[0]
    scale = scale if scales is None else scales
    grads = grad_logp.to(acc) * scale, grad_entropy.to(acc) * scale
    numbers = Rows(targets, logp, entropy, reference, row_scale, *grads)
    layout = entropy_layout(hidden, weight, kernels.fused(dtype))
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    step = schedules.chunk_rows(M, layout, budget, schedule, backward=True)
    chunks = [*parts(0, num_saved, max(1, num_saved)), *parts(num_saved, M, step)]
    need = need_hidden, need_weight, need_bias
    total = HeadGradients(hidden, weight, scale, need, len(chunks))
    at_target = dz_at_target(numbers) if layout.fused else None
    if at_target is not None and softcap is not None:
        at_target *= 1 - ((logp + lse) / softcap) ** 2
    buffers = None  # of the chunks that are computed once more
    for part in chunks:
        x, some = hidden.index_select(0, rows[part]), numbers.of_part(part)
        settings = of_part(scale, part), softcap, some
        if part.start < num_saved:
            size = saved_gradient(M, layout, budget, schedule)
            columns = _columns(kernels, hidden, saved, bias, *settings, *size)
        else:
            buffers = buffers or _buffers(hidden, part.stop - part.start, layout)
            out, logits = (_first(buffer, part) for buffer in buffers)
            assert out is not None
            kernels.recompute(x, weight, bias, *settings, logits, out)
            columns = iter([(slice(0, layout.V), out)])
        entry = None if at_target is None else at_target[part, None]
        total.add(part, rows[part], x, columns, targets[part], entry)
    return total.results()


def _columns(
    kernels: StatisticsKernels,
    hidden: Tensor,
    saved: Tensor,  # (chunk, V) logits
    bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
    rows: Rows,  # (chunk,)
    num_rows: int,
    num_columns: int,  # at a time
) -> Iterator[tuple[slice, Tensor]]:
    """Yield all columns of the saved rows, some at a time, and dZ there, in one buffer."""
    buffer = new_block(hidden, num_rows, num_columns, kernels.fused(hidden.dtype))
    for c in parts(0, saved.shape[1], num_columns):
        out, some = buffer[:, : c.stop - c.start], None if bias is None else bias[c]
        kernels.gradient(saved[:, c], c.start, some, scale, softcap, rows, out)
        yield c, out


def _buffers(hidden: Tensor, rows: int, layout: EntropyLayout) -> tuple[Tensor, Tensor | None]:
    """Return (rows, V) for dZ, and for logits: the same where the dtype is; None of a fused one."""
    acc = accumulator(hidden.dtype)
    narrow = new_block(hidden, rows, layout.V, layout.fused)
    if layout.fused or hidden.dtype == acc:
        return narrow, None if layout.fused else narrow
    return narrow, new_block(hidden, rows, layout.V, False, acc)


def dz_at_target(rows: Rows) -> Tensor:  # of the shape of rows' tensors
    """Return dZ at each row's own target, times its scale, before the cap's derivative."""
    logp = rows.logp
    # by expm1, which keeps the digits of a confident row; and 0 log 0 = 0
    of_entropy = torch.where(logp == -torch.inf, 0, logp.exp() * (logp + rows.entropy))
    return -rows.grad_logp * logp.expm1() - rows.grad_entropy * of_entropy


def _first(buffer: Tensor | None, part: slice) -> Tensor | None:
    return None if buffer is None else buffer[: part.stop - part.start]
