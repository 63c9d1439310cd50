"""Hold what the implementations of target_logits share: all but the sums over D and targets.

Logits and their gradient are (M, K), a few numbers a row, so plain PyTorch finishes them. With
c = dL/dz * cap'(z), zero where a target is absent,

    grad_hidden[rows[m]] += sum_k scale[m] * c[m, k] * weight[targets[m, k]]
    grad_weight[t]       += sum of scale[m] * c[m, k] * hidden[rows[m]] over targets[m, k] = t
    grad_bias[t]         += sum of c[m, k] over targets[m, k] = t

The backward adds to gradients that are there already. Over the vocabulary those are of the
log-sum-exp: a (V, D) of its own would take its memory, and two more passes to be added.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepo_kernels import devices
from sepo_kernels.devices import accumulator
from sepo_kernels.gemm import add_rows
from sepo_kernels.registry import Impl
from sepo_kernels.scales import Scale, as_column
from sepo_kernels.target_logits.layout import TargetLayout


class TargetKernels(NamedTuple):
    """One implementation: its sums, in the accumulator's dtype. No target counts outside [0, V).

    dots(hidden (N, D), weight (V, D), rows (M,), targets (M, K), budget) -> (M, K)
        hidden[rows[m]] . weight[targets[m, k]]; any number where the target does not count
    sum_targets(coefficient (M, K), weight, targets, budget) -> (M, D)
        sum_k coefficient[m, k] * weight[targets[m, k]]
    add_to_targets(grad_weight (V, D), coefficient, hidden, rows, targets, budget)
        adds coefficient[m, k] * hidden[rows[m]] to grad_weight[targets[m, k]]; the terms of a
        target are summed in a fixed order before they are rounded
    """

    dots: Callable[..., Tensor]
    sum_targets: Callable[..., Tensor]
    add_to_targets: Callable[..., None]


@dataclass(frozen=True)
class TargetImpl(Impl):
    """One implementation of target_logits."""

    gathers: bool = False  # rows of the head, within the budget


def implementation(
    name: str, kernels: TargetKernels, why_not: Callable[..., str | None], gathers: bool
) -> TargetImpl:
    """Give `kernels` the signature of the operators."""
    both = partial(fwd, kernels), partial(bwd, kernels)
    return TargetImpl(name, *both, why_not, gathers=gathers)


def layout_of(hidden: Tensor, targets: Tensor, gathers: bool) -> TargetLayout:
    M, K = targets.shape
    memory = devices.memory(hidden.device)
    return TargetLayout(M, K, hidden.shape[1], hidden.dtype, gathers, memory)


def fwd(
    kernels: TargetKernels,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64; -1: absent
    scale: Scale,  # a number, or (M,) in the accumulator's dtype
    softcap: float | None,
    budget: int,  # bytes
) -> Tensor:  # (M, K) accumulator dtype; -inf where absent, NaN beyond V
    V = weight.shape[0]
    z = kernels.dots(hidden, weight, rows, targets, budget)
    z *= as_column(scale)
    if bias is not None:
        z += bias[targets.clamp(0, V - 1)]
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z.masked_fill_(targets < 0, -torch.inf).masked_fill_(targets >= V, torch.nan)


def bwd(
    kernels: TargetKernels,
    grad_logits: Tensor,  # (M, K)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64; -1: absent
    logits: Tensor,  # (M, K), what fwd returned
    scale: Scale,  # a number, or (M,) in the accumulator's dtype
    softcap: float | None,
    budget: int,  # bytes
    grad_hidden: Tensor | None,  # (N, D), added to; None: unneeded
    grad_weight: Tensor | None,  # (V, D), added to
    grad_bias: Tensor | None,  # (V,), added to
) -> None:
    acc, V = accumulator(hidden.dtype), weight.shape[0]
    coefficient = grad_logits.to(acc)
    if softcap is not None:
        coefficient = coefficient * (1 - (logits / softcap) ** 2)
    coefficient = coefficient.where((targets >= 0) & (targets < V), 0)
    if grad_bias is not None:
        at = targets.clamp(0, V - 1).flatten()
        _add_in(acc, grad_bias, lambda total: add_rows(total, at, coefficient.flatten()))
    coefficient = coefficient * as_column(scale)
    if grad_hidden is not None:
        values = kernels.sum_targets(coefficient, weight, targets, budget)
        _add_in(acc, grad_hidden, lambda total: add_rows(total, rows, values))
    if grad_weight is not None:
        kernels.add_to_targets(grad_weight, coefficient, hidden, rows, targets, budget)


def _add_in(acc: torch.dtype, out: Tensor, add: Callable[[Tensor], None]) -> None:
    """Let `add` add to `out`, in the accumulator's dtype, and round once."""
    total = out.to(acc)  # itself, where it has that dtype
    add(total)
    if total is not out:
        out.copy_(total)
