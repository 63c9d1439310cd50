"""FLOP formulas of the operations, so that FlopCounterMode and MFU reports are right."""

import torch
from torch.utils.flop_counter import register_flop_formula

import sepo.ops.selected_logprob  # noqa: F401  defines the operators
from sepo_kernels.selected_logprob import schedule as plan


@register_flop_formula(torch.ops.sepo.selected_logprob_fwd)
def _fwd_flops(hidden, weight, bias, rows, targets, scale, softcap, schedule, *_, **__) -> int:
    (V, D), (M,) = weight, rows  # the counter passes shapes
    return 2 * M * D * V * plan.fwd_gemms(schedule)


@register_flop_formula(torch.ops.sepo.selected_logprob_bwd)
def _bwd_flops(
    grad_logp, hidden, weight, bias, rows, targets, logp, lse, kept, scale, softcap, schedule,
    budget, need_hidden, need_weight, *_, **__,
) -> int:  # fmt: skip
    (V, D), (M,) = weight, rows
    return 2 * M * D * V * plan.bwd_gemms(schedule, need_hidden, need_weight)
