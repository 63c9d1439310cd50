"""FLOP formulas of the operations, so that FlopCounterMode and MFU reports are right."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sepo.ops._selected_logprob
import sepo.ops._selected_logprob_kl  # noqa: F401  these define the operators
from sepo_kernels.selected_logprob import schedule as plan
from sepo_kernels.selected_logprob_kl import schedule as two_heads

Shape = Sequence[int]  # the counter passes shapes in the place of tensors


@register_flop_formula(torch.ops.sepo.selected_logprob_fwd)
def _fwd_flops(
    hidden: Shape, weight: Shape, bias: Shape, rows: Shape, targets: Shape, scale: float,
    softcap: float, schedule: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (V, D), (M,) = weight, rows
    return 2 * M * D * V * plan.fwd_gemms(schedule)


@register_flop_formula(torch.ops.sepo.selected_logprob_bwd)
def _bwd_flops(
    grad_logp: Shape, hidden: Shape, weight: Shape, bias: Shape, rows: Shape, targets: Shape,
    logp: Shape, lse: Shape, row_scale: Shape, saved: Shape, scale: float, softcap: float,
    schedule: str, budget: int, need_hidden: bool, need_weight: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (V, D), (M,) = weight, rows
    return 2 * D * V * plan.bwd_rows(M, _saved(saved, schedule), schedule, need_hidden, need_weight)


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_fwd)
def _kl_fwd_flops(
    hidden: Shape, weight: Shape, bias: Shape, ref_hidden: Shape, ref_weight: Shape,
    ref_bias: Shape, rows: Shape, targets: Shape, scale: float, softcap: float, direction: str,
    schedule: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M,) = rows
    return _two_heads(weight, ref_weight, *(M * x for x in two_heads.fwd_gemms(schedule)))


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_bwd)
def _kl_bwd_flops(
    grad_logp: Shape, grad_kl: Shape, hidden: Shape, weight: Shape, bias: Shape, ref_hidden: Shape,
    ref_weight: Shape, ref_bias: Shape, rows: Shape, targets: Shape, logp: Shape, ref_logp: Shape,
    kl: Shape, state: Shape, first: Shape, second: Shape, scale: float, softcap: float,
    direction: str, schedule: str, budget: int, need_hidden: bool, need_weight: bool,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M,), saved = rows, _saved(first, schedule)
    products = two_heads.bwd_rows(M, saved, schedule, need_hidden, need_weight)
    return _two_heads(weight, ref_weight, *products)


def _saved(saved: Shape, schedule: str) -> int:  # rows
    return saved[0] if schedule in (plan.SAVE, plan.PARTIAL) else 0


def _two_heads(
    weight: Shape, ref_weight: Shape, policy: int, reference: int
) -> int:  # rows of products
    V, D = weight
    # the reference's weight comes to the backward only where it is multiplied
    return 2 * V * (policy * D + (reference * ref_weight[1] if reference else 0))
