"""Log-probabilities of K targets a row: `selected_logprob` with targets (M, K).

Over the vocabulary, with b the best of a row's targets,

    log p(t_k) = log p(t_b) + (z_k - z_b)

so the head's GEMMs are those of one target a row. Both terms are negative, so nothing cancels: a
row that is confident of one of its targets has log p(t_b) = -log1p(sum of the others), to the last
digit. Over the targets alone nothing is (., V) at all: L = z_k - logsumexp of the row's z.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sepo.ops._checks import (
    check_head,
    check_one_device,
    check_reverse_mode,
    check_scale,
    check_softcap,
)
from sepo.ops._target_logits import TargetPlan, target_logits
from sepo_kernels.scales import Scale

OVER = ("vocabulary", "targets")
Explained = TypeVar("Explained", bound=Any)  # selected_logprob's Explanation


def k_logprob(
    one_target: Callable[..., Tensor],  # hidden, weight, bias, targets (M,) -> logp (M,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M, K) int64; -1: absent
    *,
    over: str,  # of OVER
    scale: Scale,
    softcap: float | None,
    budget: int | None,  # bytes
    impl: str,
) -> Tensor:  # (M, K) accumulator dtype, 0 where a target is absent
    """Return the log-probability of each target, among the vocabulary or among its row's targets."""
    check_k_targets(hidden, weight, bias, rows, targets, over, scale, softcap)
    check_reverse_mode("selected_logprob", hidden, weight, bias)
    if over == "vocabulary" and targets.shape[1] == 1:
        return one_target(hidden, weight, bias, targets[:, 0])[:, None]
    hidden, weight, bias, z = target_logits(
        hidden, weight, bias, rows, targets, scale, softcap, budget, impl
    )
    present = targets >= 0
    if over == "targets":
        return _OverTargets.apply(z, present)
    best = z.detach().argmax(1, keepdim=True)
    # on a GPU, which does not refuse it, a row without targets reads target 0, for nothing
    logp = one_target(hidden, weight, bias, targets.gather(1, best)[:, 0].clamp(min=0))
    return _OverVocabulary.apply(logp, z, best, present)


def sampled_first(
    sampled: Tensor,  # (M,) int64
    kept: Tensor,  # (M, K) int64; -1: absent
) -> Tensor:  # (M, K + 1) int64
    """Return the targets that replay a sampler which kept only some ids of the vocabulary.

    Column 0 is the id that was sampled, the others are the ids that were kept with it, so

        targets = sampled_first(sampled, kept)
        logp = selected_logprob(hidden, weight, rows, targets, over="targets")[:, 0]

    is the log-probability under today's weights of what was drawn, among what could be drawn then.
    The kept ids are those of top-k, top-p or min-p sampling, in any order. Where a sampler returns
    them end to end, as vLLM's sampling mask does, `torch.nn.utils.rnn.pad_sequence` with a
    `padding_value` of -1 makes (M, K) of them. In its own column the sampled id becomes -1, because
    each column counts in the sum.

    Args:
        sampled: (M,) int64, the id that was sampled at each place.
        kept: (M, K) int64, the ids that could have been sampled there; -1 where they are fewer.

    Returns:
        Tensor: (M, K + 1) int64, for `selected_logprob`.

    Raises:
        ValueError: for shapes and dtypes that do not fit and, on the CPU, for a sampled id that was
            not kept. On a GPU nobody looks: it is added to those that were.
    """
    if sampled.ndim != 1 or kept.ndim != 2 or len(sampled) != len(kept):
        raise ValueError(
            "expected sampled (M,) and kept (M, K), "
            f"got {tuple(sampled.shape)} and {tuple(kept.shape)}"
        )
    if sampled.dtype != torch.int64 or kept.dtype != torch.int64:
        raise ValueError(f"expected int64 ids, got {sampled.dtype} and {kept.dtype}")
    own = kept == sampled[:, None]
    if kept.device.type == "cpu" and not torch.compiler.is_compiling():
        missing = ~own.any(1)
        if missing.any():
            row = int(missing.int().argmax())
            raise ValueError(
                f"expected sampled ids among the kept, got {int(sampled[row])} in row {row}, "
                "which was not kept"
            )
    return torch.cat([sampled[:, None], kept.masked_fill(own, -1)], 1)


def check_k_targets(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    over: str,
    scale: Scale,
    softcap: float | None,
) -> None:
    if over not in OVER:
        raise ValueError(f'expected over to be "vocabulary" or "targets", got "{over}"')
    check_head(hidden, weight, bias)
    if rows.ndim != 1 or targets.ndim != 2 or len(rows) != len(targets) or targets.shape[1] == 0:
        raise ValueError(
            "expected rows (M,) and targets (M, K) with K > 0, "
            f"got {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    if rows.dtype not in (torch.int32, torch.int64) or targets.dtype != torch.int64:
        raise ValueError(
            f"expected int32 or int64 rows and int64 targets, got {rows.dtype} and {targets.dtype}"
        )
    check_one_device(hidden, weight, rows, targets, bias)
    check_scale(scale, rows, hidden)
    check_softcap(softcap)


def explain_over_vocabulary(
    one_target: Explained,  # of the same rows with one target each
    plan: TargetPlan,
) -> Explained:
    """Return what K targets a row add to the explanation of one."""
    K = plan.layout.K
    if K == 1:
        return one_target
    more = f"{K} targets a row: {_reads(plan)}, and no more GEMMs than for one"
    return one_target._replace(
        peak_bytes=max(one_target.peak_bytes, plan.peak_bytes),
        reasons=(*one_target.reasons, more),
    )


def fields_over_targets(
    plan: TargetPlan,
    gradient: bool,  # of anything
    source: str,  # of the budget
) -> dict[str, Any]:
    """Return the fields of the Explanation over the targets."""
    layout = plan.layout
    rows = layout.block(plan.budget)[0] if layout.gathers else max(1, layout.M)
    return dict(
        impl=plan.impl,
        schedule="targets",
        fwd_chunk=rows,
        bwd_chunk=rows if gradient else 0,
        peak_bytes=plan.peak_bytes,
        gemms=0,
        saved=0,
        budget=plan.budget,
        reasons=(f"over {layout.K} targets a row: {_reads(plan)}, and no GEMM", source),
    )


def _reads(plan: TargetPlan) -> str:
    if not plan.layout.gathers:
        return "their rows of the head are read where they lie"
    return f"their rows of the head are gathered, {plan.peak_bytes} bytes at once"


class _OverTargets(torch.autograd.Function):
    """log softmax of each row's present targets; that of a confident row to the last digit."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, present: Tensor) -> Tensor:  # (M, K) each
        top, at = z.max(1, keepdim=True)
        others = (z - top).exp().scatter(1, at, 0).sum(1, keepdim=True)
        logp = (z - top - others.log1p()).where(present, 0)
        ctx.save_for_backward(logp, present)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logp, present = ctx.saved_tensors
        grad = grad.where(present, 0)
        total = grad.sum(1, keepdim=True)
        # G_k (1 - p_k) - (sum of the other G) p_k: of a confident row 1 - p_k keeps its digits
        dz = -grad * logp.expm1() - (total - grad) * logp.exp()
        return dz.where(present, 0), None


class _OverVocabulary(torch.autograd.Function):
    """logp of a row's best target (M,), and of the others (M, K) by their distance from it."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, z: Tensor, best: Tensor, present: Tensor) -> Tensor:
        ctx.save_for_backward(best, present)
        return (logp[:, None] + (z - z.gather(1, best))).where(present, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        best, present = ctx.saved_tensors
        grad = grad.where(present, 0)
        total = grad.sum(1)
        is_best = torch.arange(grad.shape[1], device=grad.device) == best
        return total, torch.where(is_best, grad - total[:, None], grad), None, None
