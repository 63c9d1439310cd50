"""target_logits on a GPU: a Triton kernel for each sum."""

import torch
from torch import Tensor

from sepo_kernels import devices
from sepo_kernels.target_logits.loops import TargetKernels


def why_not(hidden: Tensor, *_: Tensor) -> str | None:
    return devices.why_not_triton(hidden)


def dots(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64
    budget: int,  # unread: of the head nothing is gathered
) -> Tensor:  # (M, K) float32
    from sepo_kernels import triton_rows, triton_targets

    x = hidden.index_select(0, rows)
    found = x.new_empty(targets.shape, dtype=torch.float32)
    triton_rows.launch(
        triton_targets.target_dots, targets.numel(), None,
        x, weight, targets.contiguous(), found, x.stride(0), weight.stride(0), targets.shape[1],
        *weight.shape,
    )  # fmt: skip
    return found


def sum_targets(
    coefficient: Tensor,  # (M, K) float32
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M, K) int64
    budget: int,  # unread
) -> Tensor:  # (M, D) float32
    from sepo_kernels import triton_rows, triton_targets

    (M, K), D = targets.shape, weight.shape[1]
    sums = coefficient.new_empty((M, D))
    triton_rows.launch(
        triton_targets.target_sums, M, D,
        coefficient.contiguous(), weight, targets.contiguous(), sums, weight.stride(0),
        sums.stride(0), K, *weight.shape,
    )  # fmt: skip
    return sums


def add_to_targets(
    grad_weight: Tensor,  # (V, D), added to
    coefficient: Tensor,  # (M, K) float32
    hidden: Tensor,  # (N, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64
    budget: int,  # unread
) -> None:
    from sepo_kernels import triton_rows, triton_targets

    x = hidden.index_select(0, rows)
    ordered, order = targets.flatten().sort(stable=True)
    triton_rows.launch(
        triton_targets.target_add, len(ordered), grad_weight.shape[1],
        grad_weight, coefficient.contiguous(), x, ordered, order,
        grad_weight.stride(0), x.stride(0), len(ordered), targets.shape[1], *grad_weight.shape,
    )  # fmt: skip


KERNELS = TargetKernels(dots, sum_targets, add_to_targets)
