"""selected_logprob: log-probabilities of chosen tokens straight from hidden states.

Reading order: the public functions, the autograd Function, the operator boundary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sepo.ops._checks import (
    as_int32,
    check_index_values,
    check_one_head,
    check_reverse_mode,
    check_scale_values,
)
from sepo.ops._k_targets import (
    check_k_targets,
    explain_over_vocabulary,
    fields_over_targets,
    k_logprob,
)
from sepo.ops._target_logits import plan_targets
from sepo_kernels import devices, schedules
from sepo_kernels.devices import accumulator
from sepo_kernels.gemm import dtype_note
from sepo_kernels.registry import pick
from sepo_kernels.scales import Scale, scale_arguments
from sepo_kernels.selected_logprob import IMPLS
from sepo_kernels.selected_logprob.loops import layout_of, new_saved


def selected_logprob(
    hidden: Tensor,  # (N, D) after the final norm
    weight: Tensor,  # (V, D), same dtype as hidden
    rows: Tensor,  # (M,) int32 or int64, 0 <= rows < N, may repeat
    targets: Tensor,  # (M,) int64, 0 <= targets < V; or (M, K), -1: absent
    *,
    over: str = "vocabulary",  # or "targets": p among the K targets of a row alone
    bias: Tensor | None = None,  # (V,), same dtype as hidden
    scale: Scale = 1.0,  # multiplies the logits before the bias: a number, or (M,), one a row
    softcap: float | None = None,  # logits = softcap * tanh(logits / softcap), as in Gemma 2
    budget: int | None = None,  # bytes of logits or probabilities alive at once; None: see below
    impl: str = "auto",
) -> Tensor:  # of the targets' shape, float32 nats, or float64 for float64 inputs
    """Return log p(targets[m] | hidden[rows[m]]), the lp_t of SePO eq. 11, and no (N, V) tensor.

    There is no shift inside: rows[m] must be the state that predicts targets[m]. Index values
    are checked on the CPU; on a GPU that would wait, and what made them has checked them.

    A row may have K targets: for distillation from a teacher's top K, or a cached reference's. All
    of them take the GEMMs of one. A target of -1 is absent: it gets 0 and no gradient, but a row
    needs one that is present. An id that occurs twice in a row has two results, whose gradients
    add. With over="targets" p is the softmax over the row's present targets alone, each column
    counted, in 2 M K D FLOP without any GEMM of the head. That replays a sampler that kept only
    some ids (top-k, top-p): see `sampled_first`.

    `explain_selected_logprob` tells how the work is scheduled: by `budget` and by which inputs need
    a gradient. The result is the same up to the rounding of chunk sums, and bit for bit where
    budget, sizes and device are. By default the budget is 1 GiB on a CPU. On a GPU it is what
    saving dlogits of every row takes (3 GEMMs), at most an eighth of its whole memory. What is free
    at the moment is not asked, so a resumed run rounds as before. Under autocast the inputs are
    used in the dtype they come in. The backward may run more than once (`retain_graph`); it cannot
    be differentiated again.

    Args:
        hidden: (N, D) floating point with contiguous rows, the states after the final norm.
        weight: (V, D) with contiguous rows, the head, in the dtype of hidden.
        rows: (M,) int32 or int64, 0 <= rows < N, may repeat: the states that predict.
        targets: (M,) int64, 0 <= targets < V: the token ids that they predict; or (M, K), with -1
            where a row has fewer.
        over: "vocabulary", or "targets": what p sums to 1 over; the latter with targets (M, K).
        bias: (V,) of the head, in the dtype of hidden.
        scale: multiplies the logits before the bias. A number, or (M,) float32 (float64 for
            float64 inputs) positive numbers, one a row: 1 / temperature of each sample. It has no
            gradient.
        softcap: logits = softcap * tanh(logits / softcap), as in Gemma 2; None: not.
        budget: bytes of logits, probabilities or gathered rows of the head alive at once; None: by
            device, see above.
        impl: "auto", or a name of an implementation: "native", "triton", "chunked".

    Returns:
        Tensor: (M,) or (M, K), as the targets, float32, or float64 for float64 inputs, natural
        logarithms; differentiable in hidden, weight and bias.

    Raises:
        ValueError: for shapes, strides, dtypes or devices that do not fit, for indices or scales on
            the CPU out of range and for a row of nothing but -1, for a scale that requires a
            gradient, for a budget that holds not even one row or is more than the GPU's memory, and
            for an `impl` that is unknown or cannot run.
        torch.OutOfMemoryError: in one line, where the memory that is left does not suffice.
        NotImplementedError: for an input with a tangent (jvp): there is no forward mode.
    """
    if targets.ndim == 2 or over != "vocabulary":
        options: dict[str, Any] = dict(scale=scale, softcap=softcap, budget=budget, impl=impl)
        one_target = lambda hidden, weight, bias, targets: selected_logprob(
            hidden, weight, rows, targets, bias=bias, **options
        )
        return k_logprob(one_target, hidden, weight, bias, rows, targets, over=over, **options)
    check_one_head(hidden, weight, rows, targets, bias, scale, softcap)
    check_reverse_mode("selected_logprob", hidden, weight, bias)
    chosen = pick(IMPLS, impl, hidden, weight)
    layout = layout_of(hidden, weight, softcap, chosen.fused(hidden.dtype))
    need = needs_grad(hidden, weight, bias)
    schedule, budget = schedule_within(budget, rows.shape[0], layout, hidden.device, need)
    one, each = scale_arguments(scale)
    args = (hidden, weight, bias, rows, targets, one, softcap, schedule, budget, chosen.name)
    if schedule == schedules.NO_GRAD:
        return _fwd(*args, scales=each)[0]
    return _SelectedLogprob.apply(*args, each)


class Explanation(NamedTuple):
    """Name what a head operation would do, and why.

    Attributes:
        impl: the implementation's name.
        schedule: "save", "partial", "recompute", "frozen_head" or "no_grad"; "targets" where p is
            over the targets alone.
        fwd_chunk: rows at once in the forward.
        bwd_chunk: rows at once in the backward, 0 where it makes no logits.
        peak_bytes: of all (rows, V) buffers alive at once, the larger of both directions; or of
            gathered rows of the head, where those of K targets are more.
        gemms: matrix products of 2 M D V FLOP, both directions together.
        saved: rows of which the forward keeps (V,) numbers for the backward.
        budget: bytes.
        reasons: of the schedule, and where the budget comes from, a sentence each.
    """

    impl: str
    schedule: str  # "save" | "partial" | "recompute" | "frozen_head" | "no_grad" | "targets"
    fwd_chunk: int  # rows
    bwd_chunk: int  # rows, 0 where the backward makes no logits
    peak_bytes: int  # of all (rows, V) buffers alive at once, the larger of both directions
    gemms: float  # matrix products of 2 M D V FLOP, both directions together
    saved: int  # rows whose dlogits the forward saves
    budget: int  # bytes
    reasons: tuple[str, ...]  # of the schedule, and where the budget comes from

    @property
    def bytes(self) -> int:
        """Return `peak_bytes`, by its old name."""
        return self.peak_bytes


def explain_selected_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M,) or (M, K) int64
    *,
    over: str = "vocabulary",  # or "targets"
    bias: Tensor | None = None,  # (V,)
    scale: Scale = 1.0,  # a number, or (M,)
    softcap: float | None = None,
    budget: int | None = None,  # bytes
    impl: str = "auto",
) -> Explanation:
    """Return the schedule that `selected_logprob` takes for the same arguments; computes nothing.

    Grad mode and `requires_grad` are read now.

    Args:
        hidden: (N, D) floating point, the states after the final norm.
        weight: (V, D), the head, in the dtype of hidden.
        rows: (M,) int32 or int64, the states that predict.
        targets: (M,) or (M, K) int64, the token ids that they predict.
        over: "vocabulary", or "targets": what p sums to 1 over.
        bias: (V,) of the head, in the dtype of hidden.
        scale: multiplies the logits before the bias; a number, or (M,), one a row.
        softcap: of the logits; None: not.
        budget: bytes of logits or probabilities alive at once; None: by device.
        impl: "auto", or a name of an implementation: "native", "triton", "chunked".

    Returns:
        Explanation: implementation, schedule, sizes in rows and bytes, GEMMs, and reasons.

    Raises:
        ValueError: as `selected_logprob`, but for index values, which are not read.
    """
    if targets.ndim == 2 or over != "vocabulary":
        check_k_targets(hidden, weight, bias, rows, targets, over, scale, softcap)
        plan = plan_targets(budget, hidden, weight, targets, impl)
        if over == "targets":
            source = source_of(plan.budget, budget, hidden.device)
            need = needs_grad(hidden, weight, bias)
            return Explanation(**fields_over_targets(plan, any(need), source))
        one_target = explain_selected_logprob(
            hidden, weight, rows, targets[:, 0], bias=bias, scale=scale, softcap=softcap,
            budget=budget, impl=impl,
        )  # fmt: skip
        return explain_over_vocabulary(one_target, plan)
    check_one_head(hidden, weight, rows, targets, bias, scale, softcap)
    chosen = pick(IMPLS, impl, hidden, weight)
    layout = layout_of(hidden, weight, softcap, chosen.fused(hidden.dtype))
    need = needs_grad(hidden, weight, bias)
    return explanation(chosen.name, layout, hidden, len(rows), budget, need)


def explanation(
    impl: str,
    layout: schedules.Layout,
    hidden: Tensor,
    M: int,
    given: int | None,  # the user's budget, bytes
    need: list[bool],  # a gradient of hidden, weight and bias
) -> Explanation:
    """Explain the schedule that M rows take: its chunks, bytes, GEMMs and reasons."""
    schedule, budget = schedule_within(given, M, layout, hidden.device, need)
    need_hidden, need_weight, need_bias = need
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    chunks = [
        schedules.chunk_rows(M, layout, budget, schedule, backward) for backward in (False, True)
    ]
    recomputes = schedule in (schedules.PARTIAL, schedules.RECOMPUTE)
    rows = sum(layout.bwd_rows(M, num_saved, schedule, need_hidden, need_weight))
    reasons = schedules.reasons(M, layout, budget, schedule, need_hidden, need_weight or need_bias)
    reasons += (*dtype_note(hidden, layout.fused), source_of(budget, given, hidden.device))
    return Explanation(
        impl=impl,
        schedule=schedule,
        fwd_chunk=chunks[0],
        bwd_chunk=chunks[1] if recomputes else 0,
        peak_bytes=layout.peak_bytes(M, budget, schedule),
        gemms=sum(layout.fwd_gemms(schedule)) + share(rows, M),
        saved=num_saved,
        budget=budget,
        reasons=reasons,
    )


def share(rows: int, M: int) -> float:
    """Products of all M rows that as many rows make."""
    whole, rest = divmod(rows, max(1, M))
    return whole + round(rest / M, 3) if rest else whole


def source_of(budget: int, given: int | None, device: torch.device) -> str:
    if given is not None:
        return f"budget {budget} bytes, as given"
    if devices.multiprocessors(device) == 0:
        return f"budget {budget} bytes, the default of a CPU"
    if budget < devices.memory(device) // schedules.MEMORY_SHARE:
        return f"budget {budget} bytes, what the call makes use of"
    return f"budget {budget} bytes, 1/{schedules.MEMORY_SHARE} of the memory of {device}"


def check_budget(budget: int, row: int, device: torch.device) -> None:
    if budget < row:
        raise ValueError(f"expected a budget of at least one row, {row} bytes, got {budget}")
    if devices.multiprocessors(device) and budget > (most := devices.memory(device)):
        raise ValueError(
            f"expected a budget of at most {most} bytes, the memory of {device}, got {budget}"
        )


def needs_grad(*tensors: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in tensors]


def schedule_within(
    budget: int | None,  # bytes; None: by device
    M: int,
    layout: schedules.Layout,
    device: torch.device,
    need: list[bool],  # a gradient of hidden, weight and bias
) -> tuple[str, int]:
    """Return the schedule of M rows and its budget in bytes.

    Raises ValueError for a budget that holds not even one row, or more than the GPU's memory.
    """
    need_hidden, need_head = need[0], need[1] or need[2]
    if budget is None:
        memory = devices.memory(device)
        budget = schedules.default_budget(M, layout, memory, need_hidden, need_head)
    check_budget(budget, layout.row_bytes(gradient=need_hidden or need_head), device)
    return schedules.choose(M, layout, budget, need_hidden, need_head), budget


@contextmanager
def out_of_memory(budget: int) -> Iterator[None]:
    """One line of what was asked for, in place of the allocator's page."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"expected {budget} bytes for logits or probabilities (budget=, --head_budget) and the "
            f"gradients beside them, got: {str(error).splitlines()[0]}"
        ) from None


class _SelectedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
        scale: float, softcap: float | None, schedule: str, budget: int, impl: str,
        scales: Tensor | None,
    ) -> Tensor:  # fmt: skip
        logp, lse, row_scale, saved = _fwd(
            hidden, weight, bias, rows, targets, scale, softcap, schedule, budget, impl,
            scales=scales,
        )  # fmt: skip
        found = logp, lse, row_scale, saved
        ctx.save_for_backward(scales, hidden, weight, bias, rows, targets, *found)
        ctx.settings = (scale, softcap, schedule, budget)
        ctx.impl = impl
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        scales, *tensors = ctx.saved_tensors
        grads = _bwd(grad_logp, *tensors, *ctx.settings, *need, ctx.impl, scales=scales)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 8


# The operator boundary: one opaque node per direction for torch.compile, FakeTensor, the
# profiler and the FLOP counter. It knows nothing of autograd. `scales` (M,) stands in for `scale`:
# beside it, because a tensor made of every number would be a kernel more on a GPU.

torch.library.define(
    "sepo::selected_logprob_fwd",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, float scale,"
    " float? softcap, str schedule, SymInt budget, str impl, *, Tensor? scales=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sepo::selected_logprob_bwd",
    "(Tensor grad_logp, Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets,"
    " Tensor logp, Tensor lse, Tensor row_scale, Tensor saved, float scale, float? softcap, str schedule,"
    " SymInt budget, bool need_hidden, bool need_weight, bool need_bias, str impl, *,"
    " Tensor? scales=None)"
    " -> (Tensor, Tensor, Tensor)",
)
_BY_NAME: dict[str, Any] = {impl.name: impl for impl in IMPLS}  # all have a bwd


def _run_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, *args: Any,
    scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_index_values(rows, targets, hidden.shape[0], weight.shape[0])
    check_scale_values(scales)
    head = (hidden, weight, bias)
    # autocast would also reach the products inside, and round the logits
    with torch.autocast(hidden.device.type, enabled=False), out_of_memory(args[-2]):
        return _BY_NAME[args[-1]].fwd(*head, as_int32(rows), targets, *args[:-1], scales=scales)


def _run_bwd(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, *args: Any,
    scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = (hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False), out_of_memory(args[-5]):
        return _BY_NAME[args[-1]].bwd(grad_logp, *head, as_int32(rows), *args[:-1], scales=scales)


def _fake_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
    scale: float, softcap: float | None, schedule: str, budget: int, impl: str,
    scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    logp = hidden.new_empty(rows.shape, dtype=accumulator(hidden.dtype))
    M = rows.shape[0]
    layout = layout_of(hidden, weight, softcap, _BY_NAME[impl].fused(hidden.dtype))
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    saved = new_saved(hidden, schedule, M, num_saved, layout)
    return logp, torch.empty_like(logp), torch.empty_like(logp), saved


def fake_gradients(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return what a head's backward returns, by its last arguments: which are needed, and impl."""
    need_hidden, need_weight, need_bias = args[-4:-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _fake_bwd(grad_logp: Tensor, *args: Any, **_: Any) -> tuple[Tensor, ...]:
    return fake_gradients(*args)


torch.library.impl("sepo::selected_logprob_fwd", ("cpu", "cuda"), _run_fwd)
torch.library.impl("sepo::selected_logprob_bwd", ("cpu", "cuda"), _run_bwd)
torch.library.register_fake("sepo::selected_logprob_fwd", _fake_fwd)
torch.library.register_fake("sepo::selected_logprob_bwd", _fake_bwd)
_fwd = torch.ops.sepo.selected_logprob_fwd.default
_bwd = torch.ops.sepo.selected_logprob_bwd.default
