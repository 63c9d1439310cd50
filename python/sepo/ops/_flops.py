"""FLOP formulas of the operations, so that FlopCounterMode and MFU reports are right."""

import torch
from torch.utils.flop_counter import register_flop_formula

import sepo.ops._selected_logprob
import sepo.ops._selected_logprob_kl  # noqa: F401  these define the operators
from sepo_kernels.selected_logprob import schedule as plan
from sepo_kernels.selected_logprob_kl import schedule as two_heads


@register_flop_formula(torch.ops.sepo.selected_logprob_fwd)
def _fwd_flops(hidden, weight, bias, rows, targets, scale, softcap, schedule, *_, **__) -> int:
    (V, D), (M,) = weight, rows  # the counter passes shapes
    return 2 * M * D * V * plan.fwd_gemms(schedule)


@register_flop_formula(torch.ops.sepo.selected_logprob_bwd)
def _bwd_flops(
    grad_logp, hidden, weight, bias, rows, targets, logp, lse, row_scale, saved, scale, softcap, schedule,
    budget, need_hidden, need_weight, *_, **__,
) -> int:  # fmt: skip
    (V, D), (M,) = weight, rows
    return 2 * D * V * plan.bwd_rows(M, _saved(saved, schedule), schedule, need_hidden, need_weight)


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_fwd)
def _kl_fwd_flops(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets, scale, softcap,
    direction, schedule, *_, **__,
) -> int:  # fmt: skip
    (M,) = rows
    return _two_heads(weight, ref_weight, *(M * x for x in two_heads.fwd_gemms(schedule)))


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_bwd)
def _kl_bwd_flops(
    grad_logp, grad_kl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets,
    logp, ref_logp, kl, state, first, second, scale, softcap, direction, schedule, budget,
    need_hidden, need_weight, *_, **__,
) -> int:  # fmt: skip
    (M,), saved = rows, _saved(first, schedule)
    products = two_heads.bwd_rows(M, saved, schedule, need_hidden, need_weight)
    return _two_heads(weight, ref_weight, *products)


def _saved(saved, schedule: str) -> int:  # rows
    return saved[0] if schedule in (plan.SAVE, plan.PARTIAL) else 0


def _two_heads(weight, ref_weight, policy: int, reference: int) -> int:  # rows of products
    V, D = weight
    # the reference's weight comes to the backward only where it is multiplied
    return 2 * V * (policy * D + (reference * ref_weight[1] if reference else 0))
