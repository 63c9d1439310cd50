"""FLOP formulas of the operations, so that FlopCounterMode and MFU reports are right."""

import torch
from torch.utils.flop_counter import register_flop_formula

import sepo.ops._selected_logprob
import sepo.ops._selected_logprob_kl  # noqa: F401  these define the operators
from sepo_kernels import schedules
from sepo_kernels.selected_logprob.layout import HeadLayout
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout


@register_flop_formula(torch.ops.sepo.selected_logprob_fwd)
def _fwd_flops(hidden, weight, bias, rows, targets, scale, softcap, schedule, *_, **__) -> int:
    (M,) = rows  # the counter passes shapes
    return _flops([weight], [M * gemms for gemms in HeadLayout.fwd_gemms(schedule)])


@register_flop_formula(torch.ops.sepo.selected_logprob_bwd)
def _bwd_flops(
    grad_logp, hidden, weight, bias, rows, targets, logp, lse, row_scale, saved, scale, softcap,
    schedule, budget, need_hidden, need_weight, *_, **__,
) -> int:  # fmt: skip
    (M,), num_saved = rows, _num_saved(saved, schedule)
    return _flops([weight], HeadLayout.bwd_rows(M, num_saved, schedule, need_hidden, need_weight))


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_fwd)
def _kl_fwd_flops(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets, scale, softcap,
    direction, schedule, *_, **__,
) -> int:  # fmt: skip
    (M,) = rows
    return _flops([weight, ref_weight], [M * gemms for gemms in TwoHeadLayout.fwd_gemms(schedule)])


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_bwd)
def _kl_bwd_flops(
    grad_logp, grad_kl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets,
    logp, ref_logp, kl, state, first, second, scale, softcap, direction, schedule, budget,
    need_hidden, need_weight, *_, **__,
) -> int:  # fmt: skip
    (M,), num_saved = rows, _num_saved(first, schedule)
    return _flops(
        [weight, ref_weight],
        TwoHeadLayout.bwd_rows(M, num_saved, schedule, need_hidden, need_weight),
    )


def _num_saved(saved, schedule: str) -> int:
    return saved[0] if schedule in (schedules.SAVE, schedules.PARTIAL) else 0


def _flops(weights, rows) -> int:
    """Count 2 V D for each row that is multiplied with a head's weight (V, D)."""
    # the reference's weight comes to the backward only where it is multiplied
    return sum(2 * n * weight[0] * weight[1] for weight, n in zip(weights, rows, strict=True) if n)
