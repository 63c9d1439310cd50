"""target_logits in plain PyTorch: gathered rows of the head, a block at a time.

Gathered rows are widened, because a batched product of 16 bits would round its sums to 16 bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sepo_kernels.devices import accumulator
from sepo_kernels.gemm import add_rows
from sepo_kernels.schedules import parts
from sepo_kernels.target_logits.loops import TargetKernels, layout_of


def dots(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64
    budget: int,  # bytes
) -> Tensor:  # (M, K) accumulator dtype
    acc = accumulator(hidden.dtype)
    out = hidden.new_empty(targets.shape, dtype=acc)
    for m, k in _blocks(weight, targets, budget):
        x = hidden.index_select(0, rows[m]).to(acc)
        out[m, k] = torch.bmm(_gather(weight, targets[m, k]), x[:, :, None])[:, :, 0]
    return out


def sum_targets(
    coefficient: Tensor,  # (M, K) accumulator dtype
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M, K) int64
    budget: int,  # bytes
) -> Tensor:  # (M, D) accumulator dtype
    total = coefficient.new_zeros((targets.shape[0], weight.shape[1]))
    for m, k in _blocks(weight, targets, budget):
        head = _gather(weight, targets[m, k])
        total[m] += torch.bmm(coefficient[m, None, k], head)[:, 0]
    return total


def add_to_targets(
    grad_weight: Tensor,  # (V, D), added to
    coefficient: Tensor,  # (M, K) accumulator dtype
    hidden: Tensor,  # (N, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64
    budget: int,  # bytes
) -> None:
    at = targets.clamp(0, grad_weight.shape[0] - 1)
    total = grad_weight.to(coefficient.dtype)
    for m, k in _blocks(grad_weight, targets, budget):
        x = hidden.index_select(0, rows[m]).to(total.dtype)
        values = coefficient[m, k, None] * x[:, None]  # (rows, targets, D)
        add_rows(total, at[m, k].flatten(), values.flatten(0, 1))
    if total is not grad_weight:
        grad_weight.copy_(total)


def _blocks(weight: Tensor, targets: Tensor, budget: int) -> Iterator[tuple[slice, slice]]:
    """Cut targets (M, K) into blocks whose rows of `weight` are gathered at once."""
    M, K = targets.shape
    m_step, k_step = layout_of(weight, targets, gathers=True).block(budget)
    for m in parts(0, M, m_step):
        for k in parts(0, K, k_step):
            yield m, k


def _gather(
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (m, k)
) -> Tensor:  # (m, k, D) accumulator dtype
    at = targets.clamp(0, weight.shape[0] - 1).flatten()
    found = weight.index_select(0, at).to(accumulator(weight.dtype))
    return found.view(*targets.shape, weight.shape[1])


KERNELS = TargetKernels(dots, sum_targets, add_to_targets)
