"""selected_logprob: log-probabilities of chosen tokens straight from hidden states.

Reading order: the public functions, their checks, the autograd Function, the operator boundary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sepo.ops.checks import (
    check_head,
    check_index_values,
    check_indices,
    check_one_device,
    check_reverse_mode,
    check_softcap,
)
from sepo_kernels.platform import accumulator
from sepo_kernels.products import remark
from sepo_kernels.registry import pick
from sepo_kernels.selected_logprob import IMPLS
from sepo_kernels.selected_logprob import schedule as plan
from sepo_kernels.selected_logprob.loops import new_kept


def selected_logprob(
    hidden: Tensor,  # (N, D) after the final norm
    weight: Tensor,  # (V, D), same dtype as hidden
    rows: Tensor,  # (M,) int32, 0 <= rows < N, may repeat
    targets: Tensor,  # (M,) int64, 0 <= targets < V
    *,
    bias: Tensor | None = None,  # (V,), same dtype as hidden
    scale: float = 1.0,  # multiplies the logits before the bias
    softcap: float | None = None,  # logits = softcap * tanh(logits / softcap), as in Gemma 2
    budget: int | None = None,  # bytes of logits or probabilities alive at once; default 1 GiB
    impl: str = "auto",
) -> Tensor:  # (M,) float32 nats, or float64 for float64 inputs
    """Return log p(targets[m] | hidden[rows[m]]), the lp_t of SePO eq. 11, and no (N, V) tensor.

    There is no shift inside: rows[m] must be the state that predicts targets[m]. Index values
    are checked on the CPU; on a GPU that would wait, and what made them has checked them.

    The work is scheduled by `budget` and by which inputs need a gradient, as told by
    `explain_selected_logprob`. The result is the same up to the rounding of chunk sums. Under
    autocast the inputs are used in the dtype they come in. The backward may run more than once
    (`retain_graph`); it cannot be differentiated again.

    Raises ValueError for shapes, strides, dtypes or devices that do not fit, for indices on the CPU
    out of range, for a budget that holds not even one row, and for an `impl` that is unknown or
    cannot run.
    """
    _check(hidden, weight, rows, targets, bias, softcap)
    check_reverse_mode("selected_logprob", hidden, weight, bias)
    chosen = pick(IMPLS, impl, hidden, weight)
    schedule, budget, _ = _schedule(chosen, hidden, weight, rows, bias, softcap, budget)
    args = (hidden, weight, bias, rows, targets, scale, softcap, schedule, budget, chosen.name)
    if schedule == plan.NO_GRAD:
        return _fwd(*args)[0]
    return _SelectedLogprob.apply(*args)


class Explanation(NamedTuple):
    """What `selected_logprob` would do, and why."""

    impl: str
    schedule: str  # "save" | "recompute" | "frozen_head" | "no_grad"
    fwd_chunk: int  # rows
    bwd_chunk: int  # rows, 0 where the backward makes no logits
    bytes: int  # of all (rows, V) buffers alive at once, the larger of both directions
    gemms: int  # matrix products of 2 M D V FLOP, both directions together
    reasons: tuple[str, ...]


def explain_selected_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    scale: float = 1.0,
    softcap: float | None = None,
    budget: int | None = None,  # bytes
    impl: str = "auto",
) -> Explanation:
    """Return the schedule that `selected_logprob` takes for the same arguments; computes nothing.

    Takes and raises what `selected_logprob` does; grad mode and `requires_grad` are read now.
    """
    _check(hidden, weight, rows, targets, bias, softcap)
    chosen = pick(IMPLS, impl, hidden, weight)
    schedule, budget, layout = _schedule(chosen, hidden, weight, rows, bias, softcap, budget)
    M, dtype = len(rows), hidden.dtype
    need_hidden, need_weight, need_bias = needs_grad(hidden, weight, bias)

    fwd_chunk = plan.chunk_rows(M, layout, budget, schedule, backward=False)
    bwd_chunk = plan.chunk_rows(M, layout, budget, schedule, backward=True)
    saved, scratch = M * layout.kept, layout.save_scratch
    if schedule == plan.SAVE:
        size, bwd_chunk = saved + min(fwd_chunk, M) * scratch, 0
        reasons = (f"(M, V) = ({M}, {layout.V}) in {dtype} takes {saved} bytes, budget {budget}",)
    elif schedule == plan.RECOMPUTE:
        size = max(
            bwd_chunk * layout.row_bytes(gradient=True),
            fwd_chunk * layout.row_bytes(gradient=False),
        )
        wanted = saved + min(M, plan.SAVE_MIN_CHUNK) * scratch
        reasons = (f"saving takes {wanted} bytes, budget {budget}: the logits are made twice",)
    else:
        frozen = schedule == plan.FROZEN_HEAD
        size, bwd_chunk = fwd_chunk * layout.row_bytes(gradient=frozen), 0
        why = "the head needs no gradient" if frozen else "nothing needs a gradient, or no_grad"
        reasons = (why,)
    if not need_hidden and (need_weight or need_bias):
        reasons += ("hidden needs no gradient: its product is left out",)
    reasons += remark(hidden, layout.fused)
    gemms = plan.fwd_gemms(schedule) + plan.bwd_gemms(schedule, need_hidden, need_weight)
    return Explanation(chosen.name, schedule, fwd_chunk, bwd_chunk, size, gemms, reasons)


def needs_grad(*tensors: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in tensors]


def _schedule(chosen, hidden, weight, rows, bias, softcap, budget) -> tuple[str, int, plan.Layout]:
    need_hidden, need_weight, need_bias = needs_grad(hidden, weight, bias)
    fused = chosen.fused(hidden.dtype)
    layout = plan.Layout(weight.shape[0], hidden.dtype, softcap is not None, fused, hidden.is_cuda)
    budget = plan.DEFAULT_BUDGET if budget is None else budget
    row = layout.row_bytes(gradient=need_hidden or need_weight or need_bias)
    if budget < row:
        raise ValueError(f"expected a budget of at least one row, {row} bytes, got {budget}")
    need_head = need_weight or need_bias
    return plan.choose(rows.shape[0], layout, budget, need_hidden, need_head), budget, layout


def _check(hidden, weight, rows, targets, bias, softcap) -> None:
    check_head(hidden, weight, bias)
    check_indices(rows, targets)
    check_one_device(hidden, weight, rows, targets, bias)
    check_softcap(softcap)


class _SelectedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, scale, softcap, schedule, budget, impl):
        logp, lse, unit, kept = _fwd(
            hidden, weight, bias, rows, targets, scale, softcap, schedule, budget, impl
        )
        ctx.save_for_backward(hidden, weight, bias, rows, targets, logp, lse, unit, kept)
        ctx.settings = (scale, softcap, schedule, budget)
        ctx.impl = impl
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp):
        need = ctx.needs_input_grad[:3]
        grads = _bwd(grad_logp, *ctx.saved_tensors, *ctx.settings, *need, ctx.impl)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 7


# The operator boundary: one opaque node per direction for torch.compile, FakeTensor, the
# profiler and the FLOP counter. It knows nothing of autograd.

torch.library.define(
    "sepo::selected_logprob_fwd",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, float scale,"
    " float? softcap, str schedule, SymInt budget, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sepo::selected_logprob_bwd",
    "(Tensor grad_logp, Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets,"
    " Tensor logp, Tensor lse, Tensor unit, Tensor kept, float scale, float? softcap, str schedule,"
    " SymInt budget, bool need_hidden, bool need_weight, bool need_bias, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)
_BY_NAME = {impl.name: impl for impl in IMPLS}


def _run_fwd(hidden, weight, bias, rows, targets, *args):
    check_index_values(rows, targets, hidden.shape[0], weight.shape[0])
    # autocast would also reach the products inside, and round the logits
    with torch.autocast(hidden.device.type, enabled=False):
        return _BY_NAME[args[-1]].fwd(hidden, weight, bias, rows, targets, *args[:-1])


def _run_bwd(*args):
    with torch.autocast(args[0].device.type, enabled=False):
        return _BY_NAME[args[-1]].bwd(*args[:-1])


def _fake_fwd(hidden, weight, bias, rows, targets, scale, softcap, schedule, budget, impl):
    logp = hidden.new_empty(rows.shape, dtype=accumulator(hidden.dtype))
    fused = _BY_NAME[impl].fused(hidden.dtype)
    kept = new_kept(hidden, schedule, rows.shape[0], *weight.shape, fused)
    return logp, torch.empty_like(logp), torch.empty_like(logp), kept


def _fake_bwd(
    grad_logp, hidden, weight, bias, rows, targets, logp, lse, unit, kept, scale, softcap,
    schedule, budget, need_hidden, need_weight, need_bias, impl,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


torch.library.impl("sepo::selected_logprob_fwd", ("cpu", "cuda"), _run_fwd)
torch.library.impl("sepo::selected_logprob_bwd", ("cpu", "cuda"), _run_bwd)
torch.library.register_fake("sepo::selected_logprob_fwd", _fake_fwd)
torch.library.register_fake("sepo::selected_logprob_bwd", _fake_bwd)
_fwd = torch.ops.sepo.selected_logprob_fwd.default
_bwd = torch.ops.sepo.selected_logprob_bwd.default
