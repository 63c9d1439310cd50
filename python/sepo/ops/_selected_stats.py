"""selected_stats: what one pass over a row of logits tells beside the log-probability.

Reading order: the public functions, the autograd Function, the operator boundary.
"""

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
from sepo.ops._selected_logprob import (
    Explanation,
    explanation,
    fake_gradients,
    needs_grad,
    out_of_memory,
    schedule_within,
)
from sepo_kernels import schedules
from sepo_kernels.devices import accumulator
from sepo_kernels.registry import Impl, pick
from sepo_kernels.scales import Scale, scale_arguments
from sepo_kernels.selected_stats import IMPLS
from sepo_kernels.selected_stats.loops import Layout, layout_of, new_saved


class SelectedStats(NamedTuple):
    """Name the results of `selected_stats`, each (M,) float32, or float64 for float64 inputs.

    With z the V capped logits of a row and p their softmax:

    Attributes:
        logp: log p[target] in nats; differentiable.
        entropy: -sum p log p in nats; differentiable where `entropy_grad` was asked for.
        log_sum_sq: log sum p^2, minus the collision entropy; without a gradient, as all below.
        mean_logit: mean of z over the vocabulary.
        lse: log sum e^z.
        top1: bool: the target is the first of the largest logits.
    """

    logp: Tensor  # (M,)
    entropy: Tensor  # (M,)
    log_sum_sq: Tensor  # (M,)
    mean_logit: Tensor  # (M,)
    lse: Tensor  # (M,)
    top1: Tensor  # (M,) bool


def selected_stats(
    hidden: Tensor,  # (N, D) after the final norm
    weight: Tensor,  # (V, D), same dtype as hidden
    rows: Tensor,  # (M,) int32 or int64, 0 <= rows < N, may repeat
    targets: Tensor,  # (M,) int64, 0 <= targets < V
    *,
    bias: Tensor | None = None,  # (V,), same dtype as hidden
    scale: Scale = 1.0,  # multiplies the logits before the bias: a number, or (M,), one a row
    softcap: float | None = None,  # logits = softcap * tanh(logits / softcap), as in Gemma 2
    entropy_grad: bool = False,  # the entropy is differentiable, which costs memory and a pass
    budget: int | None = None,  # bytes of logits or probabilities alive at once; None: by device
    impl: str = "auto",
) -> SelectedStats:
    """Return log p(targets[m]) at each row as `selected_logprob`, and statistics of the whole row.

    By default the entropy is a metric: it has no gradient, and a loss made of it alone is an error
    of autograd. Then nothing costs more than `selected_logprob` does, in GEMMs or in memory, and
    logp and its gradients are the same bit for bit. With `entropy_grad` the gradient of the logits
    z is g (onehot - p) - h p (log p + entropy), for incoming gradients g of logp and h of the
    entropy. The forward then saves the logits in float32, at twice the memory of a 16-bit head's
    dlogits, and the backward makes one more pass over them: 3 GEMMs, 2 with a frozen head. What
    exceeds the budget is computed again in chunks: 4 GEMMs, 3 with a frozen head.

    Index values, schedules, budget, autocast, precision and `retain_graph` are as for
    `selected_logprob`; `explain_selected_stats` tells what runs.

    Args:
        hidden: (N, D) floating point with contiguous rows, the states after the final norm.
        weight: (V, D) with contiguous rows, the head, in the dtype of hidden.
        rows: (M,) int32 or int64, 0 <= rows < N, may repeat: the states that predict.
        targets: (M,) int64, 0 <= targets < V: the token ids that they predict.
        bias: (V,) of the head, in the dtype of hidden; -inf rules a word out.
        scale: multiplies the logits before the bias: a number, or (M,), one a row, as for
            `selected_logprob`.
        softcap: logits = softcap * tanh(logits / softcap), as in Gemma 2; None: not.
        entropy_grad: whether the entropy is differentiable.
        budget: bytes of logits or probabilities alive at once; None: by device.
        impl: "auto", or a name of an implementation: "native", "triton", "chunked".

    Returns:
        SelectedStats: logp, entropy, log_sum_sq, mean_logit, lse, (M,) float32 each, or float64 for
        float64 inputs, and top1 (M,) bool. logp, and the entropy if asked for, are differentiable
        in hidden, weight and bias.

    Raises:
        ValueError: as `selected_logprob`.
        torch.OutOfMemoryError: as `selected_logprob`.
        NotImplementedError: as `selected_logprob`.
    """
    check_one_head(hidden, weight, rows, targets, bias, scale, softcap)
    check_reverse_mode("selected_stats", hidden, weight, bias)
    chosen, layout, need = _choose(hidden, weight, bias, softcap, entropy_grad, impl)
    schedule, budget = schedule_within(budget, rows.shape[0], layout, hidden.device, need)
    one, each = scale_arguments(scale)
    head = hidden, weight, bias, rows, targets, one, softcap
    settings = entropy_grad and any(need), schedule, budget, chosen.name
    if schedule == schedules.NO_GRAD:
        return SelectedStats(*_public(_fwd(*head, *settings, scales=each)))
    return SelectedStats(*_SelectedStats.apply(*head, *settings, each))


def explain_selected_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    scale: Scale = 1.0,  # a number, or (M,)
    softcap: float | None = None,
    entropy_grad: bool = False,
    budget: int | None = None,  # bytes
    impl: str = "auto",
) -> Explanation:
    """Return the schedule that `selected_stats` takes for the same arguments; computes nothing.

    Grad mode and `requires_grad` are read now.

    Args:
        hidden: (N, D) floating point, the states after the final norm.
        weight: (V, D), the head, in the dtype of hidden.
        rows: (M,) int32 or int64, the states that predict.
        targets: (M,) int64, the token ids that they predict.
        bias: (V,) of the head, in the dtype of hidden.
        scale: multiplies the logits before the bias; a number, or (M,), one a row.
        softcap: of the logits; None: not.
        entropy_grad: whether the entropy is differentiable.
        budget: bytes of logits or probabilities alive at once; None: by device.
        impl: "auto", or a name of an implementation: "native", "triton", "chunked".

    Returns:
        Explanation: implementation, schedule, sizes in rows and bytes, GEMMs, and reasons.

    Raises:
        ValueError: as `selected_stats`, but for index values, which are not read.
    """
    check_one_head(hidden, weight, rows, targets, bias, scale, softcap)
    chosen, layout, need = _choose(hidden, weight, bias, softcap, entropy_grad, impl)
    return explanation(chosen.name, layout, hidden, len(rows), budget, need)


def _choose(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, entropy_grad: bool,
    impl: str,
) -> tuple[Impl, Layout, list[bool]]:  # fmt: skip
    """Return the implementation, the layout of its rows, and which inputs need a gradient."""
    chosen, need = pick(IMPLS, impl, hidden, weight), needs_grad(hidden, weight, bias)
    differentiable = entropy_grad and any(need)
    fused = chosen.fused(hidden.dtype)
    return chosen, layout_of(hidden, weight, softcap, differentiable, fused), need


def _public(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what SelectedStats names of what the operator returns."""
    logp, _, _, entropy, log_sum_sq, mean_logit, top1, reference, log_sum, _ = found
    return logp, entropy, log_sum_sq, mean_logit, reference + log_sum, top1 > 0


class _SelectedStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
        scale: float, softcap: float | None, entropy_grad: bool, schedule: str, budget: int,
        impl: str, scales: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = hidden, weight, bias, rows, targets
        settings = entropy_grad, schedule, budget, impl
        found = _fwd(*head, scale, softcap, *settings, scales=scales)
        logp, lse, row_scale, entropy, *_, reference, _, saved = found
        numbers = (entropy, reference, row_scale) if entropy_grad else (row_scale,)
        ctx.save_for_backward(scales, *head, logp, lse, *numbers, saved)
        ctx.settings = scale, softcap, schedule, budget
        ctx.entropy_grad, ctx.impl = entropy_grad, impl
        results = _public(found)
        ctx.mark_non_differentiable(*results[2 if entropy_grad else 1 :])
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor, grad_entropy: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        scales, *tensors = ctx.saved_tensors
        args = *tensors, *ctx.settings, *need, ctx.impl
        if ctx.entropy_grad:
            grads = _bwd(grad_logp, grad_entropy, *args, scales=scales)
        else:
            grads = _logprob_bwd(grad_logp, *args, scales=scales)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 9


# The operator boundary: one opaque node per direction for torch.compile, FakeTensor, the
# profiler and the FLOP counter. It knows nothing of autograd. Without a gradient of the entropy
# the backward is selected_logprob's operator.

torch.library.define(
    "sepo::selected_stats_fwd",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, float scale,"
    " float? softcap, bool entropy_grad, str schedule, SymInt budget, str impl, *,"
    " Tensor? scales=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor)",
)
torch.library.define(
    "sepo::selected_stats_bwd",
    "(Tensor grad_logp, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor? bias,"
    " Tensor rows, Tensor targets, Tensor logp, Tensor lse, Tensor entropy, Tensor reference,"
    " Tensor row_scale, Tensor saved, float scale, float? softcap, str schedule, SymInt budget,"
    " bool need_hidden, bool need_weight, bool need_bias, str impl, *, Tensor? scales=None)"
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
    grad_logp: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    rows: Tensor, *args: Any, scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = (grad_logp, grad_entropy, hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False), out_of_memory(args[-5]):
        return _BY_NAME[args[-1]].bwd(*head, as_int32(rows), *args[:-1], scales=scales)


def _fake_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
    scale: float, softcap: float | None, entropy_grad: bool, schedule: str, budget: int, impl: str,
    scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    M = rows.shape[0]
    layout = layout_of(hidden, weight, softcap, entropy_grad, _BY_NAME[impl].fused(hidden.dtype))
    num_saved = schedules.saved_rows(M, layout, budget, schedule)
    saved = new_saved(hidden, schedule, M, num_saved, layout)
    number = lambda: hidden.new_empty(rows.shape, dtype=accumulator(hidden.dtype))
    return *(number() for _ in range(9)), saved


def _fake_bwd(grad_logp: Tensor, grad_entropy: Tensor, *args: Any, **_: Any) -> tuple[Tensor, ...]:
    return fake_gradients(*args)


torch.library.impl("sepo::selected_stats_fwd", ("cpu", "cuda"), _run_fwd)
torch.library.impl("sepo::selected_stats_bwd", ("cpu", "cuda"), _run_bwd)
torch.library.register_fake("sepo::selected_stats_fwd", _fake_fwd)
torch.library.register_fake("sepo::selected_stats_bwd", _fake_bwd)
_fwd = torch.ops.sepo.selected_stats_fwd.default
_bwd = torch.ops.sepo.selected_stats_bwd.default
_logprob_bwd = torch.ops.sepo.selected_logprob_bwd.default
