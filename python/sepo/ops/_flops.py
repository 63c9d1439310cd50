"""FLOP formulas of the operations, so that FlopCounterMode and MFU reports are right."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sepo.ops._selected_logprob
import sepo.ops._selected_logprob_kl
import sepo.ops._selected_stats
import sepo.ops._split_linear
import sepo.ops._target_logits  # noqa: F401  these define the operators
from sepo_kernels import schedules
from sepo_kernels.selected_logprob.layout import HeadLayout
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout
from sepo_kernels.selected_stats.layout import EntropyLayout

Shape = Sequence[int]  # the counter passes shapes in the place of tensors


@register_flop_formula(torch.ops.sepo.selected_logprob_fwd)
def _fwd_flops(
    hidden: Shape, weight: Shape, bias: Shape, rows: Shape, targets: Shape, scale: float,
    softcap: float, schedule: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M,) = rows
    return _flops([weight], [M * gemms for gemms in HeadLayout.fwd_gemms(schedule)])


@register_flop_formula(torch.ops.sepo.selected_logprob_bwd)
def _bwd_flops(
    grad_logp: Shape, hidden: Shape, weight: Shape, bias: Shape, rows: Shape, targets: Shape,
    logp: Shape, lse: Shape, row_scale: Shape, saved: Shape, scale: float, softcap: float,
    schedule: str, budget: int, need_hidden: bool, need_weight: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M,), num_saved = rows, _num_saved(saved, schedule)
    return _flops([weight], HeadLayout.bwd_rows(M, num_saved, schedule, need_hidden, need_weight))


@register_flop_formula(torch.ops.sepo.target_logits_fwd)
def _targets_fwd_flops(
    hidden: Shape, weight: Shape, bias: Shape, rows: Shape, targets: Shape, *_: Any, **__: Any
) -> int:
    M, K = targets
    return 2 * M * K * hidden[1]


@register_flop_formula(torch.ops.sepo.target_logits_bwd)
def _targets_bwd_flops(
    grad_logits: Shape, hidden: Shape, weight: Shape, rows: Shape, targets: Shape, logits: Shape,
    scale: float, softcap: float, budget: int, grad_hidden: Shape | None,
    grad_weight: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    M, K = targets
    return 2 * M * K * hidden[1] * ((grad_hidden is not None) + (grad_weight is not None))


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_fwd)
def _kl_fwd_flops(
    hidden: Shape, weight: Shape, bias: Shape, ref_hidden: Shape, ref_weight: Shape,
    ref_bias: Shape, rows: Shape, targets: Shape, scale: float, softcap: float, ref_scale: float,
    ref_softcap: float, beta: float, schedule: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M,) = rows
    return _flops([weight, ref_weight], [M * gemms for gemms in TwoHeadLayout.fwd_gemms(schedule)])


@register_flop_formula(torch.ops.sepo.selected_logprob_kl_bwd)
def _kl_bwd_flops(
    grad_logp: Shape, grad_kl: Shape, hidden: Shape, weight: Shape, bias: Shape, ref_hidden: Shape,
    ref_weight: Shape, ref_bias: Shape, rows: Shape, targets: Shape, logp: Shape, ref_logp: Shape,
    kl: Shape, state: Shape, first: Shape, second: Shape, scale: float, softcap: float,
    ref_scale: float, ref_softcap: float, beta: float, schedule: str, budget: int,
    need_hidden: bool, need_weight: bool,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M,), num_saved = rows, _num_saved(first, schedule)
    return _flops(
        [weight, ref_weight],
        TwoHeadLayout.bwd_rows(M, num_saved, schedule, need_hidden, need_weight),
    )


@register_flop_formula(torch.ops.sepo.selected_stats_fwd)
def _stats_fwd_flops(
    hidden: Shape, weight: Shape, bias: Shape, rows: Shape, targets: Shape, scale: float,
    softcap: float, entropy_grad: bool, schedule: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    layout = EntropyLayout if entropy_grad else HeadLayout
    (M,) = rows
    return _flops([weight], [M * gemms for gemms in layout.fwd_gemms(schedule)])


@register_flop_formula(torch.ops.sepo.selected_stats_bwd)
def _stats_bwd_flops(
    grad_logp: Shape, grad_entropy: Shape, hidden: Shape, weight: Shape, bias: Shape, rows: Shape,
    targets: Shape, logp: Shape, lse: Shape, entropy: Shape, reference: Shape, row_scale: Shape,
    saved: Shape, scale: float, softcap: float, schedule: str, budget: int, need_hidden: bool,
    need_weight: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M,), num_saved = rows, _num_saved(saved, schedule)
    return _flops(
        [weight], EntropyLayout.bwd_rows(M, num_saved, schedule, need_hidden, need_weight)
    )


@register_flop_formula(torch.ops.sepo.split_linear)
def _split_flops(x: Shape, hi: Shape, lo: Shape | None, *_: Any, **__: Any) -> int:
    return _flops([hi], [x[0] * (2 if lo is None else 3)])


def _num_saved(saved: Shape, schedule: str) -> int:  # rows
    return saved[0] if schedule in (schedules.SAVE, schedules.PARTIAL) else 0


def _flops(weights: Sequence[Shape], rows: Iterable[int]) -> int:
    """Count 2 V D for each row that is multiplied with a head's weight (V, D)."""
    # the reference's weight comes to the backward only where it is multiplied
    return sum(2 * n * weight[0] * weight[1] for weight, n in zip(weights, rows, strict=True) if n)
